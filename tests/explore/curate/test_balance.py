"""Balance: what is kept by definition, and that kept and removed are all samples once."""

import numpy as np
import pytest
import torch

from pipeline.cli import main as cli
from pipeline.explore.curate import balance
from pipeline.mcr2.diverse_subset import most_spread
from pipeline.runtime.errors import UserError
from tests.explore import cut_run

HOW = balance.HOW


@pytest.fixture
def members():
    return cut_run.members(120)


def by_cluster(rows: list[dict]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for row in sorted(rows, key=lambda row: (row["cluster_id"], row["rank"])):
        found.setdefault(row["cluster_id"], []).append(row["sample_id"])
    return found


def expected(members, how: str, n: int) -> dict[int, list[str]]:
    """By the definitions alone."""
    key = dict(zip(members.ids, balance.hashes(members.ids, 0).tolist(), strict=True))
    if how == "confident":
        key = {i: float(s) for i, s in zip(members.ids, members.scores, strict=True)}
    found = {}
    for cluster in range(3):
        own = [i for i, c in zip(members.ids, members.clusters, strict=True) if c == cluster]
        own.sort(key=lambda i: (key[i], i))
        if how == "coding-rate":
            rows = [members.ids.index(i) for i in own]
            x = members.vectors[rows].astype(np.float16).astype(np.float32)
            taken, _ = most_spread(torch.nn.functional.normalize(torch.from_numpy(x)), n, 0.1)
            own = [own[i] for i in taken.tolist()]
        found[cluster] = own[:n]
    return found


@pytest.mark.ray
@pytest.mark.parametrize("how", HOW)
def test_what_is_kept_is_what_the_definition_says(tmp_path, members, how, ray_session):
    paths = cut_run.build(tmp_path, members, parts=4)
    manifest = balance.run(balance.Config(per_cluster=7, how=how), paths)
    kept, removed = (cut_run.listed(paths, name) for name in ("balance-kept", "balance"))
    assert by_cluster(kept) == expected(members, how, 7)
    assert sorted(row["sample_id"] for row in (*kept, *removed)) == sorted(members.ids)
    assert manifest["samples"] == len(removed) == 120 - 21
    sizes = np.bincount(members.clusters).tolist()
    assert all(row["cluster_size"] == sizes[row["cluster_id"]] for row in removed)
    assert all((row["gain_nats"] is not None) == (how == "coding-rate") for row in kept)
    assert not list((tmp_path / "curation" / "candidates").glob("*"))


@pytest.mark.parametrize("how", HOW)
def test_candidates_are_the_same_however_parts_are_cut(tmp_path, members, how, monkeypatch):
    monkeypatch.setattr(balance, "GROUP_ROWS", 15)
    cfg = balance.Config(per_cluster=5, how=how)
    paths = cut_run.build(tmp_path, members, parts=6)
    stems = [f"{i:05d}" for i in range(6)]
    found, embedded = [], ["embedding"] if how == "coding-rate" else []
    for cut in ([stems], [stems[:1], stems[1:]], [[stem] for stem in stems]):
        urls = [str(tmp_path / f"{len(cut)}-{number}.parquet") for number in range(len(cut))]
        for number, (run, url) in enumerate(zip(cut, urls, strict=True)):
            rows = balance.candidates(balance.Chunk(number, run), paths, cfg, embedded)
            balance.shuffle.write(url, rows, 3, "m")
        counts = np.array([balance.tables.facts(url)["counts"] for url in urls])
        assert (counts <= cfg.most).all()
        spilled = balance.Spilled(urls, counts)
        network = balance.load_network(paths)
        chunk = balance.Chunk(0, range(3))
        found.append(balance.choose(chunk, spilled, cfg, network, 0.1).to_pylist())
    assert found[0] == found[1] == found[2]
    assert by_cluster(found[0]) == expected(members, how, 5)


def test_the_choice_by_coding_rate_spans_more_than_that_by_chance(members):
    members.ids = [str(i) for i in range(len(members.vectors))]
    for cluster in range(3):
        value = {}
        for how in HOW:
            rows = [members.ids.index(i) for i in expected(members, how, 8)[cluster]]
            x = torch.from_numpy(members.vectors[rows])
            value[how] = float(torch.logdet(torch.eye(8) + 1 / 0.1 * x.T @ x))
        assert value["coding-rate"] > max(value["random"], value["confident"])


def test_a_seed_is_a_choice():
    ids = [f"a/{i}" for i in range(1000)]
    assert (balance.hashes(ids, 0) == balance.hashes(ids, 0)).all()
    first, other = (set(balance.hashes(ids, seed).argsort()[:500].tolist()) for seed in (0, 1))
    assert 200 < len(first & other) < 300


@pytest.mark.ray
def test_by_command_more_than_there_are_removes_nothing(tmp_path, members, capsys, ray_session):
    paths = cut_run.build(tmp_path, members)
    arguments = ["balance", "--root", paths.root, "--per-cluster", "1000"]
    assert cli.invoke(arguments) == 0
    assert "0 of 120 samples (0.00%) are beyond 1,000 of their cluster" in capsys.readouterr().out
    assert len(cut_run.listed(paths, "balance-kept")) == 120
    assert cli.invoke([*arguments, "--how", "best"]) == 2
    assert "--how best: give one of random" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"per_cluster": 0}, {"per_cluster": 1, "how": "x"}])
def test_settings_that_make_no_sense(given):
    with pytest.raises(UserError, match="give"):
        balance.Config(**given)
