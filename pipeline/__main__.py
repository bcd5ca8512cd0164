"""The console script: `ratecluster`, or `python -m pipeline`.

torch, Ray and scikit-learn take seconds to import. Rooms are therefore entered when something in
them is used: help and the completion of a shell come without.
"""

import importlib.util
import pkgutil
import sys

from pipeline import use

ROOMS = (
    *("pack", "embed", "train", "select_k", "caption", "write", "evaluate", "report"),
    *("status", "plan", "capacity", "verify", "init", "cluster"),
    *(f"use.{m.name}" for m in pkgutil.iter_modules(use.__path__) if m.name != "commands"),
)


def main() -> None:
    """Start the command line."""
    for room in ROOMS:
        _enter_later(f"pipeline.{room}")
    from pipeline import cli

    cli.main()


def _enter_later(name: str) -> None:
    """Import a module so that it is executed when first used: importlib's own recipe."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None, name
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    house, _, room = name.rpartition(".")
    setattr(sys.modules[house], room, module)  # else an import statement looks into it
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main()
