"""The door of the command line: run one command, say in one line what went wrong.

Exit code 0: everything asked for was done. 2: the user's mistake. 1: a failure.
"""

import logging
import re
import sys
import warnings
from collections.abc import Sequence

import typer

from pipeline.cli import commands
from pipeline.cli.help_pages import App
from pipeline.cli.options import KINDS
from pipeline.runtime import console, redaction
from pipeline.runtime.errors import UserError
from pipeline.runtime.reject_reasons import printable

log = logging.getLogger(__name__)
INTERRUPTED = 130  # what typer returns where it met a KeyboardInterrupt
SAID = re.compile(rf"^{UserError.__module__}\.{UserError.__name__}: (.+)$", re.MULTILINE)

app = App(KINDS, help=commands.ABOUT)
commands.add(app)


def invoke(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    console.begin()
    for kind in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=kind)
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(arguments, prog_name="ratecluster", standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted; run the same command again to go on", 1)
    except Exception as error:  # the last door: whatever it is becomes one line and a code
        return _failed(error)
    return 0


def _failed(error: Exception) -> int:
    """Say in one line what went wrong; 2 if the user can mend it."""
    if usage := getattr(error, "format_message", None):  # click's, of which typer has its own copy
        command = getattr(getattr(error, "ctx", None), "command_path", "ratecluster")
        return _say(f"{usage().rstrip('.')}; see {command} --help", 2)
    cause = underlying(error)
    if type(cause) is UserError:
        return _say(str(cause), 2)
    if said := SAID.findall(f"{error}\n{cause}"):  # of what an actor raised Ray keeps the text
        return _say(said[-1], 2)
    if not _said_by_us(cause):
        log.error("ratecluster failed", exc_info=error)
    reason = (str(cause).strip() or "no reason given").splitlines()[-1]
    return _say(f"failed: {type(cause).__name__}: {reason}", 1)


def _said_by_us(error: BaseException) -> bool:
    """Whether it is a stage's own word, which needs no traceback."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    ours = trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(
        "pipeline."
    )
    return type(error) is RuntimeError and ours


def underlying(error: BaseException) -> BaseException:
    """What was raised in a task or a worker, out of what Ray wrapped around it."""
    failures = getattr(error, "worker_failures", None)  # of Ray Train, by rank
    inner = next(iter(failures.values())) if failures else getattr(error, "cause", None)
    return underlying(inner) if isinstance(inner, BaseException) and inner is not error else error


def _say(message: str, code: int) -> int:
    plain = printable(redaction.redacted(" ".join(message.split())))
    typer.echo(f"ratecluster: {plain}", err=True)
    return code


def main() -> None:
    """The console script."""
    sys.exit(invoke())
