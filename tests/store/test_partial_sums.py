"""Sums that an interrupted stage goes on with: of the right fingerprint, whole, to the last bit."""

from itertools import pairwise

import numpy as np
import pytest

from pipeline.store import partial_sums, storage
from pipeline.store.partial_sums import PartialResult, ResumableSum
from pipeline.store.storage import Folder

CHUNKS = list(np.random.default_rng(0).normal(size=12))


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path))


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Every chunk is committed."""
    monkeypatch.setattr(partial_sums, "EVERY_S", 0.0)
    monkeypatch.setattr(partial_sums, "WORK", 0)


def add_up(folder: Folder, made_of="f", stop=99, chunks=CHUNKS) -> tuple[float, int]:
    """The sum, and how many chunks were added here; stops as if killed after `stop` of them."""
    running = ResumableSum(folder, "sum", made_of, len(chunks))
    total = running.restored["total"] if running.done else np.zeros(1)
    for count, x in enumerate(running.left(chunks)):
        if count == stop:
            return float(total[0]), count
        total = total + x
        running.advance(lambda total=total: {"total": total})
    return float(total[0]), len(chunks)


@pytest.mark.parametrize("stop", range(12))
def test_an_interrupted_sum_goes_on_to_the_same_bits(folder, stop):
    whole, _ = add_up(Folder(f"{folder.url}/other"))
    add_up(folder, stop=stop)
    running = ResumableSum(folder, "sum", "f", 12)
    assert running.done == stop and len(running.left(CHUNKS)) == 12 - stop
    assert add_up(folder)[0] == whole


def test_the_sum_of_other_settings_or_other_chunks_is_removed(folder):
    add_up(folder, stop=5)
    assert ResumableSum(folder, "sum", "g", 12).done == 0 and folder.names() == set()
    add_up(folder, stop=5)
    assert ResumableSum(folder, "sum", "f", 13).done == 0 and folder.names() == set()


def test_a_sum_that_cannot_be_read_is_begun_again(folder, caplog):
    for change in (lambda d: d[:-3], lambda d: b"", lambda d: b"\xff" * 40, lambda d: d[:4]):
        add_up(folder, stop=5)
        url = folder.file("unfinished-sum.safetensors")
        storage.write_bytes(url, change(storage.read_bytes(url)))
        caplog.clear()
        assert ResumableSum(folder, "sum", "f", 12).done == 0
        assert "the sum starts again" in caplog.text and folder.names() == set()


def test_a_short_stage_commits_nothing(folder, monkeypatch):
    monkeypatch.setattr(partial_sums, "EVERY_S", 30.0)
    add_up(folder)
    assert folder.names() == set()


def test_commits_take_a_small_share_of_the_time(folder, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(partial_sums.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(partial_sums, "EVERY_S", 30.0)
    monkeypatch.setattr(partial_sums, "WORK", 20)
    saved = []

    def slow(self, arrays):
        saved.append(clock[0])
        clock[0] += 10  # seconds for a commit

    monkeypatch.setattr(PartialResult, "save", slow)
    running = ResumableSum(folder, "sum", "f", 1000)
    while clock[0] < 1000:
        clock[0] += 1
        running.advance(dict)
    assert saved[0] == 30 and all(b - a == 210 for a, b in pairwise(saved))


def test_arrays_come_back_as_they_were(folder):
    arrays = {
        "f": np.random.default_rng(0).normal(size=(3, 4)),
        "i": np.arange(5, dtype=np.int32)[::2],
        "none": np.zeros((0, 4)),
        "one": np.int64(7),
    }
    PartialResult(folder, "x", "f").save(arrays)
    found = PartialResult(folder, "x", "f").load()
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype and found[name].flags.writeable


def test_when_the_stage_is_done_nothing_is_left(folder):
    add_up(folder, stop=3)
    storage.write_bytes(folder.file("curve.parquet"), b"")
    partial_sums.remove_all(folder)
    assert folder.names() == {"curve.parquet"}
