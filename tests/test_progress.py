"""Progress: counts, and a plain line now and then where there is no terminal."""

import io
import logging

import pytest

from pipeline import progress
from pipeline.progress import StageProgress


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which the test sets; no terminal."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys, "stderr", io.StringIO())
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
    caplog.set_level(logging.INFO, "pipeline.progress")
    with StageProgress("embed", 100, "shards") as bar:
        for _ in range(50):
            clock[0] += 1
            bar.advance(samples=10)
    assert len(caplog.messages) == 50 // (progress.EVERY_S + 1)
    assert caplog.messages[0] == "embed: 11/100 shards, 110 samples, 10 samples/s, 1:29 left"


def test_errors_pass_through(clock):
    with pytest.raises(RuntimeError, match="stop"), StageProgress("embed", 1, "shards"):
        raise RuntimeError("stop")
