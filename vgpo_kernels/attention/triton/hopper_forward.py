"""Attention forward of sm_90 in Gluon, asked for by `VGPO_HOPPER=1`; no GPU has run it.

Results are those of `forward`, which calls it. Gluon is experimental, so only a launch or a compile case imports it.
"""

import os
import warnings
from typing import Any

import torch
import triton
from torch import Tensor

from vgpo_kernels._triton import CompileCase, target_of
from vgpo_kernels.attention.intervals import KeyMask
from vgpo_kernels.attention.triton.key_blocks import find_keys
from vgpo_kernels.attention.triton.primitives import VECTOR, score_scales


def _tiles(head: int) -> dict[str, int]:
    """Tiles by the head size: with 128 keys and heads of 128, masks and mass would spill."""
    tiles = {"BLOCK_N": 128 if head == 64 else 64, "STAGES": 4}
    # What a warp group of the three holds after they have shared out 504 registers a thread.
    return tiles | {"CONSUMER_REGISTERS": 232, "PRODUCER_REGISTERS": 40}


def takes(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> bool:
    """Returns whether `VGPO_HOPPER=1` asks for the kernel and it covers the launch; warns if it does not."""
    if os.environ.get("VGPO_HOPPER") != "1":
        return False
    why = obstacle(q, k, v, scale, softcap)
    if why is not None:
        warnings.warn(f"VGPO_HOPPER=1: the plain kernel runs, since {why}", RuntimeWarning, stacklevel=2)
    return why is None


def obstacle(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> str | None:
    """Returns why the kernel does not cover a launch, whose rows are whole and whose scale is not negative, or None."""
    if not q.is_cuda or target_of(q) != "sm_90":
        return "the tensors are not on a GPU of compute capability 9.0"
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] not in (64, 128):
        return f"it takes heads of 64 or 128 in bf16 or fp16, and these are of {q.shape[-1]} in {q.dtype}"
    if softcap is not None:
        return "it has no soft-cap"
    if not scale >= 1e-30:  # a masked product, -inf, times a scale of 0 would make NaN
        return f"it takes scales of at least 1e-30, and this is {scale}"
    # A box of TMA has extents and strides above 0.
    if any(x.numel() == 0 or min(x.stride()) <= 0 for x in (q, k, v)):
        return "a tensor is empty or has a stride of 0"
    return None


def visual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyMask,
    scale: float,
    with_mass: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns output, mass and LSE of a launch that `takes` takes, as `forward` does."""
    from vgpo_kernels.attention.triton.hopper_kernel import ROWS, hopper_forward_kernel

    B, Hq, Lq, D = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, Hq, Lq), dtype=torch.float32)
    mass = torch.empty_like(lse) if with_mass else None
    tiles = _tiles(D)
    keys = find_keys(mask, tiles["BLOCK_N"])
    hopper_forward_kernel[(B * Hq * triton.cdiv(Lq, 2 * ROWS.value),)](
        v_ptr=v,
        weight_ptr=keys.weight,
        kind_ptr=keys.kind,
        start_ptr=mask.start.contiguous(),
        end_ptr=mask.end.contiguous(),
        out_ptr=out,
        mass_ptr=mass,
        lse_ptr=lse,
        Hq=Hq,
        group=Hq // k.shape[1],
        Lq=Lq,
        Lk=k.shape[2],
        inner=score_scales(scale, None)["inner"],
        HEAD=D,
        num_warps=4,
        **_boxes({"q_desc": (q, ROWS.value), "k_desc": (k, tiles["BLOCK_N"]), "v_desc": (v, tiles["BLOCK_N"])}),
        **_value_strides(v),
        **tiles,
    )
    return out, mass, lse


def _box_layout() -> Any:
    """Returns the layout of boxes of (B, H, L, D) tensors: rows of 128 bytes of shared memory."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(128, 16, 4)


def _boxes(tensors: dict[str, tuple[Tensor, int]]) -> dict[str, Any]:
    """Returns descriptors of tensors, by name, with the rows of a box of each."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return {
        name: TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[-1]], _box_layout())
        for name, (x, rows) in tensors.items()
    }


def _value_strides(v: Tensor) -> dict[str, int]:
    return {f"stride_v{axis}_units": v.stride(dim) // VECTOR for dim, axis in enumerate("bhl")} | {"UNIT": VECTOR}


def compile_cases() -> list[CompileCase]:
    """Returns the kernel at both head sizes and types, and once without mass."""
    return [
        _compile_case("bf16", 64),
        _compile_case("bf16", 128),
        _compile_case("fp16", 128),
        _compile_case("bf16", 128, mass=False),
    ]


def _compile_case(dtype: str, D: int, mass: bool = True) -> CompileCase:
    from vgpo_kernels.attention.triton.hopper_kernel import NUMBERS, ROWS, hopper_forward_kernel

    tiles = _tiles(D)
    rows = {"q_desc": ROWS.value, "k_desc": tiles["BLOCK_N"], "v_desc": tiles["BLOCK_N"]}
    signature = {name: f"tensordesc<{dtype}[1, 1, {n}, {D}],{_box_layout()!r}>" for name, n in rows.items()}
    signature |= dict.fromkeys(("v_ptr", "out_ptr"), f"*{dtype}") | dict.fromkeys(("weight_ptr", "lse_ptr"), "*fp32")
    signature |= dict.fromkeys(("start_ptr", "end_ptr"), "*i32") | {"kind_ptr": "*i8", "inner": "fp32"}
    signature |= dict.fromkeys(NUMBERS, "i32")
    constexprs: dict[str, Any] = {"UNIT": VECTOR, "HEAD": D} | tiles
    if mass:
        signature["mass_ptr"] = "*fp32"
    else:
        constexprs["mass_ptr"] = None
    return CompileCase(
        f"attention forward in Gluon {dtype} D {D}{'' if mass else ' no mass'}",
        hopper_forward_kernel,
        signature,
        constexprs,
        {"num_warps": 4},
        targets=("sm_90",),
    )
