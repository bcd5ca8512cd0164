"""Lets any thread make a block of the main thread fail."""

import signal
import threading
import time
from contextlib import suppress
from typing import Any

LATE_S = 1.0  # a signal arrives within this time


class Interruption:
    """A block that raises RuntimeError(reason) soon after `interrupt(reason)`, from any thread.

    It sends SIGINT, which ends ray.get, iteration over a dataset and waiting for a lock. A user's
    Ctrl-C still raises KeyboardInterrupt. Python handles signals only in the main thread, so a
    block in another thread raises when it ends.
    """

    def __init__(self) -> None:
        self._reason = ""
        self._over = threading.Event()

    def interrupt(self, reason: str) -> None:
        """Send the signal; may be called again if the block has not ended."""
        self._reason = self._reason or reason
        if self._main and not self._over.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def __enter__(self) -> "Interruption":
        self._main = threading.current_thread() is threading.main_thread()
        self._ignored = self._main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if self._ignored:  # shells start background jobs so
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._over.set()
        if self._reason and self._main and kind is not KeyboardInterrupt:
            with suppress(KeyboardInterrupt):  # it is on its way
                time.sleep(LATE_S)
        if self._ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self._reason:
            raise RuntimeError(self._reason) from error
