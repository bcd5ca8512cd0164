"""Training: order of samples, validations, rescues, restarts that change nothing, workers."""

import json
import math
import re
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors

from pipeline.artifacts import layout, schemas
from pipeline.mcr2 import coding_rate
from pipeline.mcr2.collectives import Collectives
from pipeline.mcr2.model_selection import PATIENCE, Validator, better
from pipeline.mcr2.network import Network
from pipeline.runtime.errors import UserError
from pipeline.select_k import assign_parts
from pipeline.store import storage, tables
from pipeline.train import loop, sampling
from pipeline.train import settings as train_settings
from pipeline.train import stage as train
from pipeline.train.checkpoints import Checkpoints
from pipeline.vision import text_encoding
from tests import subspaces
from tests.mcr2.test_collectives import compression_failing_at, join, spawn
from tests.mcr2.test_collectives import finish as finish_worker

ALONE = Collectives()
NO_WORDS = torch.zeros(0, 1)
TOY = train_settings.Config(
    words=0,
    feature_dim=8,
    batch_size=32,
    steps=12,
    learning_rate=0.02,
    eps_sq=0.1,
    eta=0.15,
    columns=16,
    max_samples=1000,
    landmarks=50,
    seed=0,
)  # validated at 0, 10, 12
BOTH = replace(TOY, view_weights=(1.0, 1.0))  # images and words


def toy(each=25):
    return torch.from_numpy(subspaces.union(4, 3, each)[0]).half()


def start(cfg, x, words=NO_WORDS, scale=1.0):
    return loop.new_state(cfg, loop.new_network(cfg, x, words, scale)[0])


def finish(cfg, x, state):
    for _ in loop.fit(cfg, x, state, ALONE):
        pass
    return state


def without_speed(history):
    return [{k: v for k, v in row.items() if k != "samples_per_s"} for row in history]


def assert_same(a, b):
    names = ("step", "validations", "rescued")
    assert all(getattr(a, name) == getattr(b, name) for name in names)
    assert a.facts()["learning_rates"] == b.facts()["learning_rates"]
    assert without_speed(a.history) == without_speed(b.history)
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# ---- settings


@pytest.mark.parametrize(
    ("samples", "workers", "batch", "columns"),
    [(1000, 1, 32, 16), (1000, 3, 30, 15), (20, 1, 20, 16), (7, 4, 4, 4), (2, 1, 2, 2)],
)
def test_fitted_batch_and_columns_are_multiples_of_the_workers(samples, workers, batch, columns):
    cfg = train_settings.fit_settings(replace(TOY, workers=workers), samples)
    assert (cfg.batch_size, cfg.columns) == (batch, columns)


def test_fitted_chooses_what_is_left_open_and_keeps_what_is_not():
    assert train_settings.fit_settings(TOY, 1000) == TOY
    free = replace(TOY, feature_dim=0, columns=0)
    cfg = train_settings.fit_settings(free, 5000)
    assert cfg.feature_dim == 64
    assert cfg.columns == cfg.batch_size == 32
    assert train_settings.fit_settings(free, 100).feature_dim == 32
    assert train_settings.fit_settings(free, 100_000).feature_dim == 128


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
        train_settings.fit_settings(replace(TOY, batch_size=batch, workers=workers), samples)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 1},
        {"landmarks": 1},
        {"eta": 0.0},
        {"eps_sq": -0.1},
        {"learning_rate": 0.0},
        {"workers": 0},
        {"words": -1},
        {"steps": -1},
    ],
)
def test_the_config_refuses_nonsense(change):
    with pytest.raises(UserError, match=f"train.{next(iter(change))}|train.landmarks: give 2"):
        replace(TOY, **change)


# ---- the order of samples


