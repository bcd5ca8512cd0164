"""Writing: a label for every sample, and shards of which nothing but the label is new."""

import io
import json
import math
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipeline.artifacts import layout, schemas
from pipeline.store import tables
from pipeline.store.samples import Sample
from pipeline.write import settings as write_settings
from pipeline.write import stage as write
from tests import level_tables, small_run

KINDS = {
    "big": "float", "caption": "str", "cluster_id": "int", "key": "str", "label": "str",
    "note": "null", "odd": "json", "ratecluster": "json", "status": "str", "url": "str",
    "width": "float",
}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    return small_run.build(tmp_path, small_run.axis)


@pytest.fixture
def paths(root):
    return layout.RunPaths(str(root))


def job_of(paths, shards=True) -> write.WriteJob:
    kinds = paths.embeddings.manifest()["columns"]
    named = (level_tables.one(3), [list(small_run.THINGS)])
    return write.WriteJob(paths, kinds, *named, shards, "made-of", 1000)


def shards_of(paths) -> list[dict]:
    return [fact["shard"] for fact in paths.embeddings.manifest()["shards"]]


def outputs(root) -> dict[str, bytes]:
    """What users read, but for the times."""
    folders = [*(root / "labels").glob("*.parquet"), *(root / "labeled").glob("*.tar")]
    return {path.name: path.read_bytes() for path in (*folders, root / "clusters.parquet")}


# ---- label_rows


def test_every_sample_has_a_label_in_the_order_of_the_tar(paths):
    rows = write.label_rows("00000", job_of(paths)).to_pylist()
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    keys = ["d0/000", "d0/001", "d0/002", "d0/003\\xe9", "d0/004"]
    assert [row["key"] for row in rows] == keys
    assert [row["sample_id"] for row in rows] == [f"00000/{key}" for key in keys]
    assert [row["status"] for row in rows] == ["success"] * 2 + ["rejected"] + ["success"] * 2
    assert [row["error_message"] for row in rows] == [
        None,
        None,
        "missing_image: only txt",
        None,
        None,
    ]
    assert [row["cluster_id"] for row in rows] == [0, 1, None, 0, 2]
    assert [row["cluster_caption"] for row in rows] == ["dog", "car", None, "dog", "pizza"]
    assert rows[1]["confidence"] == 0.75 and rows[1]["top_clusters"] == [0, 1, 2]
    assert rows[2]["confidence"] is rows[2]["top_shares"] is rows[2]["image_member"] is None
    assert rows[4]["image_member"] == "d0/004.seg.jpg"


def test_the_caption_is_the_text_or_else_the_jsons(paths):
    rows = write.label_rows("00000", job_of(paths)).to_pylist()
    texts = ["json says", "a red car", "no picture", "ein großer Hund", None]
    assert [row["caption"] for row in rows] == texts
    assert rows[0]["input_caption"] == "json says"


def test_json_columns_keep_their_names_and_conflicts_are_text(paths):
    assert paths.embeddings.manifest()["columns"] == KINDS
    rows = write.label_rows("00001", job_of(paths)).to_pylist()
    assert [row["odd"] for row in rows] == ["1", '[1, {"a": "é"}]', '"text"', None]
    assert [row["width"] for row in rows] == [None, None, 7.0, None]
    assert [row["url"] for row in rows] == [None, None, None, "u8"]
    assert rows[1]["big"] == 100.0 and math.isnan(rows[3]["big"])
    assert [row["note"] for row in rows] == [None] * 4
    assert [json.loads(row["ratecluster"] or "0") for row in rows] == [0, 0, {"cluster_id": 5}, 0]


def test_json_columns_with_names_of_ours_are_renamed(paths):
    rows = write.label_rows("00001", job_of(paths)).to_pylist()
    assert (rows[0]["cluster_id"], rows[0]["input_cluster_id"]) == (1, 77)
    assert (rows[1]["status"], rows[1]["input_status"]) == ("success", "x")
    first = write.label_rows("00000", job_of(paths)).to_pylist()
    assert (first[0]["key"], first[0]["input_key"]) == ("d0/000", "own")


def test_all_parts_have_one_schema(paths):
    found_schemas = [write.label_rows(stem, job_of(paths)).schema for stem in ("00000", "00001")]
    assert found_schemas[0].equals(found_schemas[1])
    assert found_schemas[0].names == schemas.labels_schema(KINDS, 1).names
    assert len(set(found_schemas[0].names)) == len(found_schemas[0].names)


