"""Outliers: the quantile is that of the sorted scores, to the last bit."""

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts import layout, outputs
from pipeline.explore.curate import outliers
from pipeline.explore.curate.shuffle import Chunk
from pipeline.runtime.errors import UserError
from pipeline.store import tables
from tests.explore import cut_run

SHARES = (0.001, 0.07, 0.5, 0.9, 0.99, 0.999)


def test_counts_are_of_halves_of_the_bits(tmp_path):
    paths = layout.RunPaths(str(tmp_path))
    scores = np.array([0.0, -0.0, -1e-7, 0.25, 0.25, 1.5], np.float32)
    table = pa.table({"outlier_score": scores})
    tables.write(paths.assignments.file("a.parquet"), table)
    counts = outliers.histogram(Chunk(0, ["a", "a"]), paths, None)
    assert counts[0] == 6 and counts.sum() == 12  # below nought there are rounding errors alone
    upper = int(np.float32(0.25).view(np.uint32)) >> 16
    assert counts[upper] == 4
    assert outliers.histogram(Chunk(0, ["a"]), paths, upper).sum() == 2


@pytest.mark.ray
def test_the_quantile_is_exact(tmp_path, ray_session):
    members = cut_run.members(400)
    members.scores = np.random.default_rng(0).random(400).astype(np.float32) ** 3
    paths = cut_run.build(tmp_path, members, parts=7)
    made = outputs.upstream(paths, "clusters")
    for share in SHARES:
        at = math.ceil(Fraction(str(share)) * 400)  # numpy takes 0.07 × 400 for more than 28
        assert outliers.quantile(share, made, paths) == np.sort(members.scores)[at - 1]


@pytest.mark.ray
def test_what_is_over_the_quantile_is_listed_and_a_rerun_finds_it(tmp_path, ray_session, caplog):
    members = cut_run.members(200)
    members.scores = np.random.default_rng(0).permutation(200).astype(np.float32) / 100
    paths = cut_run.build(tmp_path, members, parts=5)
    manifest = outliers.run(outliers.Config(quantile=0.95), paths)
    rows = cut_run.listed(paths, "outliers")
    assert manifest["samples"] == len(rows) == 10 and manifest["of"] == 200
    assert {row["sample_id"] for row in rows} == {
        members.ids[i] for i in members.scores.argsort()[-10:]
    }
    assert all(row["outlier_score"] > row["threshold"] == manifest["threshold"] for row in rows)
    assert all(row["reason"].startswith("outlier: score 1.9") for row in rows)
    with caplog.at_level("INFO"):
        assert outliers.run(outliers.Config(quantile=0.95), paths) == manifest
    assert "outliers: already done" in caplog.text
    with caplog.at_level("INFO"):
        outliers.run(outliers.Config(score=1.97), paths)  # there is one of just that
    assert "outliers.score was None, is 1.97" in caplog.text
    assert len(cut_run.listed(paths, "outliers")) == 2


@pytest.mark.parametrize(
    "given", [{}, {"quantile": 0.9, "score": 1}, {"quantile": 1.0}, {"quantile": 0.0}, {"score": 3}]
)
def test_settings_that_make_no_sense(given):
    with pytest.raises(UserError, match="give"):
        outliers.Config(**given)
