"""SemDeDup's pass: against its definition, however rows are cut into parts, files and blocks."""

import numpy as np
import pytest
import torch

from pipeline.explore.curate import shuffle, similarity
from pipeline.explore.curate.shuffle import Chunk, Spilled
from pipeline.explore.curate.similarity import Unit, most_similar_before, units
from pipeline.store import tables
from pipeline.store.storage import Folder
from tests.explore import cut_run


def brute(x: np.ndarray, rank: np.ndarray, y: np.ndarray, other: np.ndarray) -> np.ndarray:
    cosines = np.where(other[None] < rank[:, None], x @ y.T, -np.inf)
    return cosines.max(1, initial=-np.inf)


@pytest.mark.parametrize("tile", [similarity.TILE, (5, 7), (1, 1)])
def test_the_largest_cosine_before(monkeypatch, tile):
    monkeypatch.setattr(similarity, "TILE", tile)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(23, 6)), rng.normal(size=(31, 6))
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    places = rng.permutation(54)
    rank, other = np.sort(places[:23]), np.sort(places[23:])
    given = [torch.from_numpy(a) for a in (x, rank, y, other)]
    found, index = most_similar_before(*given)
    expected = brute(x, rank, y, other)
    some = np.isfinite(expected)
    assert np.allclose(found[some], expected[some], atol=2e-6)
    assert (index[~some] == -1).all() and np.isneginf(found[~some]).all()
    assert np.allclose((x[some] * y[index[some]]).sum(1), expected[some], atol=2e-6)
    assert (other[index[some]] < rank[some]).all()


def test_of_equal_ones_the_first():
    x = torch.nn.functional.normalize(torch.randn(1, 6).repeat(9, 1), dim=1)
    found, index = most_similar_before(x, torch.arange(9), x, torch.arange(9))
    assert index.tolist() == [-1, *[0] * 8] and (found[1:] == 1).all()


def test_units_hold_every_cluster_once(monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_ROWS", 10)
    assert units([4, 5, 2, 25, 0, 3]) == [
        Unit(range(0, 2)),
        Unit(range(2, 3)),
        *[Unit(range(3, 4), block, 3) for block in range(3)],
        Unit(range(4, 6)),
    ]
    assert units([0, 0]) == []
    assert [unit.rows(2) for unit in units([25])] == [range(20, 30)] * 3


def compared(root, members, parts=3, files=2) -> dict[str, tuple[float, str]]:
    """sample_id -> (similarity, duplicate_of), by the functions that the tasks call."""
    paths = cut_run.build(root, members, parts)
    folder = Folder(str(root / "curation"))
    stems = [f"{i:05d}" for i in range(parts)]
    chunks = [
        Chunk(i, run.tolist()) for i, run in enumerate(np.array_split(stems, min(files, parts)))
    ]
    urls = [folder.file(f"spill-{chunk.number}.parquet") for chunk in chunks]
    for chunk, url in zip(chunks, urls, strict=True):
        shuffle.write(url, similarity.members(chunk, paths), 3, "made-of")
    spilled = Spilled(urls, np.array([tables.facts(url)["counts"] for url in urls]))
    found = {}
    for unit in units(np.bincount(members.clusters, minlength=3).tolist()):
        similarity.compare(unit, spilled, folder, "made-of")
        for row in tables.read(folder.file(f"{unit.name}.parquet")).to_pylist():
            assert row["sample_id"] not in found
            found[row["sample_id"]] = (row["similarity"], row["duplicate_of"])
    return found


@pytest.mark.parametrize("block_rows", [7, 40, 10**6])
def test_it_is_semdedup_by_definition(tmp_path, monkeypatch, block_rows):
    monkeypatch.setattr(similarity, "BLOCK_ROWS", block_rows)
    members = cut_run.members()
    found = compared(tmp_path, members)
    best, partner = members.before()
    expected = {i: (s, p) for i, s, p in zip(members.ids, best, partner, strict=True) if s > 0.8}
    assert 20 < len(expected) < len(members.ids)
    assert found.keys() == expected.keys()
    for sample_id, (cosine, other) in found.items():
        assert cosine == pytest.approx(expected[sample_id][0], abs=2e-6)
        assert other == expected[sample_id][1]


@pytest.mark.parametrize(("parts", "files"), [(1, 1), (9, 9), (9, 4)])
def test_however_it_is_cut(tmp_path, monkeypatch, parts, files):
    """Ids hold their part, so one run has the same vectors under other names: ranks break ties."""
    members, other = cut_run.members(), cut_run.members()
    members.scores = other.scores = np.random.default_rng(1).permutation(90).astype(np.float32)
    whole = compared(tmp_path / "a", members)
    monkeypatch.setattr(similarity, "BLOCK_ROWS", 11)
    found = compared(tmp_path / "b", other, parts, files)
    name = dict(zip(other.ids, members.ids, strict=True))
    assert {name[i]: (s, name[p]) for i, (s, p) in found.items()} == whole


def test_of_copies_the_one_farthest_from_the_centre_is_kept(tmp_path):
    members = cut_run.members(6)
    members.vectors[:] = members.vectors[0]
    members.clusters[:] = 1
    members.scores[:] = [0.1, 0.2, 0.9, 0.3, 0.9, 0.5]
    found = compared(tmp_path, members)
    kept = members.ids[2]  # as far as 4, and first by name
    assert found == {i: (1.0, kept) for i in members.ids if i != kept}


def test_spilled_rows_come_back_by_cluster(tmp_path):
    members = cut_run.members()
    paths = cut_run.build(tmp_path, members)
    urls = [str(tmp_path / f"spill-{i}.parquet") for i in range(3)]
    for i, url in enumerate(urls):
        shuffle.write(url, similarity.members(Chunk(i, [f"{i:05d}"]), paths), 3, "m")
    spilled = Spilled(urls, np.array([tables.facts(url)["counts"] for url in urls]))
    own = [i for i, c in zip(members.ids, members.clusters, strict=True) if c in (1, 2)]
    columns = ["sample_id", "cluster_id"]
    pieces = list(spilled.pieces(range(1, 3), columns))
    ids = [i for piece in pieces for i in piece["sample_id"].to_pylist()]
    assert sorted(ids) == sorted(own)
    runs = [range(0, 13), range(13, 14), range(14, 10**6)]
    again = [p for run in runs for p in spilled.pieces(range(1, 3), columns, run)]
    assert [i for piece in again for i in piece["sample_id"].to_pylist()] == ids


def test_packed():
    assert shuffle.pack([3, 3, 3, 9, 1], 6) == [
        range(0, 2),
        range(2, 3),
        range(3, 4),
        range(4, 5),
    ]
    assert shuffle.pack([0, 0, 1], 6) == [range(0, 3)]