def test_an_epoch_covers_all_but_the_incomplete_batch_once():
    for epoch in (0, 1):
        steps = range(epoch * 3, epoch * 3 + 3)
        rows = torch.cat([loop.batch_rows(TOY, 100, step, 0, 1) for step in steps])
        assert len(rows) == len(rows.unique()) == 96
    first, second = (loop.batch_rows(TOY, 100, step, 0, 1) for step in (0, 3))
    assert not torch.equal(first, second)  # another order in another epoch
    assert not torch.equal(first, loop.batch_rows(replace(TOY, seed=1), 100, 0, 0, 1))


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_the_batch_and_the_columns_of_one(workers):
    for step in range(8):
        for one, share in (
            (
                loop.batch_rows(TOY, 100, step, 0, 1),
                lambda r, s=step: loop.batch_rows(TOY, 100, s, r, workers),
            ),
            (
                loop.sampled_columns(TOY, step, 0, 1),
                lambda r, s=step: loop.sampled_columns(TOY, s, r, workers),
            ),
        ):
            shares = [share(rank) for rank in range(workers)]
            assert {len(s) for s in shares} == {len(one) // workers}
            assert torch.equal(torch.cat(shares), one)


LARGE = 20_003  # more than all workers see


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_large_sample_is_shared_and_the_batches_are_those_of_one(workers):
    """Every row is in one run, every batch has one row of each, every worker holds its own."""
    held = sampling.shares(LARGE, workers)
    cfg = replace(TOY, batch_size=512)
    per_epoch = LARGE // 512
    seen = []
    for step in (0, 1, per_epoch - 1):
        one = loop.batch_rows(cfg, LARGE, step, 0, 1)
        shares = [loop.batch_rows(cfg, LARGE, step, rank, workers) for rank in range(workers)]
        assert torch.equal(torch.cat(shares), one)
        for rows, mine in zip(shares, held, strict=True):
            assert mine.start <= int(rows.min()) and int(rows.max()) < mine.stop
        seen.append(one)
    assert len(torch.cat(seen).unique()) == 3 * 512  # no row twice in an epoch
    again = loop.batch_rows(cfg, LARGE, per_epoch, 0, 1)
    assert not torch.equal(again, seen[0])  # another order in another epoch


def test_every_row_of_a_large_sample_has_the_same_chance():
    """Also the last of the runs that are a row longer; here 39 or 40 of 20,003 rows."""
    cfg, steps = replace(TOY, batch_size=512), range(39 * 120)
    drawn = torch.cat([loop.batch_rows(cfg, LARGE, step, 0, 1)[:50] for step in steps])
    counts = drawn.bincount(minlength=LARGE)[: 50 * LARGE // 512].float()
    assert counts.min() > 100 and counts.max() == 120
    assert counts.mean() == pytest.approx(120 * 39 / (LARGE / 512), rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "most", "expected"),
    [(240, 500_000, 245_760), (1000, 500_000, 500_000), (1, 500_000, 16_384), (0, 100, 100)],
)
def test_no_more_is_read_than_the_steps_see(steps, most, expected):
    cfg = train_settings.Config(steps=steps, max_samples=most)
    assert train_settings.samples_to_read(cfg) == expected


def test_landmarks_are_among_the_rows_that_all_see():
    cfg = train_settings.Config()
    seen, kept = loop.seen_rows(cfg, 250_000), loop.landmark_rows(cfg, 250_000)
    assert (len(seen), len(kept)) == (16_384, 15_000)
    assert torch.isin(kept, seen).all() and (kept.diff() > 0).all() and (seen.diff() > 0).all()
    assert torch.equal(loop.seen_rows(cfg, 100), torch.arange(100))


def sharing_worker(rank, size, store, out):
    """Trains on its share of a sample that is larger than what all see."""
    workers = join(rank, size, store)
    train_settings.SEEN = 50
    x = toy()
    mine = sampling.shares(len(x), size)[rank]
    share = sampling.Share(x[mine.start : mine.stop], mine.start, len(x))
    seen = sampling.gather_rows(share, loop.seen_rows(TOY, len(x)), workers, torch.device("cpu"))
    state = start(TOY, seen)
    for _ in loop.fit(TOY, share, state, workers, seen):
        pass
    finish_worker((seen, state.history, state.validations), rank, out)


def test_workers_that_hold_shares_train_as_one_that_holds_all(tmp_path, monkeypatch):
    (seen, history, validations), (other, _, _) = spawn(
        sharing_worker, 2, tmp_path, monkeypatch=monkeypatch
    )
    monkeypatch.setattr(train_settings, "SEEN", 50)
    x = toy()
    assert torch.equal(seen, x[loop.seen_rows(TOY, len(x))]) and torch.equal(seen, other)
    state = start(TOY, seen)
    for _ in loop.fit(TOY, x, state, ALONE, seen):
        pass
    for name in ("loss", "expansion", "compression", "gradient_norm"):
        two, one = ([row[name] for row in rows] for rows in (history, state.history))
        np.testing.assert_allclose(two, one, rtol=1e-3)
    assert [found["step"] for found in validations] == [
        found["step"] for found in state.validations
    ]


def test_sampled_columns_are_distinct_and_change_from_step_to_step():
    drawn = [loop.sampled_columns(TOY, step, 0, 1) for step in range(50)]
    assert all(len(c.unique()) == TOY.columns for c in drawn)
    assert torch.cat(drawn).unique().tolist() == list(range(TOY.batch_size))


# ---- words


def test_the_words_kept_are_the_likeliest_in_the_sample_in_their_order():
    x = toy().float()
    words = torch.eye(12)[[11, 9, 7, 6, 1, 0, 3]]  # subspaces have their means along 0, 3, 6, 9
    network, _ = loop.new_network(replace(BOTH, words=4), x, words, 20.0)
    assert torch.equal(network.words.table, words[[1, 3, 5, 6]])  # likeliest is the last
    assert network.words.scale == 20
    shares = torch.softmax(20 * x.double() @ words.double().T, dim=1).mean(0)
    assert sorted(shares.topk(4).indices.tolist()) == [1, 3, 5, 6]


def test_no_more_words_than_asked_keep_all_and_the_samples_used_are_limited(monkeypatch):
    x, words = toy(), torch.eye(12)
    for limit in (7, 8):
        network, _ = loop.new_network(replace(BOTH, words=limit), x, words[:7], 20.0)
        assert torch.equal(network.words.table, words[:7])
    monkeypatch.setattr(train_settings, "SEEN", 5)
    a, b = (loop.new_network(replace(BOTH, words=4), x, words, 20.0)[0] for _ in range(2))
    assert torch.equal(a.words.table, b.words.table) and len(a.words.table) == 4


@pytest.mark.parametrize(
    ("text", "output"), [(None, "cannot read vocabulary"), ("# none\n\n", "has no words")]
)
def test_a_vocabulary_that_is_missing_or_empty_is_refused_before_any_work(tmp_path, text, output):
    paths = layout.RunPaths(str(tmp_path / "run"))
    subspaces.write_parts(paths, [subspaces.union(4, 3, 25)[0]])
    words = tmp_path / "words.txt"
    if text is not None:
        words.write_text(text)
    cfg = replace(TOY, words=4, vocabulary=(str(words),))
    with pytest.raises(UserError, match=output):
        train.run(cfg, paths)
    assert not paths.network.names()
    assert train_settings.read_words(replace(cfg, words=0), "pico-clip") == []  # not read


def test_the_words_fit_the_model_unless_they_are_named(tmp_path):
    assert len(train_settings.read_words(replace(TOY, words=4), "pico-clip")) > 100
    own = tmp_path / "words.txt"
    own.write_text("hound\nautomobile\n")
    cfg = replace(TOY, words=4, vocabulary=(str(own),))
    assert train_settings.read_words(cfg, "pico-clip") == ["hound", "automobile"]


# ---- fit


@pytest.mark.parametrize("words", [0, 5])
def test_fit_is_deterministic_whatever_was_drawn_before(words):
    x, table = toy(), torch.eye(12)[:7]
    cfg = replace(BOTH, words=words) if words else TOY
    a = finish(cfg, x, start(cfg, x, table[: 7 * bool(words)], 9.0))
    torch.rand(17)
    b = finish(cfg, x, start(cfg, x, table[: 7 * bool(words)], 9.0))
    assert_same(a, b)
    other = replace(cfg, seed=1)
    c = finish(other, x, start(other, x, table[: 7 * bool(words)], 9.0))
    assert not torch.equal(a.network.project.weight, c.network.project.weight)


def test_the_history_has_a_row_of_every_step():
    history = finish(TOY, toy(), start(TOY, toy())).history
    assert [row["step"] for row in history] == list(range(12))
    for row in history:
        assert list(row) == schemas.HISTORY.names
        assert row["loss"] == pytest.approx(row["compression"] - row["expansion"])
        assert row["compression"] > 0 and row["expansion"] > 0
        assert row["gradient_norm"] > 0 and row["samples_per_s"] > 0
        assert 0 <= row["sinkhorn_residual"] < 1


def test_the_first_step_is_of_the_network_at_its_start():
    """It is the structure of the sample: BatchNorm and the seed of the weights do not show yet."""
    x = toy()
    network = loop.new_network(TOY, x, NO_WORDS, 1.0)[0].eval()
    z = network.features(x[loop.batch_rows(TOY, 100, 0, 0, 1)]).double()
    sign, logdet = np.linalg.slogdet(np.eye(8) + 8 / (32 * TOY.eps_sq) * (z.T @ z).numpy())
    state = finish(replace(TOY, steps=1), x, start(TOY, x))
    assert sign == 1 and state.history[0]["expansion"] == pytest.approx(logdet / 2, rel=1e-5)
    moved = (state.network.project.weight - network.project.weight).abs()
    assert moved.max().item() == pytest.approx(TOY.learning_rate, rel=1e-3)  # Adam's first step


@pytest.mark.parametrize(("steps", "expected"), [(0, [0]), (7, [0, 7]), (25, [0, 10, 20, 25])])
def test_validations_are_the_scores_of_the_validator_and_the_best_network_is_kept(steps, expected):
    cfg, x = replace(TOY, steps=steps), toy()
    state = start(cfg, x)
    validator = Validator.of(state.network, x, cfg.seed)
    seen = {0: validator.score(state.network)}
    weights = {0: {n: t.clone() for n, t in state.network.state_dict().items()}}
    for _ in loop.fit(cfg, x, state, ALONE):
        seen[state.step] = validator.score(state.network)
        weights[state.step] = {n: t.clone() for n, t in state.network.state_dict().items()}
    assert state.step == steps
    best, found = 0, []
    for step in expected:
        won = step == 0 or better(seen[step], seen[best])
        best = step if won else best
        found.append({"step": step, "information": float(seen[step].mean()), "kept": won})
    assert state.validations == found
    kept = state.best().state_dict()
    assert all(torch.equal(kept[name], weights[best][name]) for name in kept)


def test_the_first_of_equal_validations_is_kept(monkeypatch):
    scores = iter(np.array([[0.2], [0.5], [0.5], [0.1]]))
    monkeypatch.setattr(Validator, "score", lambda validator, network: next(scores))
    cfg, x = replace(TOY, steps=25), toy()
    state = start(cfg, x)
    *_, ten = (state.snapshot()[0] for _ in islice(loop.fit(cfg, x, state, ALONE), 10))
    scores = iter(np.array([[0.2], [0.5], [0.5], [0.1]]))
    state = finish(cfg, x, start(cfg, x))
    assert [found["information"] for found in state.validations] == [0.2, 0.5, 0.5, 0.1]
    found = state.best().state_dict()
    assert all(torch.equal(found[name], ten[f"network.{name}"]) for name in found)


def test_training_that_does_not_pay_stops_early_and_keeps_the_input_views(monkeypatch):
    monkeypatch.setattr(Validator, "score", lambda validator, network: np.array([0.3]))
    cfg, x = replace(TOY, steps=200), toy()
    state = finish(cfg, x, start(cfg, x))
    assert [found["kept"] for found in state.validations] == [True] + [False] * PATIENCE
    assert state.step == len(state.history) == 40
    kept, begun = state.best().state_dict(), start(cfg, x).network.state_dict()
    assert all(torch.equal(kept[name], begun[name]) for name in kept)
    forced = finish(replace(cfg, recipe="mcr2"), x, start(cfg, x))
    assert forced.step == 200 and forced.validations[0]["step"] == 10


def test_the_recipe_none_is_the_input_views_alone():
    cfg = train_settings.fit_settings(replace(TOY, recipe="none", steps=200), 100)
    state = finish(cfg, toy(), start(cfg, toy()))
    assert cfg.steps == 0 and not state.history
    assert [found["step"] for found in state.validations] == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "mrc2"}, "train.recipe = 'mrc2': choose one of auto, none, mcr2, cpp"),
        ({"view_weights": (1.0, -1.0)}, "give 0 or more"),
    ],
)
def test_wrong_recipes_and_weights_are_refused(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        replace(TOY, **change)


CPP = replace(TOY, recipe="cpp", hidden_dim=24, warm_up_steps=4, learning_rate=0.01)


def start_cpp(cfg):
    return loop.new_state(cfg, loop.published_network(cfg, [12]))


def test_the_published_recipe_copies_its_head_after_the_warm_up_and_keeps_the_last_network():
    x, state = toy(), start_cpp(CPP)
    rows = [
        (row.step, torch.equal(row.network.feature.weight, row.network.cluster.weight))
        for row in loop.fit(CPP, x, state, ALONE)
    ]
    assert not any(same for _, same in rows) and [step for step, _ in rows] == list(range(1, 13))
    assert [row["compression"] > 0 for row in state.history] == [False] * 4 + [True] * 8
    assert [found["step"] for found in state.validations] == [12]
    kept = state.best().state_dict()
    assert all(torch.equal(kept[name], t) for name, t in state.network.state_dict().items())


@pytest.mark.parametrize("stop", [3, 4, 9])
def test_the_published_recipe_resumes_bit_for_bit(tmp_path, stop):
    x = toy()
    whole = finish(CPP, x, start_cpp(CPP))
    paths = layout.RunPaths(str(tmp_path))
    for state in islice(loop.fit(CPP, x, start_cpp(CPP), ALONE), stop):
        Checkpoints(paths, "abc").save(state)
    again = start_cpp(CPP)
    Checkpoints(paths, "abc").restore(again)
    assert again.step == stop
    assert_same(finish(CPP, x, again), whole)


@pytest.mark.slow
@pytest.mark.ray
def test_the_published_recipe_as_a_stage(unfinished):
    manifest = train.run(CPP, unfinished)
    assert manifest["views"] == [] and manifest["kept_step"] == 12
    network = assign_parts.load_network(unfinished)
    sample = tables.read(unfinished.network.file("sample.parquet"))
    x = torch.from_numpy(tables.to_matrix(sample["embedding"]).astype(np.float32))
    z = torch.from_numpy(tables.to_matrix(sample["feature"]).copy())
    torch.testing.assert_close(network.features(x), z, atol=1e-5, rtol=0)


def test_given_weights_must_be_one_for_each_view():
    with pytest.raises(UserError, match=r"has 1 numbers: .* the 2 views: images, words"):
        start(replace(TOY, words=4, view_weights=(1.0,)), toy(), torch.eye(12))


def test_a_second_encoder_is_weighed_by_its_agreement():
    x = toy(60)
    noise = torch.randn(len(x), 12, generator=torch.Generator().manual_seed(0)).half()
    for other, least, most in ((x, 0.9, 1.0), (noise, 0.0, 0.0)):
        network, found = loop.new_network(TOY, torch.cat([x, other], 1), NO_WORDS, 1.0, (12, 12))
        assert [view.name for view in found] == ["images", "encoder 2"]
        assert least <= found[1].weight <= most
        torch.testing.assert_close(network.weights, torch.tensor([1.0, found[1].weight]))


@pytest.mark.parametrize("stop", [1, 9, 10, 11, 12])
def test_a_stopped_training_resumes_bit_for_bit(tmp_path, stop):
    """Steps 10 and 12, the last, are validated after their checkpoint is written."""
    x = toy()
    whole = finish(TOY, x, start(TOY, x))
    assert [found["step"] for found in whole.validations] == [0, 10, 12]
    paths = layout.RunPaths(str(tmp_path))
    for state in islice(loop.fit(TOY, x, start(TOY, x), ALONE), stop):
        Checkpoints(paths, "abc").save(state)
    again = start(TOY, x)
    Checkpoints(paths, "abc").restore(again)
    assert again.step == len(again.history) == stop
    assert_same(finish(TOY, x, again), whole)


def test_a_training_stopped_right_after_a_validation_does_not_repeat_it(tmp_path, monkeypatch):
    x = toy()
    whole = finish(TOY, x, start(TOY, x))
    paths = layout.RunPaths(str(tmp_path))
    Checkpoints(paths, "abc").save(whole)
    again = start(TOY, x)
    Checkpoints(paths, "abc").restore(again)
    monkeypatch.delattr(Validator, "score")
    assert_same(finish(TOY, x, again), whole)


def test_the_loss_goes_down_and_the_features_of_subspaces_turn_orthogonal():
    """Lines in general position: PCA alone cannot part what is not orthogonal."""
    rng = np.random.default_rng(0)
    lines = rng.normal(size=(4, 12)) + 1.0
    labels = np.repeat(np.arange(4), 40)
    rows = lines[labels] + 0.05 * rng.normal(size=(160, 12))
    x = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).float()
    cfg = replace(TOY, recipe="mcr2", steps=150, batch_size=160, columns=160)

    def across(network):
        z = network.eval().features(x)
        other = torch.from_numpy(labels[:, None] != labels[None, :])
        return float((z @ z.T).abs()[other].mean())

    state = start(cfg, x)
    before = across(state.network)
    losses = [row["loss"] for row in finish(cfg, x, state).history]
    assert np.mean(losses[-5:]) < losses[0] - 0.3
    assert across(state.network) < before / 2


