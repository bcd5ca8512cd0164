"""Retries operations of a store that fail temporarily."""

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
    """All attempts failed; callers need not retry again."""


class ChangedError(OSError):
    """A file has changed since it was listed; only a new listing helps."""


FINAL = (
    *(FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError),
    *(ExhaustedError, ChangedError),
)


def retry(operation: Callable[[], T], url: str = "") -> T:
    """Run `operation`; repeat it after temporary errors of the store, with longer waits.

    Raises ExhaustedError with `url` after ATTEMPTS; permanent errors at once. Secrets in a message
    of a client are removed. An S3 client also retries for up to 50 s within each attempt.
    """
    started, attempt = time.monotonic(), 1
    while True:
        try:
            return operation()
        except Exception as error:
            passes = _may_pass(error)
            if not passes or attempt == ATTEMPTS:
                seconds = time.monotonic() - started
                last = _exhausted(url, error, seconds) if passes and url else harmless(error)
                if last is error:
                    raise
                raise last from None
        time.sleep(2 ** (attempt - 1))
        attempt += 1


def _may_pass(error: Exception) -> bool:
    """Whether it is a temporary error: an OSError, or an error of a client package."""
    if isinstance(error, OSError):
        return not isinstance(error, FINAL) and error.errno not in FULL
    return type(error).__module__.partition(".")[0] in CLIENTS


def _exhausted(url: str, error: Exception, seconds: float) -> ExhaustedError:
    text = str(error) or type(error).__name__
    return ExhaustedError(
        redacted(
            f"{text if url in text else f'{url}: {text}'} (tried {ATTEMPTS} times, {seconds:.0f} "
            "s). Run the same command again when the store answers; finished work is kept. If it "
            "limits requests, lower embed.decode_cpus or embed.actors, or use fewer nodes"
        )
    )
