"""The lock: one owner on each store, from the other threads' and processes' side as well."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.runtime.errors import UserError
from pipeline.store import lock, retry, storage
from tests.store import test_storage

slow_s3, s3, root = test_storage.slow_s3, test_storage.s3, test_storage.root  # the same stores


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lock, "STALE_S", 1.0)


def files(root: str) -> list[str]:
    return [name for name in test_storage.everything(root) if name.endswith(".json")]


def elsewhere(root: str, number: int = 1, **more) -> dict:
    """Write the file of an owner on another machine."""
    facts = {**lock._process(), "owner": f"other{number}", "host": "far", "machine": "m", **more}
    storage.write_bytes(lock._url(root, number), lock._json(facts))
    return facts


def held(root: str, lost=lambda reason: None, doing=lambda: None):
    return lock.acquire(root, doing, lost)


def until(condition) -> None:
    end = time.monotonic() + 300  # it hangs
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_names_its_owner_and_leaves_nothing(root, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(
        sys,
        "argv",
        ["/bin/ratecluster", "embed", "s3://k:s3cret@b/x", "https://h/x.tar?sig=s3cret"],
    )
    with held(root, doing=lambda: {"line": "embed: 3/4 shards"}):
        until(lambda: lock.read(root)[1]["beat"] > 2)
        number, facts = lock.read(root)
        assert (number, facts["pid"]) == (1, os.getpid()) and lock.lives(facts)
        assert facts["command"] == "ratecluster embed s3://…@b/x https://h/x.tar?sig=…"
        assert lock.describe(facts).endswith(", embed: 3/4 shards")
    assert lock.read(root) == (0, {"released": True})
    assert files(root) == [] and sorted(tmp_path.rglob("*")) == before


def test_a_second_driver_of_this_machine_is_refused_at_once(root):
    with (
        held(root),
        pytest.raises(UserError, match=rf"in use by .*process {os.getpid()}, .*--root"),
    ):
        lock._take(root)
    with held(root):
        assert lock.read(root)[0] == 1


def test_of_many_at_once_one_gets_it(root):
    barrier = threading.Barrier(8)

    def work(_: int) -> bool:
        barrier.wait(10)
        try:
            lock._take(root)
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 1
    assert files(root) == ["00000001.json"]


@pytest.fixture
def ended():
    """Facts of a process of this machine that is dead, and its parent has not looked."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    born = lock._born(child.pid)
    child.send_signal(signal.SIGKILL)
    until(lambda: not lock._born(child.pid))
    yield {**lock._process(), "owner": "dead", "pid": child.pid, "born": born}
    child.wait()


def test_a_dead_process_is_taken_over_at_once(root, ended, monkeypatch, caplog):
    monkeypatch.setattr(lock, "_changes", lambda *_: pytest.fail("waited"))
    storage.write_bytes(lock._url(root, 1), lock._json(ended))
    with held(root):
        assert lock.read(root)[0] == 2 and "whose process has ended" in caplog.text
    assert files(root) == []


def test_a_pid_that_another_process_has_now_is_dead(root):
    facts = {**lock._process(), "born": "1"}
    assert lock.lives(facts) is False
    assert lock.lives({**facts, "machine": "another boot"}) is None


def test_an_owner_elsewhere_that_beats_is_refused(root, caplog):
    caplog.set_level(logging.WARNING)
    facts, over = elsewhere(root), threading.Event()

    def beat() -> None:
        while not over.wait(0.2):
            elsewhere(root, beat=(beats := facts["beat"] + 1))
            facts["beat"] = beats

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match=r"in use by .* on far"):
        lock._take(root)
    over.set()
    thread.join()
    assert "waiting up to 1 s for its next heartbeat" in caplog.text


def test_a_silent_owner_elsewhere_is_taken_over_by_one(root):
    elsewhere(root)
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(lock._take, root) for _ in range(4)]
    refused = [one.exception() for one in found if one.exception()]
    assert len(refused) == 3 and all(isinstance(error, UserError) for error in refused)
    assert lock.read(root)[0] == 2


@pytest.mark.parametrize("content", [b"", b'{"owner": "ha', b"[1]"])
def test_a_file_that_was_never_finished_is_taken_over(root, content):
    storage.write_bytes(lock._url(root, 4), content)
    with held(root):
        assert lock.read(root)[0] == 5


def test_one_who_was_taken_over_is_told_even_after_the_taker_has_ended(root):
    lost: list[str] = []
    with held(root, lost.append):
        elsewhere(root, 2)
        until(lambda: lost)
    assert "taken over by" in lost[0] and "on far" in lost[0]
    assert lock.read(root)[1]["owner"] == "other2"  # not ours to remove

    with held(root):  # takes over from the silent `other2`
        assert lock.read(root)[0] == 3
    assert files(root) == ["00000003.json"] and lock.read(root) == (3, {"released": True})
    lost.clear()
    owner = lock.Owner(root, 2, {**elsewhere(root, 2)}, False, [])  # it wakes, and writes its file
    assert "taken over by a driver that has just ended" in owner.beat(None)
    with held(root):
        assert lock.read(root)[0] == 4
    assert files(root) == ["00000004.json"]


def test_a_lock_that_is_removed_by_hand_stops_its_owner(root):
    lost: list[str] = []
    with held(root, lost.append):
        until(lambda: lock.read(root)[0])
        # Again where a heartbeat that had looked before was written after.
        until(lambda: lost or storage.Folder(f"{root}/.lock").clear())
    assert "was removed" in lost[0]


def test_heartbeats_go_on_when_the_store_is_back(root, monkeypatch, caplog):
    write, lost, down = lock.write_bytes, [], threading.Event()

    def flaky(url: str, data: bytes) -> None:
        if down.is_set():
            raise OSError("the store is down")
        write(url, data)

    monkeypatch.setattr(lock, "write_bytes", flaky)
    with held(root, lost.append):
        down.set()
        until(lambda: "cannot write a heartbeat, retrying: the store is down" in caplog.text)
        beat = lock.read(root)[1]["beat"]
        down.clear()
        until(lambda: lock.read(root)[1]["beat"] > beat + 1)
    assert not lost and caplog.text.count("cannot write a heartbeat") == 1


def test_an_answer_that_was_lost_is_no_refusal(s3, tmp_path, monkeypatch):
    """The store made the file, the client got no answer, and tried again: now the file exists."""
    root = f"{s3}/{tmp_path.name}"
    fs, _ = storage.locate(root)
    pipe = fs.pipe_file

    def twice(path, data, mode):
        pipe(path, data, mode=mode)
        pipe(path, data, mode=mode)

    monkeypatch.setattr(fs, "pipe_file", twice)
    with held(root):
        assert lock.read(root)[0] == 1


def test_a_store_without_create_if_absent_says_so(s3, tmp_path, monkeypatch, caplog):
    root = f"{s3}/{tmp_path.name}"
    fs, _ = storage.locate(root)

    def refuse(path, data, mode):
        raise OSError(38, "A header you provided implies functionality that is not implemented")

    monkeypatch.setattr(fs, "pipe_file", refuse)
    monkeypatch.setattr(retry.time, "sleep", lambda s: None)
    lost: list[str] = []
    with held(root, lost.append):
        assert "this store has no exclusive create" in caplog.text
        elsewhere(root, 1)  # the other one of the two
        until(lambda: lost)


def test_the_file_is_json_that_a_person_can_read(tmp_path):
    with held(str(tmp_path)):
        text = (tmp_path / ".lock" / "00000001.json").read_text()
    assert {"host", "pid", "user", "command", "since", "doing"} <= json.loads(text).keys()
