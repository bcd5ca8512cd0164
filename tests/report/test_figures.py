"""Numbers, words and tables of the charts."""

import base64

import numpy as np
import pytest
import torch

from pipeline.mcr2 import coding_rate, tree
from pipeline.report import figures, run_data
from pipeline.store import tables
from tests import fake_run


@pytest.fixture
def paths(tmp_path):
    return fake_run.build(tmp_path)


def test_lines_are_thinned_evenly_from_first_to_last():
    assert figures.thin(5, 10).tolist() == [0, 1, 2, 3, 4]
    kept = figures.thin(1001, 11)
    assert kept.tolist() == list(range(0, 1001, 100))
    assert figures.thin(1, 400).tolist() == [0]


def test_bits_of_unions_are_their_coding_lengths():
    """What is worked out from the savings is what the members of each union take."""
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(60, 4, generator=generator), dim=1).double()
    labels = torch.arange(60) % 5
    count, total, gram = coding_rate.statistics(z, labels, 5)
    merges = tree.grow(count, total, gram, 0.1)
    bits = coding_rate.length_bits(count, gram, 0.1)
    clustered = {"sizes": count.long().tolist(), "cluster_bits": bits.tolist()}
    rows = [{"k": 4 - step, **vars(merge)} for step, merge in enumerate(merges)]
    run = run_data.RunData("", {}, {}, clustered, {}, None, None)
    clusters = [{"id": c, "caption": f"c{c}"} for c in range(5)]

    class Table:
        def to_pylist(self):
            return rows

    data = figures.tree(run, Table(), clusters)["data"]
    assert [row[:3] for row in data] == [[r["k"], r["kept"], r["merged"]] for r in rows]
    for step, (k, kept, _, of_union, _) in enumerate(data):
        group = torch.tensor(tree.cut(merges, 5, k))
        members = group[labels] == group[kept]
        n = torch.tensor(float(members.sum()))
        expected = coding_rate.length_bits(n, z[members].T @ z[members], 0.1)
        assert of_union == pytest.approx(float(expected), abs=0.1), step


def test_the_curve_always_has_the_chosen_k(paths, monkeypatch):
    monkeypatch.setattr(figures, "POINTS", 2)
    monkeypatch.setattr(figures, "LINES", 2)
    curve = tables.read(paths.clusters.file("curve.parquet"))
    chart = figures.coding_length(run_data.collect(paths), curve)
    assert chart["data"]["ks"] == [1, 3, 12]
    assert chart["data"]["bits"] == [pytest.approx(b / 30, abs=1e-3) for b in (2520, 1200, 1740)]
    assert [row[0] for row in chart["table"]["rows"]] == ["1", "3", "12"]


def test_heat_is_read_back_from_its_bytes(paths):
    vectors = tables.read(paths.clusters.file("prototypes.parquet"))
    kept = figures.landmarks(vectors, paths)
    chart = figures.heat(kept)
    cells = np.frombuffer(base64.b64decode(chart["data"]["after"]), np.uint8).reshape(30, 30)
    owners = np.array(chart["data"]["clusters"])
    assert owners.tolist() == sorted(owners) and len(owners) == 30
    assert cells[owners[:, None] == owners].min() > 90 > 50 > cells[owners[:, None] != owners].max()
    assert "largest clusters" not in chart["text"]


def test_places_are_by_number_of_cluster(paths):
    vectors = tables.read(paths.clusters.file("prototypes.parquet"))
    chart = figures.cluster_map(vectors, [{"id": c} for c in range(3)])
    assert len(chart["data"]) == 3
    assert "100 %" in chart["text"]  # three points lie in a plane
