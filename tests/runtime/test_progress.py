"""Progress: counts, and a plain line now and then where there is no terminal."""

import logging
import signal
import threading
import time

import pytest

from pipeline.runtime import progress, tasks
from pipeline.runtime.errors import UserError
from pipeline.runtime.progress import StageProgress


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_counts_rate_and_time_left(clock):
    with StageProgress("embed", 10, "shards") as bar:
        clock[0] += 40  # starting up
        bar.advance(samples=1500, rejected=7)
        assert bar.status() == "1/10 shards, 1,500 samples, 38 samples/s, 7 rejected"
        clock[0] += 20
        bar.advance(2, samples=4500)
        assert (bar.units, bar.samples, bar.rejected, bar.seconds) == (3, 6000, 7, 60)
        assert bar.status() == "3/10 shards, 6,000 samples, 100 samples/s, 7 rejected, 1:10 left"
        bar.advance(7)
        assert bar.status().endswith("0:00 left")


def test_nothing_done_or_nothing_to_do(clock):
    with StageProgress("write", 0, "shards") as bar:
        assert bar.status() == "0/0 shards"
    with StageProgress("write", 1000, "shards") as bar:
        assert "rejected" not in bar.status()


def test_plain_lines_come_now_and_then(clock, caplog):
    caplog.set_level(logging.INFO, "pipeline.runtime.progress")
    with StageProgress("embed", 100, "shards") as bar:
        for _ in range(50):
            clock[0] += 1
            bar.advance(samples=10)
    assert len(caplog.messages) == 50 // (progress.EVERY_S + 1)
    assert caplog.messages[0] == "embed: 11/100 shards, 110 samples, 10 samples/s, 1:29 left"


def test_errors_pass_through(clock):
    with pytest.raises(RuntimeError, match="stop"), StageProgress("embed", 1, "shards"):
        raise RuntimeError("stop")


def test_facts_are_those_of_the_stage_under_way(clock):
    assert progress.current() is None
    with StageProgress("embed", 10, "shards") as bar:
        clock[0] += 10
        bar.advance(samples=1000, rejected=1)
        clock[0] += 10
        bar.advance(4, samples=1000)
        assert progress.current() == {
            "stage": "embed",
            "line": "embed: 5/10 shards, 2,000 samples, 100 samples/s, 1 rejected, 0:12 left",
            "done": 5,
            "total": 10,
            "samples": 2000,
            "rejected": 1,
            "samples_per_s": 100.0,
            "left_s": 12,
        }
    assert progress.current() is None


# ---- standing still

QUICK = progress.Config(stall_s=0.3)


def test_nothing_that_moves_for_too_long_fails_and_names_what_is_waited_for():
    names = {f"{i:05d}": None for i in range(8)}
    message = (
        "embed: nothing finished for 0.3 s, waiting for 00001, 00002, 00003, 00004, 00005 and 2 "
    )
    with (
        pytest.raises(RuntimeError, match=message),
        progress.watched(QUICK),
        StageProgress("embed", 8, "shards") as bar,
    ):
        progress.waiting_for(names)
        del names["00000"]
        bar.advance()
        threading.Event().wait(60)


def test_what_was_not_named_is_counted():
    with (
        pytest.raises(RuntimeError, match="waiting for 6 of 8 shards; "),
        progress.watched(QUICK),
        StageProgress("embed", 8, "shards") as bar,
    ):
        bar.advance(2)
        threading.Event().wait(60)


def test_what_moves_is_left_alone_and_without_a_limit_everything_is():
    with progress.watched(progress.Config(stall_s=2)), StageProgress("embed", 40, "shards") as bar:
        for i in range(40):
            time.sleep(0.1)
            if i % 2:
                bar.advance()
            else:
                progress.waiting_for([str(i)])
    before = threading.active_count()
    with progress.watched(progress.Config(stall_s=0)), StageProgress("embed", 1, "shards"):
        assert threading.active_count() == before
    with pytest.raises(UserError, match=r"run\.stall_s = -1"):
        progress.Config(stall_s=-1)


def test_a_ctrl_c_stays_one(pythons_ctrl_c):
    def press() -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with (
        pytest.raises(KeyboardInterrupt),
        progress.watched(progress.Config(stall_s=50)),
        StageProgress("embed", 8, "shards"),
    ):
        threading.Timer(0.2, press).start()
        threading.Event().wait(60)


def sleep_at(item: list[str], bad: str) -> list[str]:
    time.sleep(1000 if bad in item else 0)
    return item


@pytest.mark.ray
def test_a_task_that_hangs_is_named(ray_session):
    items = [["a", "b"], ["c", "d"], ["e"]]
    found = []
    with (
        pytest.raises(
            RuntimeError, match="write: nothing finished for 8 s, waiting for c to d, e;"
        ),
        progress.watched(progress.Config(stall_s=8)),
        StageProgress("write", 5, "parts") as bar,
    ):
        for item in tasks.results(sleep_at, items, "d"):
            found.append(item)
            bar.advance(len(item))
    assert found == items[:1]
