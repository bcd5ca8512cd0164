"""A folder as img2dataset writes it is input as it stands.

tests/img2dataset was written by img2dataset itself: tools/make_img2dataset_fixture.py.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import layout, schemas
from pipeline.embed import encode_shard
from pipeline.embed import settings as embed_settings
from pipeline.store import columns, tables
from pipeline.store.listing import list_shards
from pipeline.vision import clip
from pipeline.write import stage as write
from tests import level_tables

FOLDER = Path(__file__).with_name("img2dataset")


@pytest.fixture(scope="module")
def downloads() -> dict[str, dict]:
    """img2dataset's own rows, of failed downloads too, by key."""
    files = sorted(FOLDER.glob("*.parquet"))
    return {row["key"]: row for f in files for row in pq.read_table(f).to_pylist()}


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> list[dict]:
    """The rows of labels, of the folder embedded and put into one cluster."""
    paths = layout.RunPaths(str(tmp_path_factory.mktemp("img2dataset")))
    cfg, kinds, shards = embed_settings.Config(batch_size=4), {}, list_shards(str(FOLDER))
    encoder = clip.load("pico-clip", "", threads=1)
    with ThreadPoolExecutor(1) as thread:
        for shard in shards:
            facts = encode_shard.embed_shard(
                shard, [encoder], thread, cfg, paths, encode_shard.decode
            )
            columns.merge(kinds, facts["columns"])
            rows = tables.read(paths.embeddings.file(f"{shard.stem}.parquet"), ["sample_id"])
            assigned = [
                {**row, "cluster_id": 0, "group": 0, "confidence": 1.0} for row in rows.to_pylist()
            ]
            table = pa.Table.from_pylist(assigned, schema=schemas.ASSIGNMENTS)
            tables.write(paths.assignments.file(f"{shard.stem}.parquet"), table)
    named = (level_tables.one(1), [["emoji"]])
    job = write.WriteJob(paths, kinds, *named, False, "", cfg.max_sample_bytes)
    return [row for shard in shards for row in write.label_rows(shard.stem, job).to_pylist()]


def test_the_tars_are_taken_and_the_other_files_left():
    names = {path.name for path in FOLDER.iterdir()}
    assert {"00000.tar", "00000.parquet", "00000_stats.json"} <= names
    assert [shard.stem for shard in list_shards(str(FOLDER))] == ["00000", "00001"]


def test_every_download_that_succeeded_is_a_row(labels, downloads):
    stats = [json.loads(f.read_text()) for f in sorted(FOLDER.glob("*_stats.json"))]
    assert len(labels) == sum(s["successes"] for s in stats) == 8
    assert len(downloads) == sum(s["count"] for s in stats) == 10
    good = {key for key, row in downloads.items() if row["status"] == "success"}
    assert {row["key"] for row in labels} == good
    assert {row["sample_id"] for row in labels} == {f"{key[:5]}/{key}" for key in good}


def test_every_column_of_its_parquet_is_a_column_of_ours(labels, downloads):
    """Under its own name, or `input_…` where that is one of ours."""
    ours = {"key", "status", "error_message", "caption"}
    for row in labels:
        for name, value in downloads[row["key"]].items():
            assert row[f"input_{name}" if name in ours else name] == value


def test_what_both_say_is_the_same(labels, downloads):
    for row in labels:
        download = downloads[row["key"]]
        assert row["status"] == download["status"] == "success"
        assert row["error_message"] is None and download["error_message"] is None
        assert row["caption"] == (download["caption"] or "")  # its .txt is empty, not missing
        assert (row["image_width"], row["image_height"]) == (download["width"], download["height"])


def test_columns_are_of_the_types_of_its_parquet(labels):
    row = labels[0]
    expected = {"url": str, "width": int, "original_width": int, "sha256": str, "NSFW": str}
    expected |= {"similarity": float, "exif": str}
    assert {name: type(row[name]) for name in expected} == expected
