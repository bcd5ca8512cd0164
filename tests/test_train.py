"""Training: the order of samples, restarts that change nothing, one worker or two."""

import json
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors

from pipeline import artifacts, train
from pipeline.checkpoints import Checkpoints, State
from pipeline.errors import UserError
from pipeline.mcr2.collectives import Collectives
from pipeline.mcr2.network import Network
from pipeline.store import storage, tables
from tests import subspaces

ALONE = Collectives()
TOY = train.Config(
    hidden_dim=16,
    feature_dim=8,
    batch_size=32,
    epochs=4.0,
    warm_up_steps=5,
    learning_rate=0.05,
    momentum=0.9,
    weight_decay=1e-4,
    cluster_weight_decay=5e-3,
    eps_sq=0.1,
    eta=0.15,
    gamma=1.0,
    regularizer=0.05,
    sinkhorn_half_steps=5,
    columns=16,
    max_samples=1000,
    landmarks=50,
    seed=0,
)


def toy(each=25):
    return torch.from_numpy(subspaces.union(4, 3, each)[0]).half()


def start(cfg, input_dim=12):
    network = train.new_network(cfg, input_dim)
    return State(network, train.new_optimizer(cfg, network), 0, [])


def finish(cfg, x, state):
    for _ in train.fit(cfg, x, state, ALONE):
        pass
    return state


def without_speed(history):
    return [{k: v for k, v in row.items() if k != "samples_per_s"} for row in history]


def assert_same(a, b):
    assert a.step == b.step
    assert without_speed(a.history) == without_speed(b.history)
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("samples", "workers", "batch", "columns"),
    [(1000, 1, 32, 16), (1000, 3, 30, 15), (20, 1, 20, 16), (7, 4, 4, 4), (2, 1, 2, 2)],
)
def test_fitted_batch_and_columns_are_multiples_of_the_workers(samples, workers, batch, columns):
    cfg = train.fitted(replace(TOY, workers=workers), samples, 12)
    assert (cfg.batch_size, cfg.columns) == (batch, columns)
    assert train.total_steps(samples, cfg.batch_size, cfg.epochs) >= 1


def test_fitted_chooses_what_is_left_open_and_keeps_what_is_not():
    assert train.fitted(TOY, 1000, 12) == TOY
    free = replace(TOY, hidden_dim=0, feature_dim=0, epochs=0.0, columns=0)
    cfg = train.fitted(free, 100_000, 512)
    assert cfg.hidden_dim == 2048
    assert 1 <= cfg.feature_dim <= 128
    assert cfg.epochs >= 1
    assert cfg.columns == cfg.batch_size == 32
    assert train.fitted(free, 100_000, 4000).hidden_dim == 4096


def test_the_warm_up_is_no_longer_than_the_training():
    cfg = train.fitted(replace(TOY, warm_up_steps=10_000), 100, 12)
    assert cfg.warm_up_steps == train.total_steps(100, cfg.batch_size, cfg.epochs)


@pytest.mark.parametrize(
    ("samples", "batch", "workers", "named"),
    [
        (1, 32, 1, "1 embedded samples are too few"),
        (0, 32, 1, "too few"),
        (3, 32, 4, "train.workers = 4"),
        (100, 2, 4, "train.batch_size = 2 is less"),
    ],
)
def test_fitted_refuses_too_little(samples, batch, workers, named):
    with pytest.raises(UserError, match=named):
        train.fitted(replace(TOY, batch_size=batch, workers=workers), samples, 12)


@pytest.mark.parametrize(
    "change", [{"batch_size": 1}, {"eta": 0.0}, {"landmarks": 1}, {"gamma": -1.0}, {"workers": 0}]
)
def test_the_config_refuses_nonsense(change):
    with pytest.raises(UserError, match=f"train.{next(iter(change))}|train.landmarks"):
        replace(TOY, **change)