# ---- steps that fail


def poisoned(cfg, x, state, steps):
    """Train; after each of `steps`, in turn, a weight is not a number."""
    steps = list(steps)
    for _ in loop.fit(cfg, x, state, ALONE):
        if steps and state.step == steps[0]:
            steps.pop(0)
            with torch.no_grad():
                state.network.project.weight[0, 0] = float("nan")
    return state


def rescued_at(cfg, x, step):
    """The result of a rescue: the state at that validation, with a smaller learning rate."""
    state = start(cfg, x)
    fitting = loop.fit(cfg, x, state, ALONE)
    list(islice(fitting, step + 1))  # past the validation
    validated = start(cfg, x)
    for _ in islice(loop.fit(cfg, x, validated, ALONE), step):
        pass
    if step:
        judge = Validator.of(start(cfg, x).network, x, cfg.seed)
        validated.record_validation(judge.score(validated.network))
    validated.slow_down(loop.SMALLER)
    return finish(cfg, x, validated)


@pytest.mark.parametrize(("poison", "resumed"), [(1, 0), (9, 0), (11, 10)])
def test_the_first_failure_goes_back_to_the_last_validation_with_a_smaller_step(
    poison, resumed, caplog
):
    x = toy()
    found = poisoned(TOY, x, start(TOY, x), [poison])
    assert found.rescued and found.step == 12
    assert [row["step"] for row in found.history] == list(range(12))
    assert all(math.isfinite(v) for row in found.history for v in row.values())
    assert_same(found, rescued_at(TOY, x, resumed))
    assert not torch.equal(
        found.network.project.weight, finish(TOY, x, start(TOY, x)).network.project.weight
    )
    (output,) = caplog.messages
    assert output == (
        f"train: step {poison}: the loss is not finite, condition number nan; "
        f"resuming from step {resumed} with learning rate 0.002"
    )


