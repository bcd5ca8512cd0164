"""ratecluster: labels a web-scale image collection without labels.

From Python: `open_run` reads a finished run, `run` makes one (see `pipeline.api`).
"""

from typing import Any

__all__ = ["open_run", "run"]


def __getattr__(name: str) -> Any:
    """The API, imported when it is first used: every module and command imports this package."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline import api

    return getattr(api, name)
