"""docs/how-to/laion-join.md does what it says: its code, run in order on metadata like LAION's."""

import re
from pathlib import Path

import duckdb
import polars as pl
import pytest

from tests import labelled_run

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "laion-join.md"
BLOCK = re.compile(r"^```(sql|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def url(i: int) -> str:
    return f"https://example.org/{i}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folders that the page names, and the labels with the columns that it speaks of."""
    paths = labelled_run.build(tmp_path / "made")
    parts = tmp_path / "my-run" / "labels"
    parts.mkdir(parents=True)
    for stem in ("00000", "00001"):  # a url stands in both shards
        labels = pl.read_parquet(paths.labels.file(f"{stem}.parquet"))
        number = pl.col("index").cast(pl.Int64)
        labels = labels.with_columns(hash=number * 2**40 - 7, input_SAMPLE_ID=number)
        labels.write_parquet(parts / f"{stem}.parquet")
    _laion(tmp_path / "laion")
    _relaion(tmp_path / "relaion")
    (tmp_path / "shards").mkdir()
    keys = [f"key{i}" for i in range(12)]
    downloads = pl.DataFrame({"key": keys, "sha256": [f"sha-{k}" for k in keys], "exif": "{}"})
    downloads.write_parquet(tmp_path / "shards" / "00000.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _laion(folder: Path) -> None:
    """LAION-400M's columns; every third URL twice, the better text second; 3 that nobody got."""
    folder.mkdir()
    rows = [(i, url(i), f"text {i}", 0.2) for i in range(18)]
    rows += [(100 + i, url(i), f"better {i}", 0.4) for i in range(0, 18, 3)]
    frame = pl.DataFrame(rows, schema=["SAMPLE_ID", "URL", "TEXT", "similarity"], orient="row")
    frame = frame.with_columns(
        pl.col("SAMPLE_ID").cast(pl.Float64), HEIGHT=80, WIDTH=120, LICENSE=pl.lit("?")
    ).with_columns(NSFW=pl.lit("UNLIKELY"))
    frame[:10].write_parquet(folder / "part-0.parquet")
    frame[10:].write_parquet(folder / "part-1.parquet")


def _relaion(folder: Path) -> None:
    folder.mkdir()
    rows = [(i * 2**40 - 7, url(i), f"text {i}", i / 30, i % 2 * 0.9) for i in range(15)]
    names = ["hash", "url", "caption", "punsafe", "pwatermark"]
    pl.DataFrame(rows, schema=names, orient="row").write_parquet(folder / "part-0.parquet")


def test_the_page(folder):
    names: dict[str, object] = {}
    kinds = []
    with duckdb.connect() as connection:
        for kind, code in BLOCK.findall(PAGE.read_text()):
            kinds.append(kind)
            if kind == "sql":
                connection.execute(code)
            else:
                exec(code, names)
        clean = connection.sql("select * from clean").pl()
        licences = connection.sql("select * from licences").pl()
        missing = connection.sql("select * from missing").pl()
    assert kinds == ["sql"] * 4 + ["python"] * 2
    labels = pl.read_parquet("my-run/labels/*.parquet")
    good = labels.filter(pl.col("status") == "success")
    by_sql, by_polars = (
        pl.read_parquet(f).sort("sample_id") for f in ("joined.parquet", "joined-polars.parquet")
    )
    assert by_sql.equals(by_polars.select(by_sql.columns))
    assert by_sql["sample_id"].to_list() == sorted(good["sample_id"])
    for row in by_sql.rows(named=True):
        i = int(row["url"].rpartition("/")[2])
        assert row["TEXT"] == (f"text {i}" if i % 3 else f"better {i}")
        assert row["sample_id_laion"] == (i if i % 3 else 100 + i)
    expected = good.filter(
        (pl.col("cluster_id") == 0) & (pl.col("index") < 3) & (pl.col("index") % 2 == 0)
    )
    assert 0 < len(clean) == len(expected)
    assert set(clean["sample_id"]) == set(expected["sample_id"])
    assert sorted(licences["sample_id"]) == sorted(good["sample_id"])
    assert set(licences["LICENSE"]) == {"?"}
    assert set(missing["url"]) == {url(15), url(16), url(17)}
    keyed = names["keyed"]
    assert isinstance(keyed, pl.DataFrame) and len(keyed) == len(labels)
    for row in keyed.rows(named=True):
        known = row["key"] in {f"key{i}" for i in range(12)}
        assert row["sha256"] == (f"sha-{row['key']}" if known else None)
