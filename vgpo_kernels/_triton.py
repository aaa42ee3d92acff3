"""What every kernel module shares: Triton itself, and what an ahead-of-time compilation needs to know."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vgpo_kernels._tuning import LAUNCH_OPTIONS


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one set of types, for `python -m vgpo_kernels compile`.

    Args:
        name: what the table shows.
        kernel: the `triton.jit` function.
        signature: type of each run-time argument, as in `{"x_ptr": "*fp32", "length": "i32"}`.
        constexprs: value of each compile-time argument.
        options: `num_warps`, `num_stages`.
        tiles: where the launcher chooses tiles by the GPU: the function that does, from the name of a target ("sm_90")
            to compile-time arguments and options, which come on top of those above.
        targets: names of the targets that the kernel is for; None: all of them.
    """

    name: str
    kernel: Callable[..., Any]
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    tiles: Callable[[str], dict[str, int]] | None = None
    targets: tuple[str, ...] | None = None

    def chosen(self, target: str) -> dict[str, int]:
        """Returns what the launcher chooses on the target of that name."""
        return {} if self.tiles is None else self.tiles(target)

    def on(self, target: str) -> tuple[dict[str, Any], dict[str, int]]:
        """Returns the compile-time arguments and the options on the target of that name."""
        tiles = self.chosen(target)
        options = {name: value for name, value in tiles.items() if name in LAUNCH_OPTIONS}
        constexprs = {name: value for name, value in tiles.items() if name not in LAUNCH_OPTIONS}
        return self.constexprs | constexprs, self.options | options


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """tanh to the last bits: a polynomial near 0, where one minus one would cancel, else from exp2, for any |x|."""
    square = x * x
    # Fitted to (tanh(x) / x - 1) / x^2 for |x| <= 0.6, to 1e-8.
    tail = -0.05387514 + square * (0.02111621 - square * 0.00627639)
    small = x + x * square * (-0.3333333 + square * (0.13332924 + square * tail))
    decay = tl.exp2(tl.abs(x) * -2.8853900817779268)
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.36, small, tl.where(x < 0, -large, large))


def with_unit_columns(x: Tensor) -> Tensor:
    """Returns `x` with elements of the last dimension side by side, copied only if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def target_of(x: Tensor) -> str:
    """Returns the name of the compile target whose tiles fit the device of `x`; sm_90 for the interpreter."""
    return _target(x.device.index or 0) if x.is_cuda else "sm_90"


@functools.cache
def _target(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    if major == 8 and minor in (6, 7, 9):
        return "sm_120"  # as little shared memory
    return {8: "sm_80", 9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


__all__ = ["CompileCase", "tanh", "target_of", "tl", "triton", "with_unit_columns"]
