"""What a command says: log and progress on stderr, its result on stdout.

Where stderr is a terminal, a live bar stands below the log, and a stage that has finished leaves
one line with a mark. Elsewhere, and where NO_COLOR is set or TERM is dumb, all are plain lines in
which nothing steers a terminal. `--quiet` leaves errors and the result, `--json` makes it JSON.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.runtime import redaction
from pipeline.runtime.reject_reasons import printable

NOISY = ("ray", "open_clip", "root", "httpx", "botocore")
STAGE = 10  # columns for the name of a stage


@dataclass
class _Manner:
    """A process runs one command; this is how that one speaks."""

    json: bool = False
    terminal: Console | None = None  # for the live bar and the log; None: plain lines


_manner = _Manner()


class Formatter(redaction.Formatter):
    """A message is one line, and nothing that data brought into it steers the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


class Handler(logging.StreamHandler):
    """Log records on stderr, above the live bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if _manner.terminal is None:
            return super().emit(record)
        try:
            _manner.terminal.print(_line(record, self.format(record)), soft_wrap=True)
        except Exception:  # as every handler: what cannot be said must not end a stage
            self.handleError(record)


def _line(record: logging.LogRecord, text: str) -> Text:
    """A record for a terminal: the one line of a stage has a mark and columns."""
    if not (stage := getattr(record, "stage", None)):
        return Text(text)
    mark, facts = record.__dict__["mark"], " · ".join(record.__dict__["facts"])
    style = "green" if mark == "✓" else "dim"
    return Text.assemble((mark, style), f" {stage:<{STAGE}}", printable(facts))


def begin() -> None:
    """Set up logging for one command, before its options are known."""
    handler = Handler(sys.stderr)
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger().setLevel(logging.WARNING)
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    _manner.json, _manner.terminal = False, _terminal()


def _terminal() -> Console | None:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown")
    return Console(stderr=True, highlight=False) if sys.stderr.isatty() and not plain else None


def hush(quiet: bool) -> None:
    """`--quiet`: from here on errors alone."""
    if quiet:
        logging.getLogger("pipeline").setLevel(logging.ERROR)
        _manner.terminal = None


def as_json(asked: bool) -> None:
    """`--json`: the result will be one object."""
    _manner.json = _manner.json or asked


def wants_json() -> bool:
    """Whether the result will be JSON."""
    return _manner.json


def terminal() -> Console | None:
    """Where a live bar may be shown."""
    return _manner.terminal


def log_finished(log: logging.Logger, stage: str, seconds: float, *facts: str) -> None:
    """The one line that a stage leaves."""
    shown = [*facts, f"{int(seconds) // 60}:{int(seconds) % 60:02d}"]
    said = ", ".join([*facts, f"{seconds:.1f} s"])
    log.info("%s: %s", stage, said, extra={"stage": stage, "mark": "✓", "facts": shown})


def log_already_done(log: logging.Logger, stage: str, where: str) -> None:
    """The same of a stage that was found done."""
    shown = {"stage": stage, "mark": "·", "facts": ["already done"]}
    log.info("%s: already done, %s", stage, where, extra=shown)


def answer(text: str, facts: Mapping[str, Any]) -> None:
    """The result of a command, the last that it says: for a person, or as JSON."""
    if said := json.dumps(facts, indent=1) if _manner.json else text:
        print(said)
