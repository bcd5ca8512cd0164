import numpy as np
import pytest
import torch

from pipeline.mcr2 import spectral
from pipeline.mcr2.threads import one_thread


def groups(z: torch.Tensor) -> np.ndarray:
    with one_thread():
        vectors = spectral.embedding(spectral.shared_neighbours(spectral.neighbours(z, 20)), 32, 0)
        return spectral.over_segment(vectors, 100, 0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_groups_are_the_same_whatever_the_threads_outside(threads):
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(3000, 32, generator=generator), dim=1)
    torch.set_num_threads(1)
    first = groups(z)
    torch.set_num_threads(4)
    assert (groups(z) == first).all()
    assert torch.get_num_threads() == 4


def test_threads_come_back_after_an_error(threads):
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError), one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == 2