@pytest.mark.parametrize("second", [3, 11])
def test_the_second_failure_ends_training_with_the_remedy(second, caplog):
    state = start(TOY, toy())
    output = rf"^train: step {second}: .*condition number.*train\.learning_rate .*train\.eta$"
    with pytest.raises(RuntimeError, match=output):
        poisoned(TOY, toy(), state, [2, second])
    assert len(caplog.messages) == 1


def test_a_resumed_training_remembers_that_it_was_rescued(tmp_path):
    x = toy()
    paths = layout.RunPaths(str(tmp_path))
    whole = poisoned(TOY, x, start(TOY, x), [2])
    state = start(TOY, x)
    fitting = loop.fit(TOY, x, state, ALONE)
    list(islice(fitting, 2))
    with torch.no_grad():
        state.network.project.weight[0, 0] = float("nan")
    list(islice(fitting, 5))  # five more, from the start
    Checkpoints(paths, "abc").save(state)
    again, doomed = start(TOY, x), start(TOY, x)
    for resumed in (again, doomed):
        Checkpoints(paths, "abc").restore(resumed)
        assert resumed.step == 5
    assert_same(finish(TOY, x, again), whole)
    with pytest.raises(RuntimeError, match="step 7"):
        poisoned(TOY, x, doomed, [7])


