"""A shard that ends its workers is quarantined; the others are embedded; it can be tried again."""

import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.artifacts import layout
from pipeline.embed import stage as embed
from pipeline.embed.attempts import Attempts, Turns
from pipeline.embed.settings import Config
from pipeline.embed.worker import Embedder
from pipeline.store import tables
from pipeline.store.listing import list_shards
from pipeline.store.storage import Folder
from tests.conftest import TINY

CFG = Config(batch_size=16)


class Poisoned(Embedder):
    """Its process ends at one of the shards."""

    def _embed(self, shard):
        if shard.stem == "00001":
            with Path(shard.url).with_name("deaths").open("a") as log:
                log.write("x")
            os._exit(1)
        return super()._embed(shard)


@pytest.mark.ray
def test_a_shard_that_kills_its_workers_is_quarantined_and_tried_again_when_asked(
    ray_session, tiny_shards, tmp_path, monkeypatch
):
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    shutil.copy(folder / "00000.tar", folder / "00002.tar")
    shards, paths = list_shards(str(folder)), layout.RunPaths(str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(embed, "Embedder", Poisoned)
        made = embed.run(replace(CFG, max_reject_fraction=0.9), paths, shards)
    assert (folder / "deaths").read_text() == "xxx"
    assert (made["samples"], made["embedded"]) == (3 * TINY + 3, 2 * TINY)
    assert made["reasons"] == {"quarantined": TINY + 2, "missing_image": 1}
    rejects = tables.read(paths.rejects.file("00001.parquet")).to_pylist()
    assert rejects[0]["reason"] == "quarantined: it ended 3 workers"
    assert rejects[0]["sample_id"].startswith("00001/") and rejects[0]["json"]
    assert not paths.attempts.names()
    again = embed.run(replace(CFG, retry_quarantined=True), paths, shards)
    assert (again["embedded"], again["rejected"]) == (3 * TINY, 3)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "embeddings").iterdir()}
    embed.run(replace(CFG, retry_quarantined=True), paths, shards)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "embeddings").iterdir()}
    assert after == before


def test_only_deaths_of_the_same_command_count(tmp_path):
    folder = Folder(str(tmp_path / "marks"))
    first, second = Attempts(folder, "a"), Attempts(folder, "b")
    assert first.deaths("0") == 0
    with first.attempt("0", 1):
        assert first.deaths("0") == 2 and second.deaths("0") == 0
    assert first.deaths("0") == 0
    with pytest.raises(ValueError, match="an error"), first.attempt("0", 0):
        raise ValueError("an error")
    assert not folder.names()


def test_one_alone_waits_for_all_and_all_wait_for_it():
    turns, events = Turns(), list[str]()

    def alone() -> None:
        with turns.turn(alone=True):
            events.append("alone")

    def together() -> None:
        with turns.turn(alone=False):
            events.append("together")

    with turns.turn(alone=False), turns.turn(alone=False):
        thread = threading.Thread(target=alone)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and events == []
    thread.join(10)
    with turns.turn(alone=True):
        others = [threading.Thread(target=together) for _ in range(2)]
        for other in others:
            other.start()
        others[0].join(0.2)
        assert events == ["alone"]
    for other in others:
        other.join(10)
    assert events == ["alone", "together", "together"]