def test_embeddings_and_assignments_of_other_samples_are_refused(paths):
    url = paths.assignments.file("00000.parquet")
    tables.write(url, tables.read(url).slice(1))
    with pytest.raises(RuntimeError, match=r"00000: .*different samples"):
        write.label_rows("00000", job_of(paths))


# ---- relabel


def relabelled(paths, stem="00000") -> tuple[list[Sample], bytes, list[dict]]:
    labels = write.label_rows(stem, job_of(paths)).to_pylist()
    out = io.BytesIO()
    shard = next(shard for shard in shards_of(paths) if shard["stem"] == stem)
    assert write.relabel(shard, out, labels, 1000) == len(labels)
    return small_run.read(small_run.Path(shard["url"])), out.getvalue(), labels


@pytest.mark.parametrize("stem", ["00000", "00001"])
def test_nothing_changes_but_one_key_of_the_json(paths, tmp_path, stem):
    before, data, labels = relabelled(paths, stem)
    (tmp_path / "out.tar").write_bytes(data)
    after = small_run.read(tmp_path / "out.tar")
    assert [s.key for s in after] == [s.key for s in before]
    for old, new, label in zip(before, after, labels, strict=True):
        others = [(m.tar_name, m.data) for m in new.members if not m.suffix.endswith("json")]
        assert others == [
            (m.tar_name, m.data) for m in old.members if not m.suffix.endswith("json")
        ]
        parsed = {m.suffix: m.data for m in new.members}
        facts = json.loads(parsed.get("ratecluster.json", parsed["json"]))
        given = facts.pop("ratecluster")
        was = next((small_run.originals(m.data) for m in old.members if m.suffix == "json"), {})
        was.pop("ratecluster", None)
        assert repr(facts) == repr(was)
        expected = {n: label[n] for n in schemas.IN_JSON if label[n] is not None}
        assert given == expected and given["status"] == label["status"]


def test_a_json_that_is_no_object_stays_byte_for_byte(paths, tmp_path):
    _, data, _ = relabelled(paths)
    (tmp_path / "out.tar").write_bytes(data)
    members = {m.suffix: m.data for m in small_run.read(tmp_path / "out.tar")[3].members}
    assert members["json"] == b"[not an object"
    assert json.loads(members["ratecluster.json"])["ratecluster"]["cluster_caption"] == "dog"


def test_the_bytes_are_the_same_every_time(paths):
    assert relabelled(paths)[1] == relabelled(paths)[1]


def test_webdataset_reads_labelled_shards(paths, tmp_path):
    _, data, labels = relabelled(paths, "00001")
    (tmp_path / "out.tar").write_bytes(data)
    theirs = list(webdataset.WebDataset(str(tmp_path / "out.tar"), shardshuffle=False).decode())
    keys = [os.fsencode(sample["__key__"]).decode("utf-8", "backslashreplace") for sample in theirs]
    assert keys == [label["key"] for label in labels]
    found = [sample["json"]["ratecluster"].get("cluster_caption") for sample in theirs]
    assert found == ["car", "pizza", None, "dog"]


@pytest.mark.parametrize("change", [lambda rows: rows[:-1], lambda rows: [*rows, rows[0]]])
def test_more_or_fewer_labels_than_samples_are_refused(paths, change):
    labels = change(write.label_rows("00000", job_of(paths)).to_pylist())
    with pytest.raises(RuntimeError, match=r"sample [45] is .*the shard changed"):
        write.relabel(shards_of(paths)[0], io.BytesIO(), labels, 1000)


def test_labels_of_other_samples_are_refused(paths):
    labels = write.label_rows("00000", job_of(paths)).to_pylist()
    labels[1], labels[2] = labels[2], labels[1]
    with pytest.raises(RuntimeError, match=r"sample 1 is 00000/d0/001, .*of 00000/d0/002"):
        write.relabel(shards_of(paths)[0], io.BytesIO(), labels, 1000)


# ---- clusters


