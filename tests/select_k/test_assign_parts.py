"""The second pass: rows of assignments, and the typical members, however the parts are chunked."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.artifacts import layout, schemas
from pipeline.mcr2 import assignment, coding_rate, levels
from pipeline.select_k import assign_parts, full_passes
from pipeline.store import tables
from tests import subspaces

ETA = 0.1


@pytest.fixture
def run(tmp_path):
    """(paths, its x (160, 12), sample ids, an Assigner of 6 clusters)."""
    paths = layout.RunPaths(str(tmp_path))
    x, _ = subspaces.union(4, 3, 40)
    ids = subspaces.write_parts(paths, [x[:70], x[70:70], x[70:]])
    subspaces.write_network(paths, x[:60], ids[:60])
    table = torch.from_numpy(subspaces.union(4, 3, 2, seed=9)[0][:6]).float()
    network = assign_parts.load_network(paths)
    prototypes = assignment.Prototypes(table, torch.arange(6), ETA)
    groups = levels.Groups(table, torch.arange(6))
    return paths, x, ids, assign_parts.Assigner(network, prototypes, groups, "abc")


def stems(paths):
    return [shard["shard"]["stem"] for shard in paths.embeddings.manifest()["shards"]]


def test_the_subspace_network_keeps_directions(run):
    """What the other tests of this stage stand on."""
    _, x, _, assigner = run
    z = assigner.network.features(torch.from_numpy(x).float())
    np.testing.assert_allclose(z.numpy(), x, atol=1e-6)


def test_part_features_in_batches_are_those_of_the_whole(run, monkeypatch):
    paths, x, ids, assigner = run
    monkeypatch.setattr(assign_parts, "BATCH_ROWS", 16)
    found = list(
        assign_parts.part_features(
            paths.embeddings.file("00002.parquet"), assigner.network, ["sample_id"]
        )
    )
    assert [len(z) for _, z in found] == [16] * 5 + [10]
    assert [i for rows, _ in found for i in rows["sample_id"].to_pylist()] == ids[70:]
    z = torch.cat([z for _, z in found]).numpy()
    np.testing.assert_allclose(z, x[70:], atol=1e-3)  # the part is float16


def test_a_part_of_assignments(run):
    paths, x, ids, assigner = run
    stats, typical = assign_parts.assign_parts(["00000"], paths, assigner)
    table = tables.read(paths.assignments.file("00000.parquet"))
    assert table.schema.equals(schemas.ASSIGNMENTS)
    assert tables.facts(paths.assignments.file("00000.parquet")) == {"made_of": "abc", "rows": 70}
    assert table["sample_id"].to_pylist() == ids[:70]
    cosines = x[:70] @ assigner.prototypes.table.numpy().T
    cluster = cosines.argmax(axis=1)
    np.testing.assert_array_equal(table["cluster_id"], cluster)
    np.testing.assert_allclose(table["outlier_score"], 1 - cosines.max(axis=1), atol=1e-3)
    np.testing.assert_array_equal(table["group"], cluster)
    np.testing.assert_array_equal(stats[0], np.bincount(cluster, minlength=6))
    np.testing.assert_array_equal(stats[3], stats[0])
    top = table["top_clusters"].to_pylist()
    assert [row[0] for row in top] == cluster.tolist()
    shares = np.array(table["top_shares"].to_pylist())
    weights = np.exp(cosines / ETA)
    expected = np.sort(weights / weights.sum(1, keepdims=True))[:, : -schemas.TOP - 1 : -1]
    np.testing.assert_allclose(shares, expected, rtol=0.02)  # the part is float16
    np.testing.assert_allclose(table["confidence"], shares[:, 0])
    np.testing.assert_allclose(table["margin"], shares[:, 0] - shares[:, 1:].max(1), atol=1e-6)
    assert typical.schema.equals(schemas.EXEMPLARS)
    rows = [row for row in typical.to_pylist() if row["kind"] == "typical"]
    centres = assigner.prototypes.centres.numpy()[cluster]
    central = dict(zip(ids[:70], (x[:70] * centres).sum(1), strict=True))
    np.testing.assert_allclose(
        [row["centrality"] for row in rows], [central[row["sample_id"]] for row in rows], atol=1e-3
    )


def test_both_passes_agree_and_add_up_over_the_parts(run):
    paths, x, _, assigner = run
    urls = [paths.embeddings.file(f"{stem}.parquet") for stem in stems(paths)]
    count, total, gram = full_passes.statistics(urls, assigner.network, assigner.prototypes.table)
    assigned, _ = assign_parts.assign_parts(stems(paths), paths, assigner)
    for first, second in zip((count, total, gram), assigned[:3], strict=True):
        np.testing.assert_allclose(first, second)
    assert count.sum() == len(x) == 160

    z = torch.from_numpy(x.astype(np.float16)).double()
    z = z / z.norm(dim=1, keepdim=True)
    leaf = (z @ assigner.prototypes.table.double().T).argmax(1)
    expected = coding_rate.statistics(z, leaf, 6)
    for found, value in zip((count, total, gram), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-5)
    pieces = [
        full_passes.statistics([url], assigner.network, assigner.prototypes.table) for url in urls
    ]
    for whole, *parts in zip((count, total, gram), *pieces, strict=True):
        np.testing.assert_allclose(sum(parts), whole, rtol=0, atol=1e-12)


def test_an_empty_part_has_an_empty_table(run):
    paths, _, _, assigner = run
    stats, typical = assign_parts.assign_parts(["00001"], paths, assigner)
    assert not any(sums.any() for sums in stats)
    assert typical.num_rows == 0
    table = tables.read(paths.assignments.file("00001.parquet"))
    assert table.num_rows == 0 and table.schema.equals(schemas.ASSIGNMENTS)


def scored(rows):
    """Rows (cluster, outlier score, margin, sample id) with the other columns of EXEMPLARS."""
    clusters, scores, margins, ids = zip(*rows, strict=True)
    fixed = {"shard": "0", "key": "k", "image_member": "m", "tar_offset": 0, "tar_size": 1}
    names = [f for f in schemas.EXEMPLARS if f.name in fixed]
    return pa.table(
        {
            "cluster_id": pa.array(clusters, pa.int32()),
            "centrality": 1 - pa.array(scores, pa.float32()).to_numpy(),
            "outlier_score": pa.array(scores, pa.float32()),
            "margin": pa.array(margins, pa.float32()),
            "sample_id": pa.array(ids),
            "caption": pa.array([None] * len(rows), pa.string()),
            **{f.name: pa.array([fixed[f.name]] * len(rows), f.type) for f in names},
        }
    )


def exemplars(rows):
    return pa.concat_tables(
        [assign_parts.rank_members(scored(rows), kind) for kind in schemas.KINDS]
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("typical", [(0, 0, "d"), (0, 1, "b"), (1, 0, "a"), (2, 0, "e")]),
        ("borderline", [(0, 0, "c"), (0, 1, "d"), (1, 0, "a"), (2, 0, "e")]),
        ("odd", [(0, 0, "b"), (0, 1, "c"), (1, 0, "a"), (2, 0, "e")]),
    ],
)
def test_each_kind_goes_by_its_score_then_by_name(monkeypatch, kind, expected):
    monkeypatch.setitem(assign_parts.KEPT, kind, 2)
    rows = [(1, 0.5, 0, "a"), (0, 0.2, 0.1, "c"), (0, 0.2, 0.9, "b"), (0, 0.1, 0.3, "d")]
    best = assign_parts.rank_members(scored([*rows, (2, 0.9, 1, "e")]), kind)
    assert best.schema.equals(schemas.EXEMPLARS)
    assert set(best["kind"].to_pylist()) == {kind}
    found = zip(*(best[n].to_pylist() for n in ("cluster_id", "rank", "sample_id")), strict=True)
    assert list(found) == expected


@pytest.mark.parametrize("cuts", [[1, 2, 3], [100], [40, 41, 199], list(range(10, 200, 10))])
def test_chunks_do_not_change_the_exemplars(monkeypatch, cuts):
    for kind, count in {"typical": 5, "borderline": 3, "odd": 4}.items():
        monkeypatch.setitem(assign_parts.KEPT, kind, count)
    rng = np.random.default_rng(0)
    rows = [
        (int(c), int(s) / 20, int(m) / 10, f"{i:03d}")  # many ties
        for i, (c, s, m) in enumerate(rng.integers(0, (4, 20, 10), (200, 3)))
    ]
    whole = exemplars(rows)
    assert whole.num_rows == 4 * (5 + 3 + 4)
    best = schemas.EXEMPLARS.empty_table()
    for piece in reversed(np.split(np.arange(200), cuts)):
        more = exemplars([rows[i] for i in piece])
        best = assign_parts.merge_exemplars([best, more])
    assert best.equals(whole)