def test_a_determinant_that_is_not_found_is_a_failure_with_its_condition_number(
    monkeypatch, caplog
):
    compression = compression_failing_at({4})
    monkeypatch.setattr(coding_rate, "compression", compression)
    state = finish(TOY, toy(), start(TOY, toy()))
    assert state.rescued and len(state.history) == 12
    (output,) = caplog.messages
    number = float(output.split("condition number ")[1].split(";")[0])
    assert output.startswith("train: step 4: the loss") and 1 < number < 1e6


def test_gradients_that_are_not_finite_do_not_reach_the_weights(caplog):
    x = toy()
    state = start(TOY, x)
    fitting = loop.fit(TOY, x, state, ALONE)
    next(fitting)
    hook = state.network.residual[0].weight.register_hook(lambda grad: grad * float("nan"))
    state.rescued = True  # so that this failure is the end, and the weights stay for us to see
    before = {n: p.detach().clone() for n, p in state.network.named_parameters()}
    with pytest.raises(RuntimeError, match=r"train: step 1: the gradient is not finite, cond"):
        next(fitting)
    assert all(torch.equal(before[n], p) for n, p in state.network.named_parameters())
    assert len(state.history) == state.step == 1

    hook.remove()
    state = start(TOY, x)
    fails = iter([False, False, True])
    state.network.residual[0].weight.register_hook(
        lambda grad: grad * float("inf") if next(fails, False) else grad
    )
    assert finish(TOY, x, state).rescued
    assert "step 2: the gradient is not finite" in caplog.text
    assert_same(state, rescued_at(TOY, x, 0))


