"""The training sample: its size, where it comes from, and that it is the same every time."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import layout
from pipeline.store import tables
from pipeline.train import sampling
from tests import subspaces

PATHS = layout.RunPaths("/nowhere")
GROUP = tables.ROW_GROUP_ROWS

EMBEDDING = ["embedding"]


def shards(*sizes):
    return [{"shard": {"stem": f"{i:05d}"}, "embedded": n} for i, n in enumerate(sizes)]


def planned(sizes, most, seed=0):
    return sampling.plan(shards(*sizes), PATHS, most, seed)


def test_all_rows_where_there_are_few_enough():
    plan = planned((3, 0, 5), 8)
    assert [(b.start, b.stop, b.take) for b in plan.blocks] == [(0, 3, 3), (0, 5, 5)]
    assert plan.blocks[1].url == "/nowhere/embeddings/00002.parquet"  # none of the empty part
    assert len(plan) == 8


@pytest.mark.parametrize("most", [100, 333, 999])
def test_every_part_gives_its_share_and_the_total_is_exact(most):
    plan = planned([101, 97, 250, 52] * 2, most)
    assert len(plan) == most
    assert len(plan.blocks) == 8
    for block in plan.blocks:
        assert abs(block.take - block.stop * most / 1000) <= 1


def test_a_small_sample_of_a_few_large_parts_comes_from_all_of_them():
    """However many more rows there are than wanted: shards are often sorted by what they show."""
    plan = planned([5000] * 10, 100)
    assert len({block.url for block in plan.blocks}) == 10
    assert [block.take for block in plan.blocks] == [2] * 50  # of every row group


def test_a_small_sample_of_many_parts_reads_only_some_spread_over_all():
    plan = planned([1000] * 2000, 1000)
    assert len(plan) == 1000
    assert sampling.SPREAD <= len(plan.blocks) < 2 * sampling.SPREAD
    stems = [int(block.url[-13:-8]) for block in plan.blocks]
    assert max(np.diff(stems)) < 20 and stems[0] < 10 and stems[-1] >= 1990


def test_a_large_set_gives_few_rows_of_row_groups_all_over_it():
    """10⁷ rows: every part, every place in a part, and no more is read than OVERREAD says."""
    plan = planned([10_000] * 1000, 250_000)
    assert len(plan) == 250_000
    read = sum(block.stop - block.start for block in plan.blocks)
    assert read == pytest.approx(sampling.OVERREAD * len(plan), rel=0.01)
    assert len({block.url for block in plan.blocks}) > 600
    assert {block.start for block in plan.blocks} == set(range(0, 10_000, GROUP))
    assert all(block.start % GROUP == 0 and block.stop <= 10_000 for block in plan.blocks)
    assert plan == planned([10_000] * 1000, 250_000)
    assert plan.blocks != planned([10_000] * 1000, 250_000, seed=1).blocks


def test_tiny_parts_do_not_swell_the_sample():
    plan = planned([1] * 1000, 100)
    assert len(plan) == 100
    assert all(block.take == 1 for block in plan.blocks)


@pytest.mark.parametrize(("rows", "workers"), [(10, 1), (10, 3), (7, 7)])
def test_shares_are_runs_that_cover_all(rows, workers):
    found = sampling.shares(rows, workers)
    assert [row for share in found for row in share] == list(range(rows))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Shards of three parts, embedding by sample id, ids in order."""
    paths = layout.RunPaths(str(tmp_path_factory.mktemp("sampled")))
    blocks = [subspaces.union(2, 3, n, seed)[0] for seed, n in enumerate((10, 1300, 15))]
    ids = subspaces.write_parts(paths, blocks)
    row_of = dict(zip(ids, np.concatenate(blocks).astype(np.float16), strict=True))
    return paths, row_of, ids


@pytest.mark.parametrize("most", [3000, 30, 1000])
def test_ids_and_rows_are_of_the_same_samples(written, most):
    paths, row_of, ids = written
    source = sampling.plan(paths.embeddings.manifest()["shards"], paths, most, 0)
    every = np.arange(len(source))
    found, x = (
        sampling.read_ids(source, every),
        sampling.read_embeddings(source, range(len(every)), EMBEDDING),
    )
    assert len(found) == len(set(found)) == min(most, len(ids))
    assert found == sorted(found) and x.dtype == np.float16
    np.testing.assert_array_equal(x, [row_of[i] for i in found])
    some = np.arange(1, len(every), 7)
    assert sampling.read_ids(source, some) == [found[row] for row in some]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_shares_of_workers_are_the_sample_cut_in_runs(written, workers):
    paths, _, _ = written
    source = sampling.plan(paths.embeddings.manifest()["shards"], paths, 1000, 0)
    whole = sampling.read_embeddings(source, range(1000), EMBEDDING)
    parts = [
        sampling.read_embeddings(source, rows, EMBEDDING) for rows in sampling.shares(1000, workers)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_the_seed_chooses_the_rows(written):
    paths, _, _ = written
    listed, every = paths.embeddings.manifest()["shards"], np.arange(1000)
    one, same, other = (
        sampling.read_ids(sampling.plan(listed, paths, 1000, seed), every) for seed in (0, 0, 1)
    )
    assert one == same and one != other


def test_a_worker_opens_only_the_parts_of_its_share(written, monkeypatch):
    paths, _, _ = written
    source = sampling.plan(paths.embeddings.manifest()["shards"], paths, 1000, 0)
    opened, whole = [], pq.ParquetFile

    def opening(file, **options):
        opened.append(file.name)
        return whole(file, **options)

    monkeypatch.setattr(pq, "ParquetFile", opening)
    sampling.read_embeddings(source, sampling.shares(1000, 200)[0], EMBEDDING)
    assert {name.rpartition("/")[2] for name in opened} == {"00000.parquet"}
