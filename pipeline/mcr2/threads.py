"""One thread for results that must be the same on any machine."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def one_thread() -> Iterator[None]:
    """Linear algebra on one thread of BLAS, OpenMP and torch.

    The last bits of eigenvectors and of k-means depend on the number of threads. Clusters made from
    them may then differ in more than the last bits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