def test_the_table_of_clusters(paths):
    rows = write.cluster_rows(paths).to_pylist()
    assert [row["size"] for row in rows] == [3, 2, 2]
    assert [row["cluster_caption"] for row in rows] == ["dog", "car", "pizza"]
    assert rows[0]["captions"] == ["dog", "two dogs"] and rows[0]["bits_per_sample"] == 10.0
    assert sorted(rows[0]["nearest_clusters"]) == [1, 2]
    assert rows[1]["typical_samples"] == ["00000/d0/001", "00001/d1/000"]


# ---- run


@pytest.fixture
def finished(root, paths, ray_session):
    write.run(write_settings.Config(), paths)
    return outputs(root)


@pytest.mark.ray
def test_a_run_writes_everything(root, paths, finished):
    names = {f"0000{i}.{end}" for i in (0, 1) for end in ("parquet", "tar")}
    assert set(finished) == names | {"clusters.parquet"}
    manifest = paths.labels.manifest()
    assert (manifest["labels"], manifest["clusters"]) == (9, 3)
    for i, count in enumerate((5, 4)):
        assert pq.read_table(root / "labels" / f"0000{i}.parquet").num_rows == count
    facts = json.loads((root / "run.json").read_text())
    assert list(facts["stages"]) == ["caption", "embed", "select_k", "train", "write"]
    assert "ray" in facts["versions"] and "shards" not in facts["stages"]["embed"]


@pytest.mark.ray
def test_run_again_does_nothing(root, paths, finished, monkeypatch):
    monkeypatch.setattr(write.tasks, "results", None)
    manifest = paths.labels.manifest()
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert write.run(write_settings.Config(), paths) == manifest
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.mark.ray
def test_an_interrupted_run_makes_what_is_missing_and_the_same_bytes(root, paths, finished):
    paths.labels.remove({"manifest.json", "00001.parquet"})
    (root / "clusters.parquet").unlink()
    kept = [root / "labels" / "00000.parquet", root / "labeled" / "00000.tar"]
    times = [path.stat().st_mtime_ns for path in kept]
    write.run(write_settings.Config(), paths)
    assert outputs(root) == finished
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert paths.labels.peek() is not None


@pytest.mark.ray
def test_other_captions_make_everything_again(root, paths, finished):
    paths.captions.finish("w2", upstream="c1", captions=["hound", "car", "pizza"])
    write.run(write_settings.Config(), paths)
    rows = pq.read_table(root / "labels" / "00000.parquet").to_pylist()
    assert [row["cluster_caption"] for row in rows] == ["hound", "car", None, "hound", "pizza"]
    assert outputs(root)["00000.tar"] != finished["00000.tar"]


@pytest.mark.ray
def test_files_of_a_user_stay(root, paths, finished):
    own = [
        root / "labels" / "notes.txt",
        root / "labels" / "mine.parquet",
        root / "labeled" / "x.tar",
    ]
    for path in own[:1] + own[2:]:
        path.write_text("mine")
    pq.write_table(pa.table({"a": [1]}), own[1])
    paths.captions.finish("w2", upstream="c1", captions=["hound", "car", "pizza"])
    write.run(write_settings.Config(), paths)
    assert all(path.exists() for path in own)
    assert outputs(root)["00000.tar"] != finished["00000.tar"]


@pytest.mark.ray
def test_without_shards(root, paths, finished):
    write.run(write_settings.Config(shards=False), paths)
    assert list((root / "labeled").glob("*")) == []
    rows = pq.read_table(root / "labels" / "00000.parquet").to_pylist()
    assert rows == pq.read_table(io.BytesIO(finished["00000.parquet"])).to_pylist()


@pytest.mark.ray
def test_counts_that_do_not_add_up_are_refused(root, paths, ray_session):
    url = paths.rejects.file("00000.parquet")
    tables.write(url, tables.read(url).slice(1))
    with pytest.raises(RuntimeError, match=r"00000: labels are .*'rows': 4.*'rows': 5"):
        write.run(write_settings.Config(shards=False), paths)
    assert paths.labels.peek() is None


@pytest.mark.ray
def test_a_shard_that_changed_since_fails_and_leaves_no_half(root, paths, ray_session):
    small_run.write_shard(root.parent / "input" / "00001.tar", 1, small_run.SECOND[:-1])
    with pytest.raises(RuntimeError, match="the shard changed since it was embedded"):
        write.run(write_settings.Config(), paths)
    assert paths.labels.peek() is None and not (root / "labeled" / "00001.tar").exists()
    assert not any(path.name.startswith(".") for path in (root / "labeled").iterdir())
