"""Runs one command of the command line; a failure becomes one line and an exit code.

Exit code 0: finished. 1: failed or interrupted. 2: a mistake of the user.
"""

import atexit
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import typer

from pipeline.cli import commands
from pipeline.cli.help_pages import App
from pipeline.cli.options import KINDS
from pipeline.runtime import console, redaction
from pipeline.runtime.errors import find_cause, user_message
from pipeline.runtime.reject_reasons import printable

log = logging.getLogger(__name__)
INTERRUPTED = 130  # what typer returns after a KeyboardInterrupt

app = App(KINDS, help=commands.ABOUT)
commands.add(app)


def invoke(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or pipe that is not UTF-8 gets "?"
            stream.reconfigure(errors="replace")
    console.begin()
    for kind in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=kind)
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(arguments, prog_name="ratecluster", standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        return _exit("interrupted; run the same command again to resume", 1)
    except Exception as error:
        return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    """Print what went wrong; returns 2 if the user can correct it, else 1."""
    if usage := getattr(error, "format_message", None):  # click's, of which typer has its own copy
        command = getattr(getattr(error, "ctx", None), "command_path", "ratecluster")
        return _exit(f"{usage().rstrip('.')}; see {command} --help", 2)
    if message := user_message(error):
        return _exit(message, 2)
    cause = find_cause(error)
    if not _is_raised_here(cause):
        log.error("ratecluster failed", exc_info=error)
    reason = (str(cause).strip() or "no reason given").splitlines()[-1]
    return _exit(f"failed: {type(cause).__name__}: {reason}", 1)


def _is_raised_here(error: BaseException) -> bool:
    """Whether this package raised the RuntimeError itself: its message needs no traceback."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return type(error) is RuntimeError and module.startswith("pipeline.")


def _exit(message: str, code: int) -> int:
    plain = printable(redaction.redacted(" ".join(message.split())))
    typer.echo(f"ratecluster: {plain}", err=True)
    return code


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: run one command in a process of its own, and end the process."""
    codes: list[int] = []
    atexit.register(_end_process, codes)  # the first registered is the last to run
    codes.append(invoke(arguments))
    sys.exit(codes[0])


def _end_process(codes: list[int]) -> None:
    """End the process without the destructors of C++.

    There Arrow's threads may abort a process that has done its work, with SIGABRT. It happened on
    busy machines: https://github.com/apache/arrow/issues/34314.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # the reader of a pipe has gone; the stream is closed
        os._exit(1)
    if codes:
        os._exit(codes[0])
