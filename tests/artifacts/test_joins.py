import pyarrow as pa
import pytest

from pipeline.artifacts import joins, layout
from pipeline.store import tables


@pytest.fixture
def paths(tmp_path):
    paths = layout.RunPaths(str(tmp_path))
    rows = pa.table({"sample_id": ["a/0", "a/1"], "key": ["0", "1"], "index": [0, 1]})
    tables.write(paths.embeddings.file("a.parquet"), rows, made_of="x")
    assigned = pa.table({"sample_id": ["a/0", "a/1"], "cluster_id": [5, 3], "margin": [0.5, 0.1]})
    tables.write(paths.assignments.file("a.parquet"), assigned, made_of="y")
    return paths


def test_columns_of_both_tables_stand_in_one_row(paths):
    table = joins.read_joined("a", paths, ["key"], ["cluster_id"])
    assert table.to_pydict() == {
        "sample_id": ["a/0", "a/1"],
        "key": ["0", "1"],
        "cluster_id": [5, 3],
    }
    assert table.schema.metadata is None
    assert joins.read_joined("a", paths, [], ["margin"]).column_names == ["sample_id", "margin"]


@pytest.mark.parametrize("ids", [["a/1", "a/0"], ["a/0"], ["a/0", "b/1"]])
def test_parts_that_hold_different_samples_are_refused(paths, ids):
    assigned = pa.table({"sample_id": ids, "cluster_id": range(len(ids))})
    tables.write(paths.assignments.file("a.parquet"), assigned)
    with pytest.raises(RuntimeError, match="a: embeddings and assignments hold different samples"):
        joins.read_joined("a", paths, ["key"], ["cluster_id"])
