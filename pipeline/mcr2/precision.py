"""Full precision for log-determinants, Sinkhorn and Gram matrices, which lose too much in half."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
P = ParamSpec("P")
T = TypeVar("T")


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Call `function` with its leading tensors in float32 at least, and with autocast off.

    Gradients have the dtype of the given tensors.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        full = [tensor.float() if tensor.dtype in HALVES else tensor for tensor in tensors]
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*full, *args[len(tensors) :], **kwargs)  # type: ignore[arg-type]

    return wrapped
