"""One thread for what must come out the same on any machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def one_thread() -> Iterator[None]:
    """Linear algebra on one thread of BLAS, OpenMP and torch.

    Eigenvectors and k-means differ in their last bits with the number of threads, and a cut made
    from them may differ in more than that.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
