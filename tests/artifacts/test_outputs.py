import logging
import platform
from dataclasses import dataclass

import numpy
import pyarrow as pa
import pytest

from pipeline.artifacts import layout, outputs, schemas
from pipeline.runtime.config import setting
from pipeline.runtime.errors import UserError
from pipeline.store import tables

CHAIN = ["embeddings", "network", "clusters", "captions"]


@pytest.fixture
def paths(tmp_path):
    paths = layout.RunPaths(str(tmp_path))
    before = None
    for name in CHAIN:
        paths.folder(name).finish(f"{name}-1", upstream=before)
        before = f"{name}-1"
    return paths


def test_upstream_gives_the_manifests_up_to_the_one_asked_for(paths):
    assert list(outputs.upstream(paths, "clusters")) == CHAIN[:3]
    assert outputs.upstream(paths, "captions")["network"]["fingerprint"] == "network-1"


@pytest.mark.parametrize(("again", "stale"), [(0, "train"), (1, "select-k"), (2, "caption")])
def test_what_stands_on_something_made_again_is_refused(paths, again, stale):
    folder = paths.folder(CHAIN[again])
    folder.finish("new", upstream=folder.manifest()["upstream"])
    with pytest.raises(UserError, match=f"run `ratecluster {stale}` again first"):
        outputs.upstream(paths, "captions")
    assert len(outputs.upstream(paths, CHAIN[again])) == again + 1


def test_label_names_are_unique_and_their_own_where_they_can_be():
    names = schemas.label_names(["url", "caption", "input_caption", "key"])
    assert names == {
        "url": "url",
        "caption": "input_input_caption",
        "input_caption": "input_caption",
        "key": "input_key",
    }
    schema = schemas.labels_schema(dict.fromkeys(names, "str"), 5)
    assert len(set(schema.names)) == len(schema.names)


def test_label_names_differ_in_more_than_capitals():
    """As SQL wants it; the lower-case one of two keeps its name."""
    names = schemas.label_names(["HEIGHT", "height", "SAMPLE_ID", "NSFW", "Nsfw"])
    assert names == {
        "height": "height",
        "HEIGHT": "input_HEIGHT",
        "SAMPLE_ID": "input_SAMPLE_ID",
        "NSFW": "NSFW",
        "Nsfw": "input_Nsfw",
    }
    lower = [n.lower() for n in schemas.labels_schema(dict.fromkeys(names, "str"), 5).names]
    assert len(set(lower)) == len(lower)


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = setting(1, "of something")


def test_finished_says_what_differs(paths, caplog):
    caplog.set_level(logging.INFO)
    assert outputs.ExpectedOutputs("train", paths.labels, "x", Config(), {}).if_done() is None
    assert not caplog.text
    paths.labels.finish("x", config={"size": 1})
    assert outputs.ExpectedOutputs("train", paths.labels, "x", Config(), {}).if_done()[
        "config"
    ] == {"size": 1}
    assert "already done" in caplog.text
    assert outputs.ExpectedOutputs("train", paths.labels, "y", Config(size=2), {}).if_done() is None
    assert "train.size was 1, is 2" in caplog.text
    assert outputs.ExpectedOutputs("train", paths.labels, "y", Config(), {}).if_done() is None
    assert "its input has changed" in caplog.text
    missing = {paths.labels: ["00000.parquet"]}
    assert outputs.ExpectedOutputs("train", paths.labels, "x", Config(), missing).if_done() is None
    assert "1 files are missing" in caplog.text and "labels/00000.parquet" in caplog.text


def test_part_facts_are_of_the_parts_that_are_there(paths):
    table = pa.table({"a": [1]})
    tables.write(paths.labels.file("x.parquet"), table, rows=1)
    assert outputs.part_facts(paths.labels, ["x", "y"]) == {"x": {"rows": 1}}


def test_versions_name_python_and_the_libraries_that_are_installed():
    found = outputs.versions()
    assert found["python"] == platform.python_version() and found["numpy"] == numpy.__version__
    assert {"ratecluster", "ray", "torch"} <= found.keys()
