"""What the room's kernels share: scores in powers of two, strides in whole vectors, the names of the targets."""

import functools
import math

import torch
from torch import Tensor

from vgpo_kernels._triton import tl, triton

# Elements in the widest load, 16 bytes at two bytes an element.
VECTOR = 8
LOG2E = math.log2(math.e)


@triton.jit
def tanh(x):
    """tanh to the last bits: a polynomial near 0, where one minus one would cancel, else from exp2, for any |x|."""
    square = x * x
    # Fitted to (tanh(x) / x - 1) / x^2 for |x| <= 0.6, to 1e-8.
    tail = -0.05387514 + square * (0.02111621 - square * 0.00627639)
    small = x + x * square * (-0.3333333 + square * (0.13332924 + square * tail))
    decay = tl.exp2(tl.abs(x) * -2.8853900817779268)
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.36, small, tl.where(x < 0, -large, large))


@triton.jit
def log2_scores(b_products, inner, outer, SOFTCAP: tl.constexpr):
    """Scores times log2(e), so that exp2 makes the probabilities.

    inner, outer: as `score_scales` returns them.
    """
    if SOFTCAP:
        return outer * tanh(b_products * inner)
    return b_products * inner


def score_scales(scale: float, softcap: float | None) -> dict[str, float | bool]:
    """Returns the kernels' arguments `inner`, `outer` and `SOFTCAP`."""
    if softcap is None:
        return {"inner": scale * LOG2E, "outer": 1.0, "SOFTCAP": False}
    return {"inner": scale / softcap, "outer": softcap * LOG2E, "SOFTCAP": True}


def with_unit_columns(x: Tensor) -> Tensor:
    """Returns `x` with elements of the last dimension side by side, copied only if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides_in_units(**tensors: Tensor) -> dict[str, int]:
    """Returns `stride_{name}{b,h,l}_units` of (B, H, L, D) tensors, and the UNIT that multiplies all of them.

    UNIT is VECTOR where that divides every stride, which the compiler then knows; a dimension of one has stride 0.
    """
    strides = {
        f"stride_{name}{axis}_units": x.stride(dim) if x.shape[dim] > 1 else 0
        for name, x in tensors.items()
        for dim, axis in enumerate("bhl")
    }
    unit = VECTOR if all(stride % VECTOR == 0 for stride in strides.values()) else 1
    return {name: stride // unit for name, stride in strides.items()} | {"UNIT": unit}


def padded_head(D: int) -> int:
    """Returns the head size of the tiles: the next power of two that a matrix product takes."""
    return max(16, int(triton.next_power_of_2(D)))


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
