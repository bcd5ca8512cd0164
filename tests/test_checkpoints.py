"""Checkpoints: only whole ones count, only those of this very training, and only the last stays."""

import pytest
import torch

from pipeline import artifacts
from pipeline.checkpoints import Checkpoints, State
from pipeline.mcr2.network import Network


def state(step=0, seed=0):
    torch.manual_seed(seed)
    network = Network(4, 6, 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    return State(network, optimizer, step, [{"step": i, "loss": 0.1 * i} for i in range(step)])


def step_once(s):
    Z, C = s.network(torch.randn(5, 4))
    (Z.sum() + C.sum()).backward()
    s.optimizer.step()
    s.step += 1


@pytest.fixture
def paths(tmp_path):
    return artifacts.RunPaths(str(tmp_path))


def test_what_is_saved_comes_back_weights_momenta_and_history(paths):
    saved = state(7)
    step_once(saved)
    Checkpoints(paths, "abc").save(saved)
    back = state(seed=1)
    Checkpoints(paths, "abc").restore(back)
    assert (back.step, back.history) == (8, saved.history)
    names = set(saved.tensors())
    assert {"momentum.0", "network.trunk.1.mean", "network.cluster.bias"} <= names
    assert all(torch.equal(back.tensors()[n], t) for n, t in saved.tensors().items())


def test_only_the_last_stays_until_training_is_over(paths):
    checkpoints = Checkpoints(paths, "abc")
    for step in (9, 10):
        checkpoints.save(state(step))
    assert paths.network.names() == {"checkpoint-10.json", "checkpoint-10.safetensors"}
    paths.network.finish("made")
    checkpoints.drop()
    assert paths.network.names() == {"manifest.json"}


def test_nothing_to_restore_leaves_the_state_alone(paths):
    fresh, same = state(), state()
    Checkpoints(paths, "abc").restore(fresh)
    assert fresh.step == 0
    assert all(torch.equal(same.tensors()[n], t) for n, t in fresh.tensors().items())


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
