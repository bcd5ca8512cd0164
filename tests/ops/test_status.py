"""Status: what it says of a run is what the run then does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from pipeline.artifacts import layout
from pipeline.cli import main as cli
from pipeline.cli import options
from pipeline.embed import settings as embed_settings
from pipeline.embed import survey
from pipeline.ops import status, text
from pipeline.runtime import config
from pipeline.store import lock, storage
from pipeline.store.listing import list_shards
from pipeline.store.partial_sums import PartialResult
from tests.conftest import BUNDLED, run_arguments

STAGES = ["embed", "train", "select_k", "caption", "write", "evaluate", "report"]


@pytest.fixture
def run(finished_run, tiny_shards, tmp_path) -> Path:
    """A copy of the finished run, to spoil."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def rows(run, capfd, monkeypatch):
    """The rows by stage of `status --json`, which changes nothing."""

    def ask(*arguments: str) -> dict[str, dict]:
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(ray, "init", lambda *_, **__: pytest.fail("started Ray"))
            assert cli.invoke(["status", "--root", str(run), "--json", *arguments]) == 0
        found = json.loads(capfd.readouterr().out)
        assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        return {row["stage"]: row for row in found["stages"]}

    return ask


def settings(shards: Path, run: Path, *sets: str) -> list[str]:
    """What the finished run was given, and `sets` on top."""
    given = run_arguments(shards, run)[5:]
    return ["--shards", str(shards), *given, *(part for s in sets for part in ("--set", s))]


def states(rows: dict[str, dict]) -> dict[str, str]:
    return {stage: row["state"] for stage, row in rows.items()}


def reruns(rows: dict[str, dict]) -> dict[str, str]:
    return {s: row["rerun"] for s, row in rows.items() if row["rerun"] != "nothing"}


@pytest.mark.ray
def test_a_finished_run(rows, run, tiny_shards):
    for arguments in ([], settings(tiny_shards, run)):
        found = rows(*arguments)
        assert states(found) == dict.fromkeys(STAGES, "done") and reruns(found) == {}
        assert (found["embed"]["samples"], found["embed"]["rejected"]) == (123, 3)
        assert [found[s]["done"] for s in STAGES] == [2, 12, 2, None, 2, None, None]
        assert found["write"]["samples"] == 123 and found["embed"]["samples_per_s"] > 0


@pytest.mark.ray
def test_a_changed_setting_is_named_and_what_follows_is_made_again(rows, run, tiny_shards):
    found = rows(*settings(tiny_shards, run, "caption.alt_texts=0"))
    assert states(found)["select_k"] == "done" and states(found)["caption"] == "out of date"
    changed = reruns(found)
    assert list(changed) == ["caption", "write", "evaluate", "report"]
    assert changed["caption"] == "all of it: caption.alt_texts was 20, is 0"
    assert changed["write"] == "all of it: its input has changed"


@pytest.mark.ray
def test_settings_that_embed_refuses(rows, run, tiny_shards):
    found = rows(*settings(tiny_shards, run, "embed.batch_size=7"))
    assert "refused: " in found["embed"]["rerun"] and "was 16, is 7" in found["embed"]["rerun"]
    assert found["write"]["rerun"] == "not reached: embed is refused"
    assert found["write"]["state"] == "done"


@pytest.mark.ray
def test_shards_that_are_new_changed_or_gone(rows, run, tiny_shards, tmp_path, caplog):
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    shutil.copy(folder / "00000.tar", folder / "00002.tar")
    shutil.copystat(tiny_shards / "00000.tar", folder / "00000.tar")
    (folder / "00001.tar").unlink()
    found = rows(*settings(folder, run))
    message = (
        "1 of 2 shards: 1 new, 0 changed, the first 00002; 1 removed, the first 00001: left out"
    )
    assert found["embed"]["rerun"] == message and found["embed"]["state"] == "out of date"
    assert set(states(found).values()) == {"out of date"}
    paths = layout.RunPaths(str(run))
    cfg = embed_settings.Config(batch_size=16)
    shards = list_shards(str(folder))
    done, todo = survey.plan(cfg, shards, paths)
    assert [facts["shard"]["stem"] for facts in done] == ["00000"] and todo == shards[1:]
    assert (
        "1 parts belong to shards that are not in --shards, the first 00001: they stay"
        in caplog.text
    )
    assert (run / "embeddings" / "00001.parquet").exists()
    newer = [replace(list_shards(str(tiny_shards))[0], version="later", size=1)]
    asked = status.StatusQuery(config.load(options.KINDS, None), newer, as_made=True)
    assert "1 of 1 shards: 0 new, 1 changed" in status.collect(asked, paths)[0].rerun


