"""The folder for FiftyOne, by its layout and, where it is installed, by FiftyOne itself.

PYTHON_WITH_FIFTYONE names a Python that has it; without that ours, if it does. FiftyOne imports
into a database of its own (mongod); where there is none, its importer alone is tried.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.explore.export import coco as export_coco
from pipeline.explore.export import fiftyone as export_fiftyone
from pipeline.runtime.errors import UserError
from pipeline.store.shards import ShardReader
from tests import fake_run, labelled_run

PEER = os.environ.get("PYTHON_WITH_FIFTYONE") or (
    sys.executable if importlib.util.find_spec("fiftyone") else None
)
IMPORT = Path(__file__).with_name("fiftyone_import.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("fiftyone")
    paths = labelled_run.build(root)
    export_fiftyone.run(paths, str(root / "out"), "label")
    return paths, root / "out"


def samples(out: Path) -> dict[str, dict]:
    """By sample_id."""
    found = json.loads((out / "samples.json").read_text())["samples"]
    return {sample["sample_id"]: sample for sample in found}


def test_the_version_less_form(made):
    """Which FiftyOne tells by there being no version in metadata.json."""
    metadata = json.loads((made[1] / "metadata.json").read_text())
    assert "version" not in metadata and metadata["media_type"] == "image"
    assert metadata["info"]["classes"]["cluster"][1] == "green & <b>leafy</b>"


def test_samples_are_the_labels(made):
    paths, out = made
    rows, found = labelled_run.rows(paths), samples(out)
    assert found.keys() == {row["sample_id"] for row in rows}
    for row in rows:
        sample = found[row["sample_id"]]
        assert sample["cluster"]["confidence"] == pytest.approx(row["confidence"])
        assert sample["cluster"]["label"].startswith(row["cluster_caption"])
        for name in export_fiftyone.OURS:
            assert sample[name] == row[name]
        assert sample["original"] == {n: row[n] for n in ("label", "odd", "url")}
        truth = sample.get("ground_truth", {"label": None})
        assert truth["label"] == row["label"]
    assert "ground_truth" not in found[fake_run.UNLABELLED]


def test_pictures_are_the_bytes_in_the_shards(made):
    paths, out = made
    found = samples(out)
    for stem in fake_run.STEMS:
        url = paths.embeddings.manifest()["shards"][int(stem)]["shard"]["url"]
        with Path(url).open("rb") as stream:
            for member in ShardReader(stream, None):
                file = out / found[f"{stem}/{member.id}"]["filepath"]
                assert file.read_bytes() == member.image().data
    there = {str(p.relative_to(out)) for p in (out / "data").rglob("*") if p.is_file()}
    assert there == {sample["filepath"] for sample in found.values()}


def test_coco_names_the_same_pictures(made, tmp_path):
    paths, out = made
    export_coco.run(paths, str(tmp_path / "coco.json"))
    images = json.loads((tmp_path / "coco.json").read_text())["images"]
    assert all((out / "data" / image["file_name"]).is_file() for image in images)


def test_a_label_that_is_no_column_is_refused(made, tmp_path):
    with pytest.raises(UserError, match=r"--label kind is not a json column.*label, odd, url"):
        export_fiftyone.run(made[0], str(tmp_path / "out"), "kind")


def test_stores_that_fiftyone_does_not_read_are_refused(made):
    with pytest.raises(UserError, match="only local folders"):
        export_fiftyone.run(made[0], "memory://out", None)


def test_a_shard_that_changed_is_seen(tmp_path):
    paths = labelled_run.build(tmp_path)
    shard = tmp_path / "input/00001.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(RuntimeError, match=r"00001\.tar changed since it was embedded"):
        export_fiftyone.run(paths, str(tmp_path / "out"), None)
    assert not (tmp_path / "out/manifest.json").exists()


def test_names_and_values_that_a_database_or_json_does_not_take():
    for name in ("", "_id", "a.b", "$where", "a b", "ä", "a\n"):
        assert not export_fiftyone.PLAIN.fullmatch(name)
    row = dict.fromkeys([*export_fiftyone.SOURCE, *export_fiftyone.OURS], 0)
    row |= {"file": "0/1.png", "confidence": 0.5, "width": float("nan"), "n": 7}
    found = export_fiftyone.as_sample(row, "a", ["width"], "n")
    assert found["original"] == {"width": None}
    assert found["ground_truth"]["label"] == "7"
    json.dumps(found, allow_nan=False)


@pytest.mark.skipif(not PEER, reason="neither PYTHON_WITH_FIFTYONE nor fiftyone is there")
def test_fiftyone_imports_it(made, tmp_path):
    """From a copy elsewhere: paths are relative."""
    paths, out = made
    moved = shutil.copytree(out, tmp_path / "moved")
    done = subprocess.run(
        [str(PEER), str(IMPORT), str(moved)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"FIFTYONE_DATABASE_DIR": str(tmp_path / "db")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {sample["sample_id"]: sample for sample in map(json.loads, done.stdout.splitlines())}
    rows = {row["sample_id"]: row for row in labelled_run.rows(paths)}
    assert found.keys() == rows.keys()
    for sample_id, sample in found.items():
        row = rows[sample_id]
        assert Path(sample["filepath"]).is_relative_to(moved)
        assert sample["cluster"] == samples(out)[sample_id]["cluster"]["label"]
        assert sample["confidence"] == pytest.approx(row["confidence"])
        assert sample["truth"] == row["label"]
        assert sample["size"] == [row["image_width"], row["image_height"]]
        assert sample["url"] == row["url"]
