"""One file to one part: rows, kept columns, rejects and facts; without Ray."""

import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import layout, schemas
from pipeline.embed.given import columns, parts, sources
from pipeline.embed.given.settings import Config
from pipeline.store import retry, tables
from pipeline.store.listing import list_shards
from pipeline.store.shards import ShardReader
from tests.given_vectors import rows, write_clip_retrieval, write_parquet

NAN = float("nan")


def import_all(files, root: Path, cfg: Config = Config()) -> tuple[list[dict], layout.RunPaths]:  # noqa: B008
    paths = layout.RunPaths(str(root))
    wanted = columns.choose(cfg, [sources.file_of(file) for file in files])
    found = [parts.import_part(vars(file), wanted, cfg, paths) for file in files]
    assert not any(one["error"] for one in found), found
    return [json.loads(one["facts"]) for one in found], paths


def import_table(tmp_path: Path, table: pa.Table, **settings):
    """The facts, the part and the rejects of one table."""
    pq.write_table(table, tmp_path / "one.parquet")
    files = sources.list_embeddings(f"{tmp_path}/one.parquet")
    (facts,), paths = import_all(files, tmp_path / "run", Config(**settings))
    part, rejects = (tables.read(f.file("one.parquet")) for f in (paths.embeddings, paths.rejects))
    return facts, part, rejects.to_pylist()


def test_a_part_is_as_embed_writes_it(tmp_path):
    folder = write_parquet(tmp_path / "v", n=3000, files=1)
    cfg = Config(columns=("clip", "dino"))
    (facts,), paths = import_all(sources.list_embeddings(str(folder)), tmp_path / "run", cfg)
    url = paths.embeddings.file("00000.parquet")
    part = tables.read(url)
    assert part.schema.equals(schemas.embeddings_schema(32, 16))
    groups = pq.ParquetFile(url).metadata
    sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
    assert sizes == [1024, 1024, 952]  # though it came in blocks
    x, own = rows(3000, 0, "0-")
    first, second = (tables.to_matrix(part[name]) for name in ("embedding", "embedding_2"))
    assert np.allclose(first, x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-3)
    assert np.allclose(np.linalg.norm(second.astype(float), axis=1), 1, atol=1e-3)
    assert part["key"].to_pylist() == own["key"].to_pylist()
    assert part["caption"].to_pylist() == own["caption"].to_pylist()
    last = part.slice(2999).to_pylist()[0]
    assert (last["sample_id"], last["index"]) == ("00000/0-2999", 2999)
    assert last["tar_offset"] is None and json.loads(last["json"])["width"] == 2999
    assert tables.facts(url) == facts
    assert facts["columns"] == {"label": "str", "width": "int"} and facts["end"] == "complete"
    encoders = [(e["column"], e["model"], e["dim"], e["precision"]) for e in facts["encoders"]]
    assert encoders == [
        ("embedding", "clip", 32, "float32"),
        ("embedding_2", "dino", 16, "float64"),
    ]


def test_the_bytes_depend_on_the_file_alone(tmp_path):
    files = sources.list_embeddings(str(write_parquet(tmp_path / "v", n=2000, leave_out=("dino",))))
    runs = [import_all(files, tmp_path / name)[1] for name in ("one", "two")]
    for folder in ("embeddings", "rejects"):
        one, two = (Path(paths.folder(folder).file("00001.parquet")) for paths in runs)
        assert one.read_bytes() == two.read_bytes()


def test_every_kind_of_bad_row_is_a_reject_with_its_reason(tmp_path):
    vectors = [[1, 0], None, [1], [NAN, 1], [0, 0], [0, 1], [0, 1], [1, 1], [2, 0], [0, 3]]
    ids = ["a", "b", "c", "d", "e", "a", None, "", "a", "f"]
    second = [[1.0]] * 9 + [[NAN]]
    table = pa.table({"id": ids, "v": pa.array(vectors, pa.list_(pa.float32())), "w": second})
    facts, part, rejects = import_table(tmp_path, table, columns=("v", "w"))
    assert part["sample_id"].to_pylist() == ["one/a"]
    assert [(row["sample_id"], row["index"], row["reason"]) for row in rejects] == [
        ("one/b", 1, "missing_embedding: v is null"),
        ("one/c", 2, "wrong_dimension: v has 1, not 2"),
        ("one/d", 3, "embedding_not_finite: v"),
        ("one/e", 4, "zero_vector: v"),
        ("one/a#2", 5, "duplicate_key"),
        ("one/", 6, "missing_id"),
        ("one/#2", 7, "missing_id"),
        ("one/a#3", 8, "duplicate_key"),
        ("one/f", 9, "embedding_not_finite: w"),
    ]
    assert (facts["samples"], facts["embedded"], facts["rejected"]) == (10, 1, 9)
    assert facts["reasons"] == {
        "missing_embedding": 1, "wrong_dimension": 1, "embedding_not_finite": 2,
        "zero_vector": 1, "duplicate_key": 2, "missing_id": 2,
    }  # fmt: skip


def test_ids_that_look_like_repeated_ones_stay_unique(tmp_path):
    table = pa.table({"id": ["a", "a", "a#2", "a#2"], "v": [[1.0]] * 4})
    _, part, rejects = import_table(tmp_path, table)
    ids = [*part["sample_id"].to_pylist(), *(row["sample_id"] for row in rejects)]
    assert len(set(ids)) == 4 and part["key"].to_pylist() == ["a", "a#2"]