# ---- run


def test_too_few_samples_are_refused_before_any_work(tmp_path):
    paths = layout.RunPaths(str(tmp_path))
    subspaces.write_parts(paths, [subspaces.union(2, 3, 1)[0][:1]])
    with pytest.raises(UserError, match="too few"):
        train.run(TOY, paths)
    assert not paths.network.names()


@pytest.fixture(scope="module")
def trained(ray_session, tmp_path_factory):
    """(paths, embedding by sample id) of a run trained by one worker on two parts."""
    paths = layout.RunPaths(str(tmp_path_factory.mktemp("trained")))
    x, _ = subspaces.union(4, 3, 25)
    ids = subspaces.write_parts(paths, [x[:60], x[60:]])
    train.run(replace(TOY, checkpoint_steps=4), paths)
    return paths, dict(zip(ids, x.astype(np.float16), strict=True))


@pytest.fixture
def unfinished(trained, tmp_path):
    """The embeddings of `trained` alone, as a run of their own."""
    shutil.copytree(trained[0].embeddings.url, tmp_path / "embeddings")
    return layout.RunPaths(str(tmp_path))


def read_network(paths):
    facts = json.loads(storage.read_bytes(paths.network.file("network.json")))
    network = Network(**facts["shape"])
    weights = storage.read_bytes(paths.network.file("network.safetensors"))
    network.load_state_dict(load_tensors(weights))
    return network.eval(), facts


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
    manifest = paths.network.manifest()
    history = tables.read(paths.network.file("history.parquet"))
    assert history.schema.equals(schemas.HISTORY)
    x = torch.from_numpy(np.stack(list(row_of.values())))
    expected = finish(TOY, x, start(TOY, x))  # inside Ray as outside
    assert without_speed(history.to_pylist()) == without_speed(expected.history)
    network, facts = read_network(paths)
    assert manifest["looks"] == facts["looks"] == expected.validations
    best = max(expected.validations, key=lambda found: (found["information"], -found["step"]))
    assert (manifest["steps"], manifest["kept_step"]) == (12, best["step"])
    kept = expected.best().state_dict()
    assert all(torch.equal(kept[name], t) for name, t in network.state_dict().items())

    sample = tables.read(paths.network.file("sample.parquet"))
    assert sample.schema.equals(schemas.sample_schema(12, 8))
    ids = sample["sample_id"].to_pylist()
    assert len(set(ids)) == 50 and {i.split("/")[0] for i in ids} == {"00000", "00001"}
    np.testing.assert_array_equal(
        tables.to_matrix(sample["embedding"]), np.array([row_of[i] for i in ids])
    )
    z = network.features(torch.from_numpy(np.array([row_of[i] for i in ids])).float())
    np.testing.assert_allclose(tables.to_matrix(sample["feature"]), z.numpy(), atol=1e-6)


