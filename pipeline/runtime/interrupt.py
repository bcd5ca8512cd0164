"""A thread makes the block that the main thread is in fail, for a reason of its own."""

import signal
import threading
import time
from contextlib import suppress
from types import TracebackType

LATE_S = 1.0  # within which a signal that was sent arrives


class Interruption:
    """A block that raises RuntimeError(reason) soon after `interrupt(reason)`, from any thread.

    By SIGINT, on which ray.get, iteration over a dataset and waiting for a lock return; a user's
    Ctrl-C stays what it is. Python handles signals in the main thread alone: a block of another
    thread raises only when it ends.
    """

    def __init__(self) -> None:
        self._reason = ""
        self._over = threading.Event()

    def interrupt(self, reason: str) -> None:
        """Send the signal; may be called again where nothing came of it."""
        self._reason = self._reason or reason
        if self._main and not self._over.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def __enter__(self) -> "Interruption":
        self._main = threading.current_thread() is threading.main_thread()
        self._ignored = self._main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if self._ignored:  # as a shell's background jobs begin
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._reason and self._main and kind is not KeyboardInterrupt:
            with suppress(KeyboardInterrupt):  # it is on its way
                time.sleep(LATE_S)
        if self._ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self._reason:
            raise RuntimeError(self._reason) from error
