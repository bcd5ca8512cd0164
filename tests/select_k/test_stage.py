"""The choice of k: on curves made by hand, and of a union of subspaces whose k is known."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from pipeline.artifacts import layout, schemas
from pipeline.mcr2 import cut
from pipeline.runtime.errors import UserError
from pipeline.select_k import settings as select_k_settings
from pipeline.select_k import stage as select_k
from pipeline.store import storage, tables
from tests import interrupting, subspaces

CFG = select_k_settings.Config(
    k=0,
    k_min=2,
    k_max=30,
    leaves=40,
    eps_sq=0.1,
    seed=0,
)
DIM = 128  # of features


def test_fitted_keeps_what_is_given_where_there_are_samples_enough():
    assert select_k_settings.fit_settings(CFG, 10_000, 1000, DIM) == CFG


@pytest.mark.parametrize(("samples", "landmarks"), [(2, 2), (3, 3), (10, 10), (5000, 200)])
def test_fitted_fits_even_the_smallest_data(samples, landmarks):
    for cfg in (replace(CFG, k_max=0, leaves=0), replace(CFG, k_max=0, leaves=0, k_min=50)):
        fit = select_k_settings.fit_settings(cfg, samples, landmarks, DIM)
        assert 1 <= fit.k_min <= fit.k_max <= landmarks
        assert fit.k_min <= fit.leaves <= landmarks


def test_fitted_of_large_data_is_bounded():
    fit = select_k_settings.fit_settings(replace(CFG, k_max=0, leaves=0), 10**9, 15_000, DIM)
    assert (fit.k_max, fit.leaves) == (1000, 2000)


def test_a_given_k_has_leaves_enough():
    assert select_k_settings.fit_settings(replace(CFG, k=300), 10_000, 1000, DIM).leaves == 300
    with pytest.raises(UserError, match=r"select_k.k = 300 is more than the 200 samples"):
        select_k_settings.fit_settings(replace(CFG, k=300), 10_000, 200, DIM)


def test_leaves_that_fit_are_bounded_by_their_memory(caplog):
    free = replace(CFG, k_max=0, leaves=0)
    assert (
        select_k_settings.fit_settings(free, 10**9, 15_000, 512).leaves == 512
        and len(caplog.messages) == 1
    )
    assert "512 leaves instead of 2000, and k at most as many" in caplog.text
    assert select_k_settings.fit_settings(free, 10**9, 15_000, 1024).leaves == 128
    more = replace(free, statistics_bytes=2**34)
    assert select_k_settings.fit_settings(more, 10**9, 15_000, 1024).leaves == 2000


@pytest.mark.parametrize("change", [{"leaves": 2000}, {"k": 2000}, {"k_min": 2000, "k_max": 2000}])
def test_what_is_given_and_takes_too_much_memory_is_refused_with_how_much(change):
    cfg = replace(CFG, **{"leaves": 0, "k_max": 0, **change})
    with pytest.raises(UserError, match=r"2,000 leaves of 1,024 dim.* 15.6 GiB .*= 16777216000 "):
        select_k_settings.fit_settings(cfg, 10**7, 15_000, 1024)
    more = replace(cfg, statistics_bytes=16_777_216_000)
    assert select_k_settings.fit_settings(more, 10**7, 15_000, 1024).leaves >= 2000


@pytest.mark.parametrize(
    "change", [{"k": -1}, {"k_min": 0}, {"eps_sq": 0.0}, {"statistics_bytes": 0}, {"k_min": 31}]
)
def test_the_config_refuses_nonsense(change):
    with pytest.raises(UserError, match="select_k.k_max|select_k." + next(iter(change))):
        replace(CFG, **change)


@pytest.fixture(scope="module")
def union_run(tmp_path_factory):
    """(paths, true label by sample id): 600 samples of 5 subspaces in four parts, one empty."""
    paths = layout.RunPaths(str(tmp_path_factory.mktemp("union")))
    x, truth = subspaces.union(5, 3, 120)
    ids = subspaces.write_parts(paths, [x[:250], x[:0], x[250:260], x[260:]])
    subspaces.write_network(paths, x[::2], ids[::2])
    return paths, dict(zip(ids, truth.tolist(), strict=True))


@pytest.fixture
def fresh(union_run, tmp_path):
    """The same run without what select_k makes."""
    for name in ("embeddings", "network"):
        shutil.copytree(f"{union_run[0].root}/{name}", tmp_path / name)
    return layout.RunPaths(str(tmp_path))


@pytest.fixture(scope="module")
def selected(union_run, ray_session):
    return (*union_run, select_k.run(CFG, union_run[0]))


def clusters_of(paths):
    listed = paths.embeddings.manifest()["shards"]
    parts = [tables.read(paths.assignments.file(f"{s['shard']['stem']}.parquet")) for s in listed]
    assert [p.num_rows for p in parts] == [s["embedded"] for s in listed]
    return {
        sample: cluster
        for p in parts
        for sample, cluster in zip(
            p["sample_id"].to_pylist(), p["cluster_id"].to_pylist(), strict=True
        )
    }


@pytest.mark.ray
def test_run_finds_the_five_subspaces(selected):
    paths, truth, manifest = selected
    assert manifest["k"] == manifest["k_best"] == 5
    assert manifest["k_low"] <= 5 <= manifest["k_high"]
    found = clusters_of(paths)
    assert found.keys() == truth.keys()
    assert adjusted_rand_score([truth[i] for i in found], list(found.values())) == 1
    assert manifest["sizes"] == [120] * 5 and manifest["samples"] == 600
    assert manifest["bits"] < manifest["bits_of_one"]
    names = 600 * np.log2(5)
    assert sum(manifest["cluster_bits"]) + names == pytest.approx(manifest["bits"])
    assert manifest["share_eta"] > 0


@pytest.mark.ray
def test_the_tables_of_a_run_agree_with_each_other(selected):
    paths, _, manifest = selected
    curve = tables.read(paths.clusters.file("curve.parquet"))
    merges = tables.read(paths.clusters.file("tree.parquet"))
    prototypes = tables.read(paths.clusters.file("prototypes.parquet"))
    exemplars = tables.read(paths.clusters.file("exemplars.parquet"))
    assert curve.schema.equals(schemas.CURVE)
    assert merges.schema.equals(schemas.TREE)
    assert prototypes.schema.equals(schemas.prototypes_schema(15))
    assert exemplars.schema.equals(schemas.EXEMPLARS)

    assert curve["k"].to_pylist() == list(range(1, curve.num_rows + 1))
    assert curve["bits"].to_numpy().argmin() + 1 == manifest["k_best"]
    assert merges["k"].to_pylist() == [4, 3, 2, 1]
    lost = -merges["bits_saved"].to_numpy().sum()  # from these five clusters to one
    assert manifest["bits"] + lost == pytest.approx(manifest["bits_of_one"])
    ids = prototypes["cluster_id"].to_numpy()
    assert (np.diff(ids) >= 0).all() and set(ids) == set(range(5))
    np.testing.assert_allclose(
        np.linalg.norm(tables.to_matrix(prototypes["vector"]), axis=1), 1, rtol=1e-6
    )
    found = clusters_of(paths)
    counts = {"typical": 24, "borderline": 12, "odd": 12}
    kinds = [kind for kind, count in counts.items() for _ in range(5 * count)]
    assert exemplars["kind"].to_pylist() == kinds
    ranks = [rank for count in counts.values() for _ in range(5) for rank in range(count)]
    assert exemplars["rank"].to_pylist() == ranks
    pairs = zip(
        exemplars["sample_id"].to_pylist(), exemplars["cluster_id"].to_pylist(), strict=True
    )
    assert all(found[sample] == cluster for sample, cluster in pairs)


@pytest.mark.ray
def test_a_second_run_does_nothing(selected, caplog):
    paths, _, manifest = selected
    before = storage.read_bytes(paths.clusters.file("manifest.json"))
    with caplog.at_level("INFO"):
        assert select_k.run(CFG, paths) == json.loads(before) == manifest
    assert "already done" in caplog.text
    assert storage.read_bytes(paths.clusters.file("manifest.json")) == before


@pytest.mark.ray
def test_a_run_with_k_given(selected, fresh):
    manifest = select_k.run(replace(CFG, k=3), fresh)
    assert (manifest["k"], manifest["k_best"]) == (3, 5)
    assert manifest["sizes"] == [240, 240, 120] or manifest["sizes"] == [360, 120, 120]
    five, three = clusters_of(selected[0]), clusters_of(fresh)
    assert len({(five[i], three[i]) for i in five}) == 5  # no subspace is parted


@pytest.mark.ray
def test_the_same_bytes_every_time(selected, fresh):
    select_k.run(CFG, fresh)
    same_bytes(selected[0], fresh)


def same_bytes(paths, others):
    """Every file but for the times in the manifest, and no file more."""
    for folder in ("clusters", "assignments"):
        one, two = paths.folder(folder), others.folder(folder)
        assert one.names() == two.names()
        for name in one.names() - {"manifest.json"}:
            assert storage.read_bytes(one.file(name)) == storage.read_bytes(two.file(name)), name


def test_a_k_beyond_the_landmarks_is_refused_before_any_work(fresh):
    with pytest.raises(UserError, match=r"select_k.k = 301 is more than the 300 samples"):
        select_k.run(replace(CFG, k=301), fresh)


def test_a_refused_k_removes_nothing(selected, fresh):
    """Neither one beyond the landmarks, nor one beyond the different ones among them."""
    for name in ("clusters", "assignments"):
        shutil.copytree(selected[0].folder(name).url, fresh.folder(name).url, dirs_exist_ok=True)
    with pytest.raises(UserError, match="301 is more than the 300 samples"):
        select_k.run(replace(CFG, k=301), fresh)
    file = fresh.network.file("sample.parquet")
    sample = tables.read(file)
    tables.write(file, pa.concat_tables([sample.slice(0, 1)] * sample.num_rows))
    with pytest.raises(UserError, match="the landmarks have only 1 different features"):
        select_k.run(replace(CFG, k=3), fresh)
    same_bytes(selected[0], fresh)


@pytest.mark.ray
@pytest.mark.parametrize("results", range(8))  # 4 chunks in each of two passes
def test_an_interrupted_run_resumes_and_ends_with_the_same_bytes(
    selected, fresh, monkeypatch, results
):
    with monkeypatch.context() as patch:
        interrupting.after(patch, results)
        with pytest.raises(interrupting.Interrupted):
            select_k.run(CFG, fresh)
    assert fresh.clusters.peek() is None
    if results > 4:  # what is summed is not made again
        times = {p: p.stat().st_mtime_ns for p in Path(fresh.assignments.url).glob("*.parquet")}
    with monkeypatch.context() as patch:
        counted = interrupting.after(patch, 99)
        select_k.run(CFG, fresh)
    assert len(counted) == 8 - results
    if results > 4:
        first = Path(fresh.assignments.file("00000.parquet"))
        assert first.stat().st_mtime_ns == times[first]
    same_bytes(selected[0], fresh)


@pytest.mark.ray
def test_an_interrupted_run_of_other_settings_leaves_nothing_behind(selected, fresh, monkeypatch):
    with monkeypatch.context() as patch:
        interrupting.after(patch, 6)
        with pytest.raises(interrupting.Interrupted):
            select_k.run(replace(CFG, k=3), fresh)
    storage.write_bytes(fresh.assignments.file(".00000.parquet.partial-0"), b"half")
    select_k.run(CFG, fresh)
    same_bytes(selected[0], fresh)


@pytest.mark.ray
def test_a_part_that_is_gone_since_is_made_again(selected, fresh, monkeypatch):
    with monkeypatch.context() as patch:
        interrupting.after(patch, 7)
        with pytest.raises(interrupting.Interrupted):
            select_k.run(CFG, fresh)
    fresh.assignments.remove({"00001.parquet"})
    select_k.run(CFG, fresh)
    same_bytes(selected[0], fresh)


@pytest.mark.parametrize("k", [10, 16, 30])
def test_of_samples_nearly_all_alike_no_cluster_is_empty(k):
    """A placeholder of a picture that was removed, 400 times, among 40 others."""
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [np.repeat(rng.normal(size=(1, 12)), 400, axis=0), rng.normal(size=(40, 12))]
    )
    z = torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True)).float()
    prototypes = cut.cut(z, k, 0)
    sizes = torch.bincount(prototypes.nearest(z), minlength=prototypes.k)
    assert 1 < prototypes.k <= k and (sizes > 0).all()
    assert (sizes[:-1] >= sizes[1:]).all()
    assert prototypes.cluster_of.unique().tolist() == list(range(prototypes.k))
