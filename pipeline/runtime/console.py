"""What a command prints: log and progress on stderr, its result on stdout.

If stderr is a terminal, a live bar is shown below the log, and a finished stage leaves one line
with a mark. Otherwise, and if NO_COLOR is set or TERM is dumb, all lines are plain text without
escape sequences. `--quiet` prints only errors and the result; `--json` prints the result as JSON.
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

from pipeline.runtime.redaction import redacted
from pipeline.runtime.reject_reasons import printable

NOISY = ("ray", "open_clip", "root", "httpx", "botocore")
STAGE = 10  # columns for the name of a stage


@dataclass
class _Style:
    """How the one command of this process prints."""

    json: bool = False
    terminal: Console | None = None  # for the live bar and the log; None: plain lines


_style = _Style()


class Formatter(logging.Formatter):
    """Each message is one line, without secrets, and control characters in it are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or the lines of a traceback."""
        return redacted(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


class Handler(logging.StreamHandler):
    """Log records on stderr, above the live bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if _style.terminal is None:
            return super().emit(record)
        try:
            text = Text(self.format(record))
            if stage := getattr(record, "stage", None):  # it has finished: a mark and columns
                mark, facts = record.__dict__["mark"], " · ".join(record.__dict__["facts"])
                style = "green" if mark == "✓" else "dim"
                text = Text.assemble((mark, style), f" {stage:<{STAGE}}", printable(facts))
            _style.terminal.print(text, soft_wrap=True)
        except Exception:  # a failure to log must not end a stage
            self.handleError(record)


def begin() -> None:
    """Set up logging for one command, before its options are known."""
    handler = Handler(sys.stderr)
    handler.setFormatter(Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger().setLevel(logging.WARNING)
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in ("dumb", "unknown")
    live = sys.stderr.isatty() and not plain
    _style.json, _style.terminal = False, Console(stderr=True, highlight=False) if live else None


def be_quiet(quiet: bool) -> None:
    """`--quiet`: log only errors from now on."""
    if quiet:
        logging.getLogger("pipeline").setLevel(logging.ERROR)
        _style.terminal = None


def use_json(json: bool) -> None:
    """`--json`: print the result as one JSON object."""
    _style.json = _style.json or json


def wants_json() -> bool:
    """Whether the result will be JSON."""
    return _style.json


def terminal() -> Console | None:
    """The terminal for a live bar; None where there is none."""
    return _style.terminal


def log_finished(log: logging.Logger, stage: str, seconds: float, *facts: str) -> None:
    """Log the line of a stage that has finished."""
    shown = [*facts, f"{int(seconds) // 60}:{int(seconds) % 60:02d}"]
    plain = ", ".join([*facts, f"{seconds:.1f} s"])
    log.info("%s: %s", stage, plain, extra={"stage": stage, "mark": "✓", "facts": shown})


def log_already_done(log: logging.Logger, stage: str, where: str) -> None:
    """Log that a stage had nothing to do."""
    shown = {"stage": stage, "mark": "·", "facts": ["already done"]}
    log.info("%s: already done, %s", stage, where, extra=shown)


def print_result(text: str, facts: Mapping[str, Any]) -> None:
    """Print the result of a command: the text, or with --json the facts."""
    if result := json.dumps(facts, indent=1) if _style.json else text:
        print(result)
