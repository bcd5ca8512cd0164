"""The commands for finished runs."""

import typer

from pipeline.use import curating, exporting, searching


def add(app: typer.Typer) -> None:
    """Put them beside the stages' commands."""
    searching.add(app)
    curating.add(app)
    exporting.add(app)
