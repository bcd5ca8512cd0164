"""The console script: `ratecluster`, or `python -m pipeline`.

torch, Ray and scikit-learn take seconds to import. Rooms are therefore entered when something in
them is used: help and the completion of a shell come without. What stands for a room until then is
an attribute of its package and not in `sys.modules`, all of which torch looks into while it is
imported: importlib's LazyLoader would enter every room in the midst of that.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from pipeline import use

ROOMS = (
    *("pack", "embed", "train", "select_k", "caption", "write", "evaluate", "report"),
    *("status", "plan", "capacity", "verify", "init", "cluster"),
    *(f"use.{m.name}" for m in pkgutil.iter_modules(use.__path__) if m.name != "commands"),
)


class Room(ModuleType):
    """A module that is imported when something in it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def main() -> None:
    """Start the command line."""
    for room in ROOMS:
        house, _, name = f"pipeline.{room}".rpartition(".")
        setattr(importlib.import_module(house), name, Room(f"{house}.{name}"))
    from pipeline import cli

    cli.main()


if __name__ == "__main__":
    main()
