"""Cluster 0 is the largest of all samples, whatever the landmarks say; and all tables agree."""

from collections import Counter

import numpy as np
import pytest

from pipeline.artifacts import layout
from pipeline.select_k import settings as select_k_settings
from pipeline.select_k import stage as select_k
from pipeline.store import storage, tables
from tests import interrupting, subspaces
from tests.select_k.test_stage import same_bytes

CFG = select_k_settings.Config(k=3, k_min=2, k_max=6, leaves=12, eps_sq=0.1, seed=0)
SIZES, LANDMARKS = (40, 100, 200), (100, 60, 20)  # of each subspace: in opposite orders
PARTS = 4

pytestmark = pytest.mark.ray


def begin(root) -> layout.RunPaths:
    """A run whose landmarks are most of the smallest subspace."""
    x, truth = subspaces.union(3, 4, max(SIZES))
    kept = [np.flatnonzero(truth == c)[:n] for c, n in enumerate(SIZES)]
    rows = np.sort(np.concatenate(kept))
    marks, of_marks = subspaces.union(3, 4, max(LANDMARKS), seed=1)
    some = [np.flatnonzero(of_marks == c)[:n] for c, n in enumerate(LANDMARKS)]
    paths = layout.RunPaths(str(root))
    subspaces.write_parts(paths, np.array_split(x[rows].astype(np.float32), PARTS))
    picked = np.sort(np.concatenate(some))
    ids = [f"landmark-{i}" for i in picked]
    subspaces.write_network(paths, marks[picked].astype(np.float32), ids)
    return paths


@pytest.fixture(scope="module")
def numbered(tmp_path_factory, ray_session):
    paths = begin(tmp_path_factory.mktemp("numbered"))
    return paths, select_k.run(CFG, paths)


def assignments(paths) -> list[dict]:
    names = sorted(paths.assignments.names() - {"manifest.json"})
    return [row for n in names for row in tables.read(paths.assignments.file(n)).to_pylist()]


def test_the_largest_cluster_is_the_first(numbered):
    paths, manifest = numbered
    assert manifest["sizes"] == sorted(SIZES, reverse=True)
    found = Counter(row["cluster_id"] for row in assignments(paths))
    assert [found[c] for c in range(3)] == manifest["sizes"]
    facts = tables.facts(paths.assignments.file("00000.parquet"))
    assert facts["renumbered"] is True


def test_all_tables_have_the_new_numbers(numbered):
    paths, manifest = numbered
    rows = {row["sample_id"]: row for row in assignments(paths)}
    groups = tables.read(paths.clusters.file("levels.parquet"))
    cluster_of = groups["cluster_id"].to_pylist()
    assert cluster_of == sorted(cluster_of) and set(cluster_of) == {0, 1, 2}
    counted = Counter(row["group"] for row in rows.values())
    assert [counted[g] for g in range(len(cluster_of))] == manifest["groups"]
    for row in rows.values():
        assert row["top_clusters"][0] == row["cluster_id"] == cluster_of[row["group"]]
    exemplars = tables.read(paths.clusters.file("exemplars.parquet")).to_pylist()
    assert all(rows[e["sample_id"]]["cluster_id"] == e["cluster_id"] for e in exemplars)
    assert [e["cluster_id"] for e in exemplars if e["kind"] == "typical"] == [
        c for c in range(3) for _ in range(24)
    ]
    prototypes = tables.read(paths.clusters.file("prototypes.parquet"))
    numbers = prototypes["cluster_id"].to_numpy()
    vectors = tables.to_matrix(prototypes["vector"])
    x, ids = [], []
    for name in sorted(paths.embeddings.names() - {"manifest.json"}):
        part = tables.read(paths.embeddings.file(name))
        x.append(tables.to_matrix(part["embedding"]).astype(np.float32))
        ids += part["sample_id"].to_pylist()
    nearest = numbers[(np.concatenate(x) @ vectors.T).argmax(axis=1)]
    assert [rows[i]["cluster_id"] for i in ids] == nearest.tolist()


@pytest.mark.parametrize("results", range(2 * PARTS, 3 * PARTS))
def test_an_interrupted_renumbering_goes_on_and_ends_with_the_same_bytes(
    numbered, tmp_path, monkeypatch, results
):
    paths = begin(tmp_path)
    with monkeypatch.context() as patch:
        interrupting.after(patch, results)
        with pytest.raises(interrupting.Interrupted):
            select_k.run(CFG, paths)
    assert paths.clusters.peek() is None
    select_k.run(CFG, paths)
    same_bytes(numbered[0], paths)
    assert storage.exists(paths.clusters.file("manifest.json"))
