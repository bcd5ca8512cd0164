"""The commands for finished runs."""

import typer

from pipeline.use import curating, exporting


def add(app: typer.Typer) -> None:
    """Put them beside the stages' commands."""
    curating.add(app)
    exporting.add(app)
