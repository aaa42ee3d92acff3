"""What every kernel module shares: Triton itself, and what an ahead-of-time compilation needs to know."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl

_LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")


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
    """

    name: str
    kernel: Callable[..., Any]
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    tiles: Callable[[str], dict[str, int]] | None = None

    def on(self, target: str) -> tuple[dict[str, Any], dict[str, int]]:
        """Returns the compile-time arguments and the options on the target of that name."""
        tiles = {} if self.tiles is None else self.tiles(target)
        options = {name: value for name, value in tiles.items() if name in _LAUNCH_OPTIONS}
        constexprs = {name: value for name, value in tiles.items() if name not in _LAUNCH_OPTIONS}
        return self.constexprs | constexprs, self.options | options


__all__ = ["CompileCase", "tl", "triton"]