@pytest.mark.ray
def test_an_interrupted_embed_and_what_stands_on_it(rows, run, tiny_shards):
    """The same shards will give the same fingerprint, so what follows stays."""
    (run / "embeddings" / "manifest.json").unlink()
    (run / "embeddings" / "00001.parquet").unlink()
    found = rows("--shards", str(tiny_shards))
    assert reruns(found) == {"embed": "1 of 2 shards: 1 new, 0 changed, the first 00001"}
    assert (found["embed"]["state"], found["embed"]["done"]) == ("partly", 1)
    found = rows()
    assert found["embed"]["rerun"] == "the shards without a part; give --shards to see which"
    assert found["embed"]["done"] == 1 and found["embed"]["total"] is None
    assert found["write"]["state"] == "unknown"


@pytest.mark.ray
@pytest.mark.parametrize("stage, folder", [("select_k", "clusters"), ("caption", "captions")])
def test_sums_of_an_interrupted_stage(rows, run, tiny_shards, stage, folder):
    manifest = run / folder / "manifest.json"
    made_of = json.loads(manifest.read_text())["fingerprint"]
    manifest.unlink()
    place = layout.RunPaths(str(run)).folder(folder)
    PartialResult(place, "counts", "another-2").save({"sum": np.zeros(3)})
    given = settings(tiny_shards, run)
    assert rows(*given)[stage]["state"] == "not begun"
    PartialResult(place, "counts", f"{made_of}-2").save({"sum": np.zeros(3)})
    found = rows(*given)[stage]
    assert (found["state"], found["rerun"]) == ("partly", "from where it was interrupted")


@pytest.mark.ray
def test_interrupted_stages(rows, run, tiny_shards):
    (run / "labels" / "manifest.json").unlink()
    (run / "labels" / "00000.parquet").unlink()
    found = rows()
    assert reruns(found) == {"write": "1 of 2 parts"} and found["write"]["state"] == "partly"
    (run / "labeled" / "00001.tar").unlink()
    assert reruns(rows()) == {"write": "all of it"}
    made_of = json.loads((run / "network" / "manifest.json").read_text())["fingerprint"]
    (run / "network" / "manifest.json").unlink()
    state = {"made_of": f"{made_of}-64", "step": 8}
    (run / "network" / "checkpoint-8.json").write_text(json.dumps(state))
    found = rows(*settings(tiny_shards, run))
    assert found["train"]["rerun"] == "steps 8 to 12" and found["train"]["done"] == 8
    assert found["select_k"]["rerun"] == "nothing"  # training again gives the same fingerprint


@pytest.mark.ray
def test_who_is_at_work_is_seen(run, rows, capfd):
    doing = {"stage": "write", "line": "write: 1/2 shards", "done": 1, "total": 2, "samples": 60}
    doing |= {"rejected": 0, "samples_per_s": 30.0, "left_s": 75}
    with lock.acquire(str(run), lambda: doing, lambda reason: None):
        number, facts = lock.read(str(run))
        storage.write_bytes(lock._url(str(run), number), lock._json({**facts, "doing": doing}))
        found = rows()["write"]
        assert found["state"] == "under way" and (found["done"], found["left_s"]) == (1, 75)
        assert cli.invoke(["status", "--root", str(run)]) == 0
        out = capfd.readouterr().out
        assert "held by " in out and "last heartbeat " in out and "1:15" in out
    assert max(map(len, out.splitlines())) <= text.WIDTH


def test_a_root_with_nothing_in_it(tmp_path, capfd):
    assert cli.invoke(["status", "--root", str(tmp_path / "none")]) == 2
    assert "none: no run is there; give the --root of one" in capfd.readouterr().err
    assert cli.invoke(["status", "--root", str(tmp_path / "none"), "--shards", str(BUNDLED)]) == 0
    out = capfd.readouterr().out
    assert out.count("not begun") == 6 and "lock   free" in out
    assert not (tmp_path / "none").exists()