def test_an_epoch_covers_all_but_the_incomplete_batch_once():
    for epoch in (0, 1):
        steps = range(epoch * 3, epoch * 3 + 3)
        rows = torch.cat([train.batch_rows(TOY, 100, step, 0, 1) for step in steps])
        assert len(rows) == len(rows.unique()) == 96
    first, second = (train.batch_rows(TOY, 100, step, 0, 1) for step in (0, 3))
    assert not torch.equal(first, second)  # another order in another epoch
    assert not torch.equal(first, train.batch_rows(replace(TOY, seed=1), 100, 0, 0, 1))


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_the_batch_and_the_columns_of_one(workers):
    for step in range(8):
        for one, share in (
            (
                train.batch_rows(TOY, 100, step, 0, 1),
                lambda r, s=step: train.batch_rows(TOY, 100, s, r, workers),
            ),
            (
                train.sampled_columns(TOY, step, 0, 1),
                lambda r, s=step: train.sampled_columns(TOY, s, r, workers),
            ),
        ):
            shares = [share(rank) for rank in range(workers)]
            assert {len(s) for s in shares} == {len(one) // workers}
            assert torch.equal(torch.cat(shares), one)


def test_sampled_columns_are_distinct_and_change_from_step_to_step():
    drawn = [train.sampled_columns(TOY, step, 0, 1) for step in range(50)]
    assert all(len(c.unique()) == TOY.columns for c in drawn)
    assert torch.cat(drawn).unique().tolist() == list(range(TOY.batch_size))


def test_fit_is_deterministic_whatever_was_drawn_before():
    x = toy()
    a = finish(TOY, x, start(TOY))
    torch.rand(17)
    b = finish(TOY, x, start(TOY))
    assert_same(a, b)
    other = finish(replace(TOY, seed=1), x, start(replace(TOY, seed=1)))
    assert not torch.equal(a.network.feature.weight, other.network.feature.weight)


def test_the_phases_and_what_they_record():
    history = finish(TOY, toy(), start(TOY)).history
    assert [row["step"] for row in history] == list(range(12))
    assert [row["phase"] for row in history] == ["warm_up"] * 5 + ["cluster"] * 7
    for row in history:
        expected = -row["expansion"] + row["compression"] + 0.05 * row["regularizer"]
        assert row["loss"] == pytest.approx(expected)
        assert (row["compression"] > 0) == (row["phase"] == "cluster")
        assert row["gradient_norm"] > 0


def test_the_cluster_head_starts_from_the_feature_head_at_the_end_of_the_warm_up():
    state = start(TOY)
    before = state.network.cluster.weight.detach().clone()
    fitting = train.fit(TOY, toy(), state, ALONE)
    list(islice(fitting, 5))
    assert torch.equal(state.network.cluster.weight, before)  # not even weight decay touched it
    feature = state.network.feature.weight.detach().clone()
    next(fitting)
    moved = (state.network.cluster.weight - feature).abs().max()
    assert 0 < moved < (feature - before).abs().max() / 5


@pytest.mark.parametrize("stop", [1, 5, 6, 11, 12])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path, stop, momentum):
    """Step 5 is the first after the warm-up, 12 the last."""
    cfg, x = replace(TOY, momentum=momentum), toy()
    whole = finish(cfg, x, start(cfg))
    checkpoints = Checkpoints(artifacts.RunPaths(str(tmp_path)), "abc")
    for state in islice(train.fit(cfg, x, start(cfg), ALONE), stop):
        checkpoints.save(state)
    again = start(cfg)
    Checkpoints(artifacts.RunPaths(str(tmp_path)), "abc").restore(again)
    assert again.step == len(again.history) == stop
    assert_same(finish(cfg, x, again), whole)


def test_the_loss_goes_down_and_the_features_of_subspaces_turn_orthogonal():
    cfg = replace(TOY, epochs=60.0, batch_size=100, columns=100, warm_up_steps=0, weight_decay=0.0)
    x, labels = subspaces.union(4, 3, 25)
    x = torch.from_numpy(x).float()

    def across(network):
        z = network.eval().features(x)
        other = torch.from_numpy(labels[:, None] != labels[None, :])
        return float((z @ z.T).abs()[other].mean())

    state = start(cfg)
    before = across(state.network)
    losses = [row["loss"] for row in finish(cfg, x, state).history]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1
    assert across(state.network) < before / 2


@pytest.mark.parametrize("phase", ["warm_up", "cluster"])
def test_a_training_that_diverges_says_at_which_step(phase):
    cfg = replace(TOY, warm_up_steps=5 if phase == "warm_up" else 0)
    state = start(cfg)
    fitting = train.fit(cfg, toy(), state, ALONE)
    list(islice(fitting, 2))
    with torch.no_grad():
        state.network.feature.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"train: step 2: .*not finite.*train.learning_rate"):
        next(fitting)
    assert state.step == 2


def test_gradients_that_are_not_finite_stop_the_training_before_they_reach_the_weights():
    state = start(TOY)
    fitting = train.fit(TOY, toy(), state, ALONE)
    next(fitting)
    state.network.trunk[0].weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(RuntimeError, match=r"train: step 1: .*gradient norm"):
        next(fitting)
    assert all(torch.isfinite(p).all() for p in state.network.parameters())


