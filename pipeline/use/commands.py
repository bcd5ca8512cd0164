"""The commands for finished runs."""

from pipeline.manual import App
from pipeline.use import curating, exporting, searching


def add(app: App) -> None:
    """Put them beside the stages' commands."""
    searching.add(app)
    curating.add(app)
    exporting.add(app)
