"""Operations of a store that may fail for a while: tried again, with longer waits, then named."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.runtime.redaction import harmless, redacted

T = TypeVar("T")
ATTEMPTS = 4  # of one storage operation; the waits between them are 1, 2 and 4 seconds
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "urllib3", "requests", "gcsfs", "httpx")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class ExhaustedError(OSError):
    """A store that failed as often as it was asked: whoever asked for more need not ask again."""


class ChangedError(OSError):
    """A file is not the one that was listed: only a new listing helps."""


FINAL = (
    *(FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError),
    *(ExhaustedError, ChangedError),
)


def retry(operation: Callable[[], T], url: str = "") -> T:
    """Run `operation`; an error of the store that may pass is tried again, with longer waits.

    The last error names `url`. What is raised tells no secret, though clients quote the URL they
    asked for. An S3 client tries each time for as long as 50 s by itself.
    """
    started = time.monotonic()
    for attempt in range(ATTEMPTS):
        try:
            return operation()
        except Exception as error:
            final = isinstance(error, FINAL) or not _may_pass(error)
            if not final and attempt < ATTEMPTS - 1:
                time.sleep(2**attempt)
                continue
            if not final and url:
                raise _exhausted(url, error, time.monotonic() - started) from None
            if (told := harmless(error)) is not error:
                raise told from None
            raise
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    """Errors of the network are OSErrors, or of the clients' own kinds."""
    if isinstance(error, OSError):
        return error.errno not in FULL
    return type(error).__module__.partition(".")[0] in CLIENTS


def _exhausted(url: str, error: Exception, seconds: float) -> ExhaustedError:
    said = str(error) or type(error).__name__
    return ExhaustedError(
        redacted(
            f"{said if url in said else f'{url}: {said}'} (tried {ATTEMPTS} times, {seconds:.0f} "
            "s). Run the same command again when the store answers: what is done stays done. If it "
            "limits requests, lower embed.decode_cpus or embed.actors, or use fewer nodes"
        )
    )
