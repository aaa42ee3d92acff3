"""Scaling in place that costs one wave of programs where the factor is 1: they share the pieces of all rows."""

from torch import Tensor

from vgpo_kernels._triton import CompileCase, target_of, tl, triton
from vgpo_kernels.policy_loss.kernels.linear import MULTIPROCESSORS

BLOCK = 8192
WARPS = 8
RESIDENT = 3  # programs that the registers of an sm_90 have room for, with 48 KiB under way
RUN_TIME = ("rows", "length", "vocabulary", "stride_b", "stride_t")


@triton.jit(do_not_specialize=RUN_TIME)
def scale_kernel(
    x_ptr,  # (B, T, V), last stride 1
    factor_ptr,  # ()
    rows,
    length,
    vocabulary,
    stride_b,
    stride_t,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        pieces = tl.cdiv(vocabulary, BLOCK)
        for index in range(tl.program_id(0), rows * pieces, tl.num_programs(0)):
            row = (index // pieces).to(tl.int64)
            o_v = (index % pieces) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
            p_x = x_ptr + (row // length) * stride_b + (row % length) * stride_t + o_v
            b_x = tl.load(p_x, mask=o_v < vocabulary, other=0.0).to(tl.float32)
            tl.store(p_x, (b_x * factor).to(x_ptr.dtype.element_ty), mask=o_v < vocabulary)


def scale_(values: Tensor, factor: Tensor) -> None:
    """Multiplies `values` (B, T, V), last stride 1, by factor (), in place; the host does not wait for it."""
    batch, length, vocabulary = values.shape
    rows = batch * length
    programs = min(rows * triton.cdiv(vocabulary, BLOCK), RESIDENT * MULTIPROCESSORS[target_of(values)])
    scale_kernel[(programs,)](
        x_ptr=values,
        factor_ptr=factor,
        rows=rows,
        length=length,
        vocabulary=vocabulary,
        stride_b=values.stride(0),
        stride_t=values.stride(1),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def compile_cases() -> list[CompileCase]:
    """Returns the one form of the kernel."""
    signature = {"x_ptr": "*bf16", "factor_ptr": "*fp32", **dict.fromkeys(RUN_TIME, "i32"), "BLOCK": "constexpr"}
    return [CompileCase("scale bf16", scale_kernel, signature, {"BLOCK": BLOCK}, {"num_warps": WARPS})]
