"""The commands for finished runs."""

import typer


def add(app: typer.Typer) -> None:
    """Put them beside the stages' commands."""
