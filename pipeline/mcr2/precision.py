"""Full precision for what half of it would spoil: log-determinants, Sinkhorn, Gram matrices."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
P = ParamSpec("P")
T = TypeVar("T")


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """`function` with its tensors, which come first, in float32 at least and autocast off.

    Gradients come back in the dtype of the tensors given.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        full = [tensor.float() if tensor.dtype in HALVES else tensor for tensor in tensors]
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*full, *args[len(tensors) :], **kwargs)  # type: ignore[arg-type]

    return wrapped