@pytest.mark.parametrize(
    ("ids", "keys"),
    [
        (pa.array([7, 2**60], pa.int64()), ["7", str(2**60)]),
        (pa.array([7.0, NAN, 0.5]), ["7", "0.5"]),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (pa.array(["é"], pa.large_string()), ["é"]),
    ],
)
def test_ids_of_every_type(tmp_path, ids, keys):
    table = pa.table({"id": ids, "v": [[1.0]] * len(ids)})
    assert import_table(tmp_path, table)[1]["key"].to_pylist() == keys


def test_columns_of_one_value_are_kept_as_json(tmp_path):
    bad = pa.array([b"caf\xe9", b"b"], pa.binary())
    text = pa.StringArray.from_buffers(2, bad.buffers()[1], bad.buffers()[2])
    table = pa.table(
        {
            "id": ["a", "b"], "v": [[1.0], [2.0]], "other": [[1.0], [2.0]], "list": [["x"], []],
            "bytes": bad, "text": text, "big": [1, 2**60], "score": [0.5, None],
            "when": [datetime(2020, 1, 2), None], "tag": pa.array(["x", None]).dictionary_encode(),
            "nothing": pa.nulls(2), "yes": [True, False],
        }
    )  # fmt: skip
    facts, part, _ = import_table(tmp_path, table, columns=("v",), caption_column="text")
    assert part["caption"].to_pylist() == ["caf�", "b"]
    assert json.loads(part["json"][0].as_py()) == {
        "big": 1, "score": 0.5, "when": "2020-01-02 00:00:00.000000", "tag": "x",
        "nothing": None, "yes": True,
    }  # fmt: skip
    assert facts["columns"] == {
        "big": "long", "nothing": "null", "score": "float", "tag": "str", "when": "str",
        "yes": "bool",
    }  # fmt: skip


def test_clip_retrieval(tmp_path):
    files = sources.list_embeddings(str(write_clip_retrieval(tmp_path / "v", n=50)))
    found, paths = import_all(files, tmp_path / "run")
    assert [facts["embedded"] for facts in found] == [50, 50]
    part = tables.read(paths.embeddings.file("img_emb_1.parquet"))
    assert part["sample_id"][3].as_py() == "img_emb_1/1-0003"
    assert found[0]["columns"] == {"label": "str"}


def test_an_error_is_a_row_that_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "ATTEMPTS", 1)
    files = sources.list_embeddings(str(write_parquet(tmp_path / "v", n=50, leave_out=("dino",))))
    wanted = columns.choose(Config(), files)
    path = Path(files[0].url)
    data = bytearray(path.read_bytes())
    data[4:3000] = bytes(2996)
    path.write_bytes(data)
    paths = layout.RunPaths(str(tmp_path / "run"))
    found = parts.import_part(vars(files[0]), wanted, Config(), paths)
    assert found["facts"] == "" and found["error"].startswith(f"{path}: ")
    assert not paths.embeddings.names() and not paths.rejects.names()


# ---- with shards


@pytest.fixture
def paired(tiny_shards, tmp_path):
    """The second tiny shard, which has unreadable samples, and vectors for most of its keys."""
    with (tiny_shards / "00001.tar").open("rb") as stream:
        samples = list(ShardReader(stream, None))
    keys = [*(s.key for s in samples[5:]), "no such key", samples[9].key]
    x, _ = rows(len(keys))
    folder = tmp_path / "v"
    folder.mkdir()
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 32)
    table = pa.table({"key": keys, "extra": range(len(keys)), "caption": keys, "clip": vectors})
    pq.write_table(table.take(list(range(len(keys)))[::-1]), folder / "00001.parquet")
    shards = list_shards(f"{tiny_shards}/00001.tar")
    return samples, sources.pair(shards, sources.list_embeddings(str(folder)))


def test_a_shard_gives_pictures_texts_and_the_samples_that_there_are(paired, tmp_path):
    samples, files = paired
    (facts,), paths = import_all(files, tmp_path / "run")
    part = tables.read(paths.embeddings.file("00001.parquet")).to_pylist()
    rejects = tables.read(paths.rejects.file("00001.parquet")).to_pylist()
    assert (facts["samples"], facts["embedded"], facts["rejected"]) == (63, 55, 8)
    assert (facts["unmatched"], facts["first_unmatched"]) == (5, "no such key")
    by_index = {row["index"]: row for row in [*part, *rejects]}
    assert sorted(by_index) == list(range(63))
    for sample in samples:
        row = by_index[sample.index]
        assert row["sample_id"] == f"00001/{sample.id}" and row["key"] == sample.key
    for row in part:
        sample = samples[row["index"]]
        assert (row["tar_offset"], row["tar_size"]) == (sample.image().offset, sample.image().size)
        assert row["image_width"] > 0 and row["caption"] == sample.caption()
        values = json.loads(row["json"])
        assert values.pop("extra") >= 0 and values == sample.values
    reasons = [row["reason"].partition(":")[0] for row in rejects]
    assert reasons[:5] == ["missing_embedding"] * 5
    assert reasons[5:] == ["truncated", "not_an_image", "missing_image"]
