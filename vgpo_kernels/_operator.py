"""What surrounds the body of every operator."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def operator_body(body: Callable[..., T]) -> Callable[..., T]:
    """Makes the device of the first tensor the current one, and turns autocast off.

    Triton launches on the current device, wherever the tensors are. Autocast would round in a reference what a kernel
    does not; public functions have cast what is to be cast.
    """

    @functools.wraps(body)
    def run(*arguments: Any, **options: Any) -> T:
        first = next(x for x in (*arguments, *options.values()) if isinstance(x, Tensor))
        with torch.cuda.device_of(first), torch.autocast(first.device.type, enabled=False):
            return body(*arguments, **options)

    return run
