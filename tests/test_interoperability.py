"""What users read, read by what users have: DuckDB, Polars, pandas, HF datasets, webdataset."""

import json

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest
import webdataset

from pipeline.store import tables

pytestmark = pytest.mark.ray  # finished_run is made on Ray


@pytest.fixture(scope="module", params=["embeddings", "labels"])
def parts(request, finished_run):
    """(glob of a folder's parts, their rows as our own reader has them)."""
    folder = finished_run / request.param
    urls = sorted(folder.glob("*.parquet"))
    assert len(urls) == 2
    return str(folder / "*.parquet"), [r for u in urls for r in tables.read(str(u)).to_pylist()]


def plain(value: object) -> object:
    """Arrays and float16 as Python's own; NaN of pandas as None."""
    if isinstance(value, np.ndarray | list | tuple | pl.Series):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value


def same(theirs: list[dict], ours: list[dict]) -> None:
    """Every value of every row, rows in whatever order."""

    def ordered(rows: list[dict]) -> list[dict]:
        return sorted(rows, key=lambda row: row["sample_id"])

    assert len(theirs) == len(ours) > 60
    for their, our in zip(ordered(theirs), ordered(ours), strict=True):
        assert {n: plain(v) for n, v in their.items()} == {n: plain(v) for n, v in our.items()}


def test_duckdb(parts):
    glob, ours = parts
    cursor = duckdb.sql(f"select * from read_parquet('{glob}')")
    theirs = [dict(zip(cursor.columns, row, strict=True)) for row in cursor.fetchall()]
    same(theirs, ours)


def test_polars(parts):
    glob, ours = parts
    same(pl.read_parquet(glob).to_dicts(), ours)


def test_pandas(parts):
    glob, ours = parts
    folder = glob.rpartition("/")[0]
    urls = [f"{folder}/0000{i}.parquet" for i in (0, 1)]
    frame = pd.concat(pd.read_parquet(url, dtype_backend="pyarrow") for url in urls)
    rows = [{n: None if v is pd.NA else v for n, v in r.items()} for r in frame.to_dict("records")]
    same(rows, ours)


def test_hf_datasets(parts, tmp_path):
    glob, ours = parts
    found = datasets.load_dataset(
        "parquet", data_files=glob, split="train", cache_dir=str(tmp_path)
    )
    same(list(found), ours)


def test_hf_datasets_takes_a_folder_of_parts(parts, tmp_path):
    """Beside the parts lies a manifest.json, which is no part."""
    glob, ours = parts
    folder = glob.rpartition("/")[0]
    same(list(datasets.load_dataset(folder, split="train", cache_dir=str(tmp_path))), ours)


def test_hf_datasets_takes_the_root_of_a_run(finished_run, tmp_path):
    """By its README.md, whose first configuration is the labels."""
    root, cache = str(finished_run), str(tmp_path)
    for name, folder in ((None, "labels"), ("labels", "labels"), ("embeddings", "embeddings")):
        found = datasets.load_dataset(root, name, split="train", cache_dir=cache)
        urls = sorted((finished_run / folder).glob("*.parquet"))
        same(list(found), [r for u in urls for r in tables.read(str(u)).to_pylist()])
    clusters = datasets.load_dataset(root, "clusters", split="train", cache_dir=cache)
    assert list(clusters) == tables.read(str(finished_run / "clusters.parquet")).to_pylist()


def test_hf_datasets_streams_labelled_shards(finished_run):
    """As its own reader of webdataset has them; it raises where it is to decode a bad picture."""
    files = str(finished_run / "labeled" / "*.tar")
    found = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    found = found.cast_column("jpg", datasets.Image(decode=False))
    good = [sample for sample in found if sample["json"]["ratecluster"]["status"] == "success"]
    labels = pl.read_parquet(f"{finished_run}/labels/*.parquet")
    captions = labels.filter(pl.col("status") == "success")["cluster_caption"]
    assert sorted(s["json"]["ratecluster"]["cluster_caption"] for s in good) == sorted(captions)


def test_duckdb_counts_labels_as_the_table_of_clusters(finished_run):
    labels = f"read_parquet('{finished_run}/labels/*.parquet')"
    counted = duckdb.sql(
        f"select cluster_id, any_value(cluster_caption), count(*) from {labels} "
        "where status = 'success' group by all order by cluster_id"
    ).fetchall()
    table = pl.read_parquet(finished_run / "clusters.parquet").sort("cluster_id")
    assert counted == list(table.select("cluster_id", "cluster_caption", "size").iter_rows())


def test_labels_join_embeddings_by_sample_id(finished_run):
    labels = pl.read_parquet(f"{finished_run}/labels/*.parquet")
    vectors = pl.read_parquet(f"{finished_run}/embeddings/*.parquet")
    assert labels["sample_id"].n_unique() == len(labels)
    good = labels.filter(pl.col("status") == "success")
    assert set(good["sample_id"]) == set(vectors["sample_id"])
    norms = np.linalg.norm(vectors["embedding"].to_numpy().astype(np.float32), axis=1)
    assert norms == pytest.approx(1, abs=2e-3)


def test_webdataset_reads_labelled_shards_as_the_labels_have_them(finished_run):
    labels = {r["sample_id"]: r for r in pl.read_parquet(f"{finished_run}/labels/*.parquet").rows(
        named=True
    )}  # fmt: skip
    seen = set()
    for stem in ("00000", "00001"):
        url = str(finished_run / "labeled" / f"{stem}.tar")
        for sample in webdataset.WebDataset(url, shardshuffle=False):
            row = labels[f"{stem}/{sample['__key__']}"]
            label = json.loads(sample["json"])["ratecluster"]
            seen.add(row["sample_id"])
            assert label["status"] == row["status"]
            for name in ("cluster_id", "cluster_caption", "error_message"):
                assert label.get(name) == row[name]
            for name in ("confidence", "margin"):
                assert label.get(name) == (row[name] and pytest.approx(row[name], abs=1e-6))
    assert seen == set(labels)
