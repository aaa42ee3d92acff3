"""What every kernel module shares: Triton itself, and what an ahead-of-time compilation needs to know."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

# What an H100 offers a program, in bytes; the interpreter, which has no shared memory, takes the same tiles.
INTERPRETED_SHARED = 227 * 1024
_LAUNCH_OPTIONS = ("num_warps", "num_stages")


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Returns the shared memory a program may take on `device`, in bytes, by which launchers choose tiles."""
    if device.type == "cpu":
        return INTERPRETED_SHARED
    index = torch.cuda.current_device() if device.index is None else device.index
    # torch calls it by another name on AMD; Triton's driver has one for both.
    properties: dict[str, int] = triton.runtime.driver.active.utils.get_device_properties(index)
    return properties["max_shared_mem"]


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one set of types, for `python -m vgpo_kernels compile`.

    Args:
        name: what the table shows.
        kernel: the `triton.jit` function.
        signature: type of each run-time argument, as in `{"x_ptr": "*fp32", "length": "i32"}`.
        constexprs: value of each compile-time argument.
        options: `num_warps`, `num_stages`.
        tiles: where the launcher chooses tiles by the shared memory of the device: the function that does, from bytes
            to compile-time arguments and options, added to those above for each target.
    """

    name: str
    kernel: Callable[..., Any]
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    tiles: Callable[[int], dict[str, int]] | None = None

    def fitted(self, shared: int) -> tuple[dict[str, Any], dict[str, int]]:
        """Returns the compile-time arguments and the options on a target with `shared` bytes of shared memory."""
        tiles = {} if self.tiles is None else self.tiles(shared)
        options = {name: value for name, value in tiles.items() if name in _LAUNCH_OPTIONS}
        constexprs = {name: value for name, value in tiles.items() if name not in _LAUNCH_OPTIONS}
        return self.constexprs | constexprs, self.options | options


__all__ = ["CompileCase", "shared_memory", "tl", "triton"]
