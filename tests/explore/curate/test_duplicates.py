"""The command duplicates: a list at a threshold, and the effect of all of them."""

import numpy as np
import pytest

from pipeline.artifacts import outputs
from pipeline.cli import main as cli
from pipeline.explore.curate import similarity
from pipeline.store import tables
from tests.explore import cut_run

pytestmark = pytest.mark.ray


@pytest.fixture
def members():
    return cut_run.members()


def test_the_list_and_the_effect_are_those_of_the_definition(
    tmp_path, members, ray_session, capsys
):
    paths = cut_run.build(tmp_path, members)
    best, _ = members.before()
    assert cli.invoke(["duplicates", "--root", paths.root, "--threshold", "0.9"]) == 0
    rows = cut_run.listed(paths, "duplicates")
    assert {row["sample_id"] for row in rows} == {
        i for i, cosine in zip(members.ids, best, strict=True) if cosine > 0.9
    }
    for row in rows:
        assert row["reason"].endswith(f" to {row['duplicate_of']}")
        assert row["threshold"] == 0.9 < row["similarity"]
    effect = tables.read(paths.folder("curation/similarity").file("effect.parquet")).to_pylist()
    assert [row["threshold"] for row in effect] == list(similarity.THRESHOLDS)
    assert [row["removed"] for row in effect] == [
        int((best > threshold).sum()) for threshold in similarity.THRESHOLDS
    ]
    counts = [row["removed"] for row in effect]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] > 0
    message = capsys.readouterr().out
    for row in effect:
        assert f"{row['removed']:>12,} {row['removed'] / 90:>8.2%}" in message


def test_another_threshold_computes_no_cosine(tmp_path, members, ray_session, monkeypatch):
    paths = cut_run.build(tmp_path, members)
    arguments = ["duplicates", "--root", paths.root, "--threshold"]
    assert cli.invoke([*arguments, "0.85"]) == 0
    kept = {row["sample_id"] for row in cut_run.listed(paths, "duplicates")}
    for name in ("assignments", "embeddings"):
        for file in (tmp_path / name).glob("*.parquet"):
            file.unlink()
    assert cli.invoke([*arguments, "0.95"]) == 0
    assert {row["sample_id"] for row in cut_run.listed(paths, "duplicates")} < kept
    monkeypatch.setattr("pipeline.runtime.tasks.results", None)
    assert cli.invoke([*arguments, "0.95"]) == 0
    assert not list((tmp_path / "curation" / "similarity").glob("spill-*"))


def test_an_interrupted_comparison_goes_on(tmp_path, members, ray_session):
    paths = cut_run.build(tmp_path, members)
    made = outputs.upstream(paths, "clusters")
    before = similarity.run(made, paths)
    folder = paths.folder("curation/similarity")
    part = next(n for n in sorted(folder.names()) if n[0].isdigit())
    whole = tables.read(folder.file(part))
    folder.remove({"manifest.json", part})
    after = similarity.run(made, paths)
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    assert tables.read(folder.file(part)).equals(whole)


def test_other_clusters_are_compared_again(tmp_path, members, ray_session):
    paths = cut_run.build(tmp_path, members)
    assert cli.invoke(["duplicates", "--root", paths.root, "--threshold", "0.8"]) == 0
    first = cut_run.listed(paths, "duplicates")
    members.clusters = np.roll(members.clusters, 1)
    cut_run.build(tmp_path, members)
    manifest = paths.clusters.manifest()
    paths.clusters.finish("clusters-2", **{k: v for k, v in manifest.items() if k != "fingerprint"})
    assert cli.invoke(["duplicates", "--root", paths.root, "--threshold", "0.8"]) == 0
    assert cut_run.listed(paths, "duplicates") != first


@pytest.mark.parametrize("threshold", ["0.7", "1", "-1"])
def test_a_threshold_that_makes_no_sense(tmp_path, threshold, capsys):
    assert cli.invoke(["duplicates", "--root", str(tmp_path), "--threshold", threshold]) == 2
    assert "give 0.8 or more, below 1" in capsys.readouterr().err


def test_a_run_without_clusters_is_told_of(tmp_path, capsys):
    assert cli.invoke(["duplicates", "--root", str(tmp_path)]) == 2
    assert "embed has not finished there" in capsys.readouterr().err
