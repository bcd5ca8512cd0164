"""Tables: vectors there and back, the same bytes twice, the facts in the footer."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.store import retry, storage, tables

X = np.arange(24, dtype=np.float32).reshape(8, 3) / 7


def table_of(x=X, kind=None) -> pa.Table:
    ids = [f"s/é{i}" for i in range(len(x))]
    return pa.table({"sample_id": ids, "v": tables.from_matrix(x, kind)})


@pytest.mark.parametrize("kind", [None, pa.float32(), pa.float64()])
def test_vectors_come_back(tmp_path, kind):
    url = str(tmp_path / "t.parquet")
    tables.write(url, table_of(kind=kind))
    back = tables.read(url)
    dtype = (kind or pa.float16()).to_pandas_dtype()
    assert back["v"].type == tables.vectors(3, kind)
    found = tables.to_matrix(back["v"])
    assert found.dtype == dtype and (found == X.astype(dtype)).all()
    assert back["sample_id"].to_pylist() == [f"s/é{i}" for i in range(8)]


def test_vectors_of_slices_and_chunks_are_their_own_rows():
    column = pa.chunked_array([tables.from_matrix(X[:5], pa.float32())] * 2)
    assert (tables.to_matrix(column.slice(3, 4)) == np.concatenate([X[3:5], X[:2]])).all()
    assert (tables.to_matrix(tables.from_matrix(X, pa.float32()).slice(2, 3)) == X[2:5]).all()


def test_no_rows_keep_their_width(tmp_path):
    url = str(tmp_path / "t.parquet")
    tables.write(url, table_of(np.zeros((0, 512), np.float16)))
    assert tables.to_matrix(tables.read(url)["v"]).shape == (0, 512)


def test_from_matrix_copies_what_is_not_contiguous():
    assert (tables.to_matrix(tables.from_matrix(X.T, pa.float32())) == X.T).all()
    assert (tables.to_matrix(tables.from_matrix(X[::2], pa.float32())) == X[::2]).all()


def test_the_same_table_gives_the_same_bytes(tmp_path):
    for name, facts in (("a", {"x": 1, "y": "é"}), ("b", {"y": "é", "x": 1})):
        tables.write(str(tmp_path / name), table_of(), **facts)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = tables.read(str(tmp_path / "a"))
    tables.write(str(tmp_path / "d"), again, x=2)
    assert tables.facts(str(tmp_path / "d")) == {"x": 2}  # none are left of the table's own


def test_facts_are_in_the_footer(tmp_path):
    url = str(tmp_path / "t.parquet")
    facts = {"config": {"model": "ViT-é"}, "rows": 8, "none": None, "list": [1, 2]}
    tables.write(url, table_of(), **facts)
    assert tables.facts(url) == facts
    with pytest.raises(FileNotFoundError):
        tables.facts(str(tmp_path / "none.parquet"))


def test_a_table_of_others_has_no_facts(tmp_path):
    pq.write_table(table_of(kind=pa.float32()), tmp_path / "theirs.parquet")
    assert tables.facts(str(tmp_path / "theirs.parquet")) == {}


def test_columns_are_read_alone_and_in_row_groups(tmp_path):
    url = str(tmp_path / "t.parquet")
    tables.write(url, pa.table({"a": range(20_000), "b": range(20_000)}))
    assert tables.read(url, ["b"]).column_names == ["b"]
    groups = pq.ParquetFile(url).metadata.num_row_groups
    assert groups == -(-20_000 // tables.ROW_GROUP_ROWS)


@pytest.mark.parametrize("rows", [(0, 1), (1023, 1025), (2048, 2500), (0, 2500), (700, 2100)])
@pytest.mark.parametrize("size", [tables.ROW_GROUP_ROWS, 2000])
def test_a_run_of_rows_is_read_from_its_row_groups_alone(tmp_path, monkeypatch, rows, size):
    url = str(tmp_path / "t.parquet")
    monkeypatch.setattr(tables, "ROW_GROUP_ROWS", size)  # older parts have larger ones
    tables.write(url, pa.table({"a": range(2500), "b": range(2500)}))
    asked, whole = [], pq.ParquetFile.read_row_groups

    def reading(file, groups, **options):
        asked.extend(groups)
        return whole(file, groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", reading)
    found = tables.read_rows(url, ["b"], range(*rows))
    assert found.to_pydict() == {"b": list(range(*rows))}
    assert asked == list(range(rows[0] // size, (rows[1] - 1) // size + 1))


def test_a_table_comes_some_rows_at_a_time(tmp_path):
    url = str(tmp_path / "t.parquet")
    tables.write(url, pa.table({"a": range(2500), "b": range(2500), "c": range(2500)}))
    found = list(tables.batches(url, ["b", "a", "none"], 1000))
    assert [rows.num_rows for rows in found] == [1000, 1000, 500]
    assert pa.concat_tables(found)["a"].to_pylist() == list(range(2500))
    assert set(found[0].column_names) == {"a", "b"}


def test_all_columns_but_vectors_have_dictionaries(tmp_path):
    url = str(tmp_path / "t.parquet")
    tables.write(url, table_of().append_column("tops", pa.array([[1, 2]] * 8)))
    group = pq.ParquetFile(url).metadata.row_group(0)
    columns = (group.column(i) for i in range(group.num_columns))
    found = {c.path_in_schema: c.has_dictionary_page for c in columns}
    assert found == {"sample_id": True, "v.list.element": False, "tops.list.element": True}


def test_on_another_store(tmp_path):
    url = f"memory://{tmp_path.name}/t.parquet"
    tables.write(url, table_of(), rows=8)
    assert tables.facts(url) == {"rows": 8} and tables.read(url).equals(table_of())
    assert tables.read_rows(url, ["sample_id"], range(2, 3)).to_pylist() == [{"sample_id": "s/é2"}]


def test_a_read_that_is_cut_short_is_tried_again_and_damage_names_the_file(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    url = str(tmp_path / "t.parquet")
    tables.write(url, pa.table({"a": [1, 2, 3]}))
    whole = storage.open_read
    monkeypatch.setattr(
        storage, "open_read", lambda url: whole(url) if waits else io.BytesIO(b"PAR1 half")
    )
    assert tables.read(url)["a"].to_pylist() == [1, 2, 3]
    assert waits == [1]
    storage.write_bytes(url, b"no table")
    for read in (tables.read, tables.facts):
        with pytest.raises(OSError, match=f"{url} cannot be read .* delete it"):
            read(url)


@pytest.mark.parametrize(
    "rows", [[0], [2999], [5, 3, 3, 2048], [1023, 1024, 1025], [2100, 7, 2999, 1023]]
)
def test_rows_are_taken_by_number_in_the_order_given(tmp_path, rows):
    x = np.random.default_rng(0).standard_normal((3000, 4)).astype(np.float16)
    table = pa.table({"n": range(3000), "x": tables.from_matrix(x)})
    url = str(tmp_path / "t.parquet")
    tables.write(url, table)
    found = tables.read_rows(url, ["x", "n"], np.array(rows))
    assert found["n"].to_pylist() == rows
    assert np.array_equal(tables.to_matrix(found["x"]), x[rows])


def test_a_table_that_is_written_some_rows_at_a_time_is_the_same(tmp_path):
    one, two = (str(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    whole = pa.table({"a": range(5000), "b": [str(i) for i in range(5000)]})
    tables.write(one, whole, rows=5000)
    with tables.writer(two, whole.schema) as out:
        for start in range(0, 5000, 300):
            out.add(whole.slice(start, 300))
        out.facts = {"rows": 5000}
        assert not Path(two).exists()
    assert tables.facts(one) == tables.facts(two) == {"rows": 5000}
    assert tables.read(two).equals(whole) and tables.read_rows(
        two, ["a"], range(1500, 1502)
    ).to_pydict() == {"a": [1500, 1501]}
    groups = [pq.ParquetFile(url).metadata for url in (one, two)]
    sizes = [[m.row_group(i).num_rows for i in range(m.num_row_groups)] for m in groups]
    assert sizes[0] == sizes[1] == [1024] * 4 + [904]


def test_an_error_while_rows_are_written_leaves_nothing(tmp_path):
    url = str(tmp_path / "t.parquet")
    with (
        pytest.raises(ZeroDivisionError),
        tables.writer(url, pa.schema([("a", pa.int64())])) as out,
    ):
        out.add(pa.table({"a": range(3000)}))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