def test_too_few_samples_are_refused_before_any_work(tmp_path):
    paths = artifacts.RunPaths(str(tmp_path))
    subspaces.write_parts(paths, [subspaces.union(2, 3, 1)[0][:1]])
    with pytest.raises(UserError, match="too few"):
        train.run(TOY, paths)
    assert not paths.network.names()


@pytest.fixture(scope="module")
def trained(ray_session, tmp_path_factory):
    """(paths, embedding by sample id) of a run trained by one worker on two parts."""
    paths = artifacts.RunPaths(str(tmp_path_factory.mktemp("trained")))
    x, _ = subspaces.union(4, 3, 25)
    ids = subspaces.write_parts(paths, [x[:60], x[60:]])
    train.run(replace(TOY, checkpoint_steps=4), paths)
    return paths, dict(zip(ids, x.astype(np.float16), strict=True))


@pytest.fixture
def unfinished(trained, tmp_path):
    """The embeddings of `trained` alone, as a run of their own."""
    shutil.copytree(trained[0].embeddings.url, tmp_path / "embeddings")
    return artifacts.RunPaths(str(tmp_path))


@pytest.mark.ray
def test_run_leaves_network_history_and_landmarks(trained):
    paths, row_of = trained
    assert paths.network.names() == {
        "manifest.json",
        "network.safetensors",
        "network.json",
        "history.parquet",
        "sample.parquet",
    }
    assert paths.network.manifest()["steps"] == 12
    history = tables.read(paths.network.file("history.parquet"))
    assert history.schema.equals(artifacts.HISTORY)
    x = torch.from_numpy(np.stack(list(row_of.values())))
    expected = finish(TOY, x, start(TOY))  # inside Ray as outside
    assert without_speed(history.to_pylist()) == without_speed(expected.history)

    sample = tables.read(paths.network.file("sample.parquet"))
    assert sample.schema.equals(artifacts.sample_schema(12, 8))
    ids = sample["sample_id"].to_pylist()
    assert len(set(ids)) == 50 and {i.split("/")[0] for i in ids} == {"00000", "00001"}
    np.testing.assert_array_equal(
        tables.to_matrix(sample["embedding"]), np.array([row_of[i] for i in ids])
    )
    facts = json.loads(storage.read_bytes(paths.network.file("network.json")))
    network = Network(**facts["shape"])
    weights = storage.read_bytes(paths.network.file("network.safetensors"))
    network.load_state_dict(load_tensors(weights))
    z = network.eval().features(torch.from_numpy(np.array([row_of[i] for i in ids])).float())
    np.testing.assert_allclose(tables.to_matrix(sample["feature"]), z.numpy(), atol=1e-6)


@pytest.mark.ray
def test_a_second_run_does_nothing(trained):
    paths, _ = trained
    before = storage.read_bytes(paths.network.file("manifest.json"))
    assert train.run(replace(TOY, workers=2), paths) == json.loads(before)
    assert storage.read_bytes(paths.network.file("manifest.json")) == before


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_give_the_history_of_one(trained, unfinished):
    train.run(replace(TOY, workers=2), unfinished)
    one, two = (
        tables.read(paths.network.file("history.parquet")) for paths in (trained[0], unfinished)
    )
    for name in ("step", "loss", "expansion", "compression", "regularizer", "gradient_norm"):
        np.testing.assert_allclose(two[name].to_numpy(), one[name].to_numpy(), rtol=1e-4)
    manifests = [paths.network.manifest() for paths in (trained[0], unfinished)]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]


@pytest.mark.ray
@pytest.mark.slow
def test_after_a_kill_the_rerun_goes_on_from_the_checkpoint(trained, unfinished):
    """The folder as a driver killed after step 8 leaves it: a checkpoint and no manifest."""
    finished, row_of = trained
    x = torch.from_numpy(np.stack(list(row_of.values())))
    *_, state = islice(train.fit(TOY, x, start(TOY), ALONE), 8)
    state.history[0]["samples_per_s"] = -1.0  # a mark
    made_of = f"{finished.network.manifest()['fingerprint']}-{TOY.batch_size}"
    Checkpoints(unfinished, made_of).save(state)
    train.run(TOY, unfinished)
    history = tables.read(unfinished.network.file("history.parquet"))
    assert history["samples_per_s"][0].as_py() == -1  # the first steps were not done again
    assert unfinished.network.names() == finished.network.names()
    for name in ("network.safetensors", "sample.parquet"):
        assert storage.read_bytes(unfinished.network.file(name)) == storage.read_bytes(
            finished.network.file(name)
        )
