"""What every kernel module shares: Triton itself, and what an ahead-of-time compilation needs to know."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one set of types, for `python -m vgpo_kernels compile`.

    Args:
        name: what the table shows.
        kernel: the `triton.jit` function.
        signature: type of each run-time argument, as in `{"x_ptr": "*fp32", "length": "i32"}`.
        constexprs: value of each compile-time argument.
        options: `num_warps`, `num_stages`.
    """

    name: str
    kernel: Callable[..., Any]
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)


__all__ = ["CompileCase", "tl", "triton"]
