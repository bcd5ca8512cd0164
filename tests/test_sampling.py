"""The training sample: its size, where it comes from, and that it is the same every time."""

import numpy as np
import pytest

from pipeline import artifacts, sampling
from tests import subspaces

PATHS = artifacts.RunPaths("/nowhere")


def shards(*sizes):
    return [{"shard": {"stem": f"{i:05d}"}, "embedded": n} for i, n in enumerate(sizes)]


def test_all_rows_where_there_are_few_enough():
    parts = sampling.plan(shards(3, 0, 5), PATHS, 8)
    assert [(p.rows, p.take) for p in parts] == [(3, 3), (5, 5)]  # none of the empty part
    assert parts[1].url == "/nowhere/embeddings/00002.parquet"


@pytest.mark.parametrize("most", [100, 333, 999])
def test_every_part_gives_its_share_and_the_total_is_exact(most):
    parts = sampling.plan(shards(*[101, 97, 250, 52] * 2), PATHS, most)
    assert sum(p.take for p in parts) == most
    assert len(parts) == 8
    for part in parts:
        assert abs(part.take - part.rows * most / 1000) <= 1


def test_a_small_sample_of_a_few_large_parts_comes_from_all_of_them():
    """However many more rows there are than wanted: shards are often sorted by what they show."""
    parts = sampling.plan(shards(*[5000] * 10), PATHS, 100)
    assert [p.take for p in parts] == [10] * 10


def test_a_small_sample_of_many_parts_reads_only_some_spread_over_all():
    parts = sampling.plan(shards(*[1000] * 2000), PATHS, 1000)
    assert sum(p.take for p in parts) == 1000
    assert sampling.SPREAD <= len(parts) < 2 * sampling.SPREAD
    stems = [int(p.url[-13:-8]) for p in parts]
    assert max(np.diff(stems)) == min(np.diff(stems)) and stems[-1] > 1980


def test_tiny_parts_do_not_swell_the_sample():
    parts = sampling.plan(shards(*[1] * 1000), PATHS, 100)
    assert sum(p.take for p in parts) == 100
    assert all(p.take == 1 for p in parts)


def test_read_sample_keeps_ids_and_rows_together(tmp_path):
    paths = artifacts.RunPaths(str(tmp_path))
    blocks = [subspaces.union(2, 3, n, seed)[0] for seed, n in enumerate((10, 20, 15))]
    ids = subspaces.write_parts(paths, blocks)
    row_of = dict(zip(ids, np.concatenate(blocks).astype(np.float16), strict=True))
    listed = paths.embeddings.manifest()["shards"]

    found, x = sampling.read_sample(sampling.plan(listed, paths, 1000), 0)
    assert found == ids
    np.testing.assert_array_equal(x, [row_of[i] for i in ids])

    plan = sampling.plan(listed, paths, 30)
    some, x = sampling.read_sample(plan, 0)
    assert len(some) == len(set(some)) == 30
    assert x.dtype == np.float16
    np.testing.assert_array_equal(x, [row_of[i] for i in some])
    assert sampling.read_sample(plan, 0)[0] == some
    assert sampling.read_sample(plan, 1)[0] != some
