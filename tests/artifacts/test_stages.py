"""The order of the stages, their folders and files are written once: a new entry is enough."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.artifacts import layout, outputs, stages
from pipeline.cli import main as cli
from pipeline.cli import options
from pipeline.ops.verify import stage as verify
from pipeline.runtime import config
from pipeline.runtime.config import setting
from pipeline.store import storage
from tests.conftest import run_arguments

pytestmark = pytest.mark.ray


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a stage that counts the labels."""

    unit: str = setting("labels", "what is counted")


def expected(cfg, made, paths):
    made_of = config.fingerprint(cfg, made["labels"]["fingerprint"])
    folder = paths.folder("counts")
    return outputs.ExpectedOutputs("count", folder, made_of, cfg, {folder: ["count.json"]})


def run(cfg, paths):
    made = outputs.upstream(paths, "labels")
    want = expected(cfg, made, paths)
    if manifest := want.if_done():
        return manifest
    text = json.dumps({cfg.unit: made["labels"]["labels"]})
    storage.write_bytes(want.folder.file("count.json"), text.encode())
    upstream = made["labels"]["fingerprint"]
    want.folder.finish(want.made_of, upstream=upstream, config=config.facts(cfg), seconds=0.1)
    return want.folder.manifest()


@pytest.fixture
def with_another_stage(monkeypatch):
    """The table with one entry more, after write."""
    package = {"settings": {"Config": Config, "expected": expected}, "stage": {"run": run}}
    for name, members in package.items():
        module = ModuleType(f"counting.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "counting", ModuleType("counting"))
    count = stages.Stage(
        name="count",
        package="counting",
        folder="counts",
        files=("count.json",),
        facts=("upstream", "config"),
    )
    after = [stage.name for stage in stages.STAGES].index("write") + 1
    stages.STAGES = (*stages.STAGES[:after], count, *stages.STAGES[after:])
    yield
    stages.STAGES = tuple(stage for stage in stages.STAGES if stage is not count)


def test_a_stage_in_the_table_is_seen_by_run_status_and_verify(
    with_another_stage, finished_run, tiny_shards, tmp_path, capfd, monkeypatch
):
    monkeypatch.setitem(options.SETTINGS, "count", "counting.settings")
    root = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (root / "report" / "manifest.json").unlink()  # so that run.json is written again
    assert cli.invoke(run_arguments(tiny_shards, root)) == 0
    paths = layout.RunPaths(str(root))
    assert json.loads((root / "counts" / "count.json").read_text()) == {"labels": 123}
    capfd.readouterr()
    assert cli.invoke(["status", "--root", str(root), "--json"]) == 0
    rows = {row["stage"]: row["state"] for row in json.loads(capfd.readouterr().out)["stages"]}
    assert list(rows) == [
        *("embed", "train", "select_k", "caption", "write", "count", "evaluate", "report")
    ]
    assert set(rows.values()) == {"done"}
    assert verify.run(paths).count == 0
    (root / "counts" / "count.json").unlink()
    assert verify.run(paths).lines == ["counts: count.json: is missing"]
