"""A block of the main thread is made to fail by another thread, and Ctrl-C stays Ctrl-C."""

import signal
import subprocess
import sys
import threading

import pytest

from pipeline.runtime import interrupt
from pipeline.runtime.interrupt import Interruption


def soon(action) -> None:
    threading.Timer(0.2, action).start()


def test_a_waiting_block_fails_with_the_reason(pythons_ctrl_c):
    waited = []
    with pytest.raises(RuntimeError, match="too long"), Interruption() as block:
        soon(lambda: block.interrupt("too long"))
        threading.Event().wait(60)
        waited.append("to the end")
    assert not waited


def test_a_ctrl_c_stays_one(pythons_ctrl_c):
    with pytest.raises(KeyboardInterrupt), Interruption():
        soon(lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
        threading.Event().wait(60)


@pytest.mark.parametrize("error", [ValueError, None])
def test_an_interruption_as_the_block_ends_reaches_nothing_after_it(error, monkeypatch):
    """The signal comes while the block ends, whichever way: its reason counts, once."""
    monkeypatch.setattr(interrupt, "LATE_S", 0.1)
    for _ in range(15):
        with pytest.raises(RuntimeError, match="lost"), Interruption() as block:
            thread = threading.Thread(target=block.interrupt, args=("lost",))
            thread.start()
            while not block._reason:
                pass
            if error:
                raise error
        thread.join()


def test_a_block_that_is_over_cannot_be_interrupted(pythons_ctrl_c):
    with Interruption() as block:
        pass
    block.interrupt("late")
    with pytest.raises(RuntimeError, match="inner"), Interruption(), Interruption() as inner:
        soon(lambda: inner.interrupt("inner"))
        threading.Event().wait(60)


def test_outside_the_main_thread_it_fails_at_its_end():
    events = []

    def work() -> None:
        try:
            with Interruption() as block:
                block.interrupt("stalled")
                events.append("went on")
        except RuntimeError as error:
            events.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert events == ["went on", "stalled"]


def test_where_a_shell_has_sigint_ignored_it_fails_with_the_reason():
    """As jobs that a script starts in the background begin."""
    program = """
import signal, threading
signal.signal(signal.SIGINT, signal.SIG_IGN)
from pipeline.runtime.interrupt import Interruption
try:
    with Interruption() as block:
        threading.Timer(0.2, lambda: block.interrupt("too long")).start()
        threading.Event().wait(60)
        print("to the end")
except RuntimeError as error:
    print(error, signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "too long True\n"