@pytest.mark.ray
def test_a_second_run_does_nothing(trained):
    paths, _ = trained
    before = storage.read_bytes(paths.network.file("manifest.json"))
    assert train.run(replace(TOY, workers=2), paths) == json.loads(before)
    assert storage.read_bytes(paths.network.file("manifest.json")) == before


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_with_words_has_those_of_the_encoder(ray_session, tmp_path):
    """The embeddings are word vectors, so each one's own word is its likeliest."""
    names = ["dog", "car", "pizza", "tree"]
    vectors, scale = text_encoding.encode(names, (), "pico-clip", "")
    rng = np.random.default_rng(0)
    x = np.repeat(vectors, 10, axis=0) + 0.01 * rng.normal(size=(40, vectors.shape[1]))
    paths = layout.RunPaths(str(tmp_path / "run"))
    subspaces.write_parts(paths, [x / np.linalg.norm(x, axis=1, keepdims=True)])
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("zebra\ndog\ncar\nviolin\npizza\ntree\n")
    cfg = replace(TOY, words=4, vocabulary=(str(vocabulary),), steps=3)
    first = train.run(cfg, paths)
    network, facts = read_network(paths)
    assert facts["shape"]["words"] == 4
    np.testing.assert_allclose(network.words.table, vectors, atol=1e-5)
    assert network.words.scale == pytest.approx(scale)
    assert train.run(cfg, paths) == first
    vocabulary.write_text("zebra\n")  # other words: another training
    assert train.run(cfg, paths)["fingerprint"] != first["fingerprint"]
    assert read_network(paths)[1]["shape"]["words"] == 0  # one word tells no image from another


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_give_the_history_of_one(trained, unfinished):
    train.run(replace(TOY, workers=2), unfinished)
    one, two = (
        tables.read(paths.network.file("history.parquet")) for paths in (trained[0], unfinished)
    )
    for name in ("step", "loss", "expansion", "compression", "gradient_norm"):
        np.testing.assert_allclose(two[name].to_numpy(), one[name].to_numpy(), rtol=1e-3)
    manifests = [paths.network.manifest() for paths in (trained[0], unfinished)]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]


@pytest.mark.ray
@pytest.mark.slow
def test_after_a_kill_the_rerun_resumes_from_the_checkpoint(trained, unfinished):
    """The folder as a driver killed after step 8 leaves it: a checkpoint and no manifest."""
    finished, row_of = trained
    x = torch.from_numpy(np.stack(list(row_of.values())))
    *_, state = islice(loop.fit(TOY, x, start(TOY, x), ALONE), 8)
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
