"""What surrounds every operator: autocast before it, the current device inside it."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)  # what autocast converts


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors in autocast's dtype where it is on, as torch's own operations take them."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    # Meta tensors have none: asking for its state is an error. Asking whether there is one, torch 2.11 cannot compile.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in _AUTOCAST else x for x in tensors)


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
