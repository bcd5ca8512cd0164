"""Checkpoints: only whole ones count, only those of this very training, and only the last stays."""

import numpy as np
import pytest
import torch

from pipeline.artifacts import layout
from pipeline.mcr2.network import Network
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.state import State


def state(step=0, seed=0):
    torch.manual_seed(seed)
    network = Network([4], 6, 3, words=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    return State(network, optimizer, step, [{"step": i, "loss": 0.1 * i} for i in range(step)])


def step_once(s):
    s.optimizer.zero_grad()
    weight = torch.arange(3.0)
    (s.network(torch.eye(5, 4) + 0.1 * s.step) * weight).sum().backward()
    s.optimizer.step()
    s.step += 1


def same(a, b):
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.fixture
def paths(tmp_path):
    return layout.RunPaths(str(tmp_path))


def test_what_is_saved_comes_back_weights_moments_validations_and_history(paths):
    saved = state(7)
    saved.record_validation(np.array([0.25]))
    step_once(saved)
    saved.slow_down(0.5)
    Checkpoints(paths, "abc").save(saved)
    back = state(seed=1)
    Checkpoints(paths, "abc").restore(back)
    assert (back.step, back.history, back.rescued) == (8, saved.history, True)
    assert back.validations == [{"step": 7, "information": 0.25, "kept": True}]
    assert back.optimizer.param_groups[0]["lr"] == 0.05
    names = set(saved.tensors())
    assert {"optimizer.0.exp_avg", "optimizer.0.exp_avg_sq", "optimizer.0.step"} <= names
    assert {"network.residual.1.mean", "network.words.scale", "kept.project.weight"} <= names
    assert same(back, saved)
    assert not torch.equal(back.kept["project.weight"], back.network.project.weight)
    for s in (saved, back):
        step_once(s)
    assert same(back, saved)


def test_a_copy_is_not_changed_by_what_comes_after_and_serves_more_than_once():
    s = state(3)
    step_once(s)
    s.record_validation(np.array([0.5]))
    copy, twin = s.snapshot(), state(3)
    step_once(twin)
    twin.record_validation(np.array([0.5]))
    for _ in range(2):
        step_once(s)
        s.history.append({"step": 99})
        s.record_validation(np.array([0.75]))
        s.slow_down(0.1)
        s.restore(*copy)
        assert same(s, twin)
        assert (s.step, s.rescued, s.best_scores) == (4, False, [0.5])
        assert s.validations == [{"step": 4, "information": 0.5, "kept": True}]
        assert [row["step"] for row in s.history] == [0, 1, 2]
        assert s.optimizer.param_groups[0]["lr"] == 0.1


def test_a_copy_from_before_the_first_step_has_no_moments():
    s = state()
    copy = s.snapshot()
    step_once(s)
    s.restore(*copy)
    assert not s.optimizer.state_dict()["state"]
    again = state()
    for one in (s, again):
        step_once(one)
    assert same(s, again)


@pytest.mark.parametrize(
    ("informations", "best"), [([0.1, 0.3, 0.2], 1), ([0.3, 0.3, 0.1], 0), ([0.0, 0.0, 0.1], 2)]
)
def test_the_best_is_of_the_first_of_the_best_validations(informations, best):
    s = state()
    seen = []
    for information in informations:
        assert not s.validated()
        s.record_validation(np.array([information]))
        assert s.validated()
        seen.append({name: t.clone() for name, t in s.network.state_dict().items()})
        step_once(s)
    assert [found["step"] for found in s.validations] == [0, 1, 2]
    found = s.best().state_dict()
    assert all(torch.equal(found[name], seen[best][name]) for name in found)
    assert not torch.equal(seen[best]["project.weight"], seen[best - 1]["project.weight"])


def test_only_the_last_stays_until_training_is_over(paths):
    checkpoints = Checkpoints(paths, "abc")
    for step in (9, 10):
        checkpoints.save(state(step))
    assert paths.network.names() == {"checkpoint-10.json", "checkpoint-10.safetensors"}
    paths.network.finish("made")
    checkpoints.drop()
    assert paths.network.names() == {"manifest.json"}


def test_nothing_to_restore_leaves_the_state_alone(paths):
    fresh = state()
    Checkpoints(paths, "abc").restore(fresh)
    assert fresh.step == 0
    assert same(fresh, state())


def test_another_trainings_checkpoint_is_not_restored(paths):
    Checkpoints(paths, "other").save(state(5))
    back = state()
    Checkpoints(paths, "abc").restore(back)
    assert back.step == 0


def test_weights_without_their_json_do_not_count(paths, tmp_path):
    """A process killed between the two writes of step 10; 9 is numerically, not textually, less."""
    checkpoints = Checkpoints(paths, "abc")
    checkpoints.save(state(9))
    kept = {n: (tmp_path / "network" / n).read_bytes() for n in paths.network.names()}
    checkpoints.save(state(10))
    for name, data in kept.items():
        (tmp_path / "network" / name).write_bytes(data)
    back = state()
    checkpoints.restore(back)
    assert back.step == 10
    (tmp_path / "network" / "checkpoint-10.json").unlink()
    checkpoints.restore(back)
    assert back.step == 9
