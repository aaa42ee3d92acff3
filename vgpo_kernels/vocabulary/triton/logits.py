"""Log-probabilities, entropy, policy loss and gradient from logits in memory: a program owns the row of a token.

It takes one pass for the row's statistics, and another for the gradient, with the loss's coefficient between them.
"""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, target_of, tl, triton
from vgpo_kernels._tuning import Tiles, tunable
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.policy_loss.triton.terms import kl_to_reference, surrogate, term_constants
from vgpo_kernels.vocabulary.triton.logprobs import MULTIPROCESSORS
from vgpo_kernels.vocabulary.triton.row_helpers import (
    VECTOR,
    row_candidates,
    row_threads,
    row_tiles,
    scores,
    softcap_scales,
    vectors_match,
    whole_vectors,
)
from vgpo_kernels.vocabulary.triton.row_passes import row_statistics, write_gradient, write_zeros

SCALE_BLOCK = 8192
SCALE_WARPS = 8
RESIDENT = 3  # programs that the registers of an sm_90 hold, with 48 KiB under way
SCALE_RUN_TIME = ("rows", "length", "vocabulary", "stride_b", "stride_t")
RUN_TIME = (
    "length",
    "vocabulary",
    *(f"{name}_stride_{axis}" for name in ("logits", "out") for axis in ("b", "t")),
)


@triton.jit
def _load(ptr, row):
    return 0.0 if ptr is None else tl.load(ptr + row).to(tl.float32)


@triton.jit
def _store(ptr, row, value):
    if ptr is not None:
        tl.store(ptr + row, value)


@triton.jit(do_not_specialize=RUN_TIME)
def logits_kernel(
    logits_ptr,  # (B, T, V), last stride 1
    targets_ptr,  # (B, T), as all below but the last
    valid_ptr,  # None: every row
    logps_ptr,  # written; None without STATISTICS
    lse_ptr,  # written, or None; without STATISTICS read
    entropy_ptr,  # written, or None; without STATISTICS read
    old_ptr,  # or None
    ref_ptr,  # or None
    adv_ptr,  # None where there is no loss
    weights_ptr,  # or None
    grad_logps_ptr,  # or None
    grad_entropy_ptr,  # or None
    grad_lse_ptr,  # or None
    out_ptr,  # (B, T, V), last stride 1, or None
    score_scale,
    inverse_cap,
    length,
    vocabulary,
    logits_stride_b,
    logits_stride_t,
    out_stride_b,
    out_stride_t,
    STATISTICS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    OUT_ALIGNED: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    HIGH_NEGATIVE: tl.constexpr,
    BETA: tl.constexpr,
    KL_LOG_LIMIT: tl.constexpr,
    KL_LIMIT: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
    CISPO: tl.constexpr,
    R: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_row = logits_ptr + (row // length) * logits_stride_b + (row % length) * logits_stride_t
    head, n_vectors = whole_vectors(p_row, vocabulary, VEC)
    p_out = None
    if out_ptr is not None:
        p_out = out_ptr + (row // length) * out_stride_b + (row % length) * out_stride_t
    valid = True
    if valid_ptr is not None:
        valid = tl.load(valid_ptr + row) != 0
    if not valid:
        if STATISTICS:
            _store(logps_ptr, row, 0.0)
            _store(lse_ptr, row, 0.0)
            _store(entropy_ptr, row, 0.0)
        if p_out is not None:
            write_zeros(p_out, head, vocabulary, OUT_ALIGNED, R, VEC)
    else:
        target = tl.load(targets_ptr + row)
        in_range = (target >= 0) & (target < vocabulary)
        target = tl.where(in_range, target, -1).to(tl.int32)
        if STATISTICS:
            u_scale = 1.0
            scale2 = score_scale * 1.4426950408889634
            # In range or not, it is some element of the row.
            target_x = tl.load(p_row + tl.where(in_range, target, 0)).to(tl.float32)
            target_u = scores(target_x, inverse_cap, SOFTCAP)
            center, total, log_total, dot = row_statistics(
                p_row,
                head,
                n_vectors,
                vocabulary,
                target_u,
                scale2,
                inverse_cap,
                SOFTCAP,
                entropy_ptr is not None,
                R,
                VEC,
            )
            # The distance to the maximum first: near a probability of 1 an LSE would cancel against the score.
            logps = tl.where(in_range, (target_u - center) * score_scale - log_total, float("nan"))
            _store(logps_ptr, row, logps)
            _store(lse_ptr, row, center * score_scale + log_total)
            _store(entropy_ptr, row, log_total - dot / total * 0.6931471805599453)
        else:
            u_scale = score_scale
            scale2 = 1.4426950408889634
            center = tl.load(lse_ptr + row)
            total = 1.0
        if p_out is not None:
            if adv_ptr is None:
                coefficient = _load(grad_logps_ptr, row)
            else:
                log_ratio = logps - logps if old_ptr is None else logps - _load(old_ptr, row)
                _, coefficient = surrogate(logps, log_ratio, _load(adv_ptr, row), LOW, HIGH, HIGH_NEGATIVE, CISPO)
                if ref_ptr is not None:
                    ref = _load(ref_ptr, row)
                    _, kl_gradient = kl_to_reference(logps, log_ratio, ref, KL_LOG_LIMIT, KL_LIMIT, KL_WEIGHTED, False)
                    coefficient += BETA * kl_gradient
                if weights_ptr is not None:
                    coefficient *= _load(weights_ptr, row)
            slope = score_scale * inverse_cap if SOFTCAP else score_scale
            factor = _load(grad_lse_ptr, row) - coefficient
            entropy_factor = None
            if grad_entropy_ptr is not None:
                by_entropy = _load(grad_entropy_ptr, row)
                factor -= by_entropy * _load(entropy_ptr, row)
                entropy_factor = by_entropy * slope * -0.6931471805599453
            write_gradient(
                p_row,
                p_out,
                head,
                n_vectors,
                vocabulary,
                target,
                u_scale,
                center,
                scale2,
                tl.div_rn(factor * slope, total),
                entropy_factor,
                coefficient * slope,
                inverse_cap,
                SOFTCAP,
                OUT_ALIGNED,
                R,
                VEC,
            )


@tunable(
    "logits", case="logits loss bf16", candidates=row_candidates((512, 2), (512, 1), (1024, 1), (256, 2), (256, 4))
)
def logits_tiles(vocabulary: int, itemsize: int, target: str, *, softcap: bool) -> Tiles:
    """Returns tiles of two vectors a thread: as many bytes in flight as the registers of 1024 threads hold."""
    return row_tiles(row_threads(vocabulary, itemsize, softcap), 2, target)


def logits_logprobs(
    logits: Tensor, targets: Tensor, valid: Tensor | None, temperature: float, softcap: float | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns logps, LSE and entropy (None unless asked for), (B, T) each, of logits (B, T, V); 0 where not valid."""
    logps, lse, entropies = (_empty_like_rows(logits) for _ in range(3))
    _launch(
        logits,
        targets,
        valid,
        temperature,
        softcap,
        {"logps": logps, "lse": lse, "entropy": entropies if entropy else None},
        statistics=True,
    )
    return logps, lse, entropies if entropy else None


def logits_gradient(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    temperature: float,
    softcap: float | None,
    out: Tensor,
) -> None:
    """Writes to `out` the gradient of sum(grad_logps * logps + grad_entropy * entropy + grad_lse * lse) by the logits.

    `out` (B, T, V), last stride 1, may be `logits` itself; rows that are not valid become 0.
    """
    by_token = {"lse": lse, "grad_logps": grad_logps, "grad_lse": grad_lse}
    if grad_entropy is not None:
        by_token |= {"entropy": entropy, "grad_entropy": grad_entropy}
    _launch(logits, targets, valid, temperature, softcap, by_token, statistics=False, out=out)


def logits_loss(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None,
    old_logps: Tensor | None,
    advantages: Tensor,
    ref_logps: Tensor | None,
    row_weights: Tensor | None,
    temperature: float,
    softcap: float | None,
    config: PolicyLossConfig,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns logps and entropy (B, T), and writes the gradient of the token-level loss by the logits to `out`.

    `advantages` are those of the loss, weights included; `row_weights` (B, T) multiply each token's loss, None being 1.
    """
    logps = _empty_like_rows(logits)
    entropy = torch.empty_like(logps)
    by_token = {
        "logps": logps,
        "entropy": entropy,
        "old": old_logps,
        "adv": advantages,
        "ref": ref_logps if config.beta != 0.0 else None,
        "weights": row_weights,
    }
    _launch(logits, targets, valid, temperature, softcap, by_token, statistics=True, config=config, out=out)
    return logps, entropy


def _empty_like_rows(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)


def _launch(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None,
    temperature: float,
    softcap: float | None,
    by_token: dict[str, Tensor | None],
    *,
    statistics: bool,
    config: PolicyLossConfig | None = None,
    out: Tensor | None = None,
) -> None:
    """Launches a program a row; `by_token` are the (B, T) arguments that there are."""
    batch, length, vocabulary = logits.shape
    if batch * length == 0:
        return
    by_token = {name: by_token.get(name) for name in _BY_TOKEN} | {"targets": targets, "valid": valid}
    logits_kernel[(batch * length,)](
        logits_ptr=logits,
        out_ptr=out,
        **{f"{name}_ptr": None if x is None else x.contiguous() for name, x in by_token.items()},
        **softcap_scales(temperature, softcap),
        length=length,
        vocabulary=vocabulary,
        **{
            f"{name}_stride_{axis}": 0 if x is None else x.stride(dim)
            for name, x in (("logits", logits), ("out", out))
            for dim, axis in enumerate("bt")
        },
        STATISTICS=statistics,
        OUT_ALIGNED=out is not None and vectors_match(logits, out),
        **term_constants(PolicyLossConfig() if config is None else config),
        VEC=VECTOR // logits.element_size(),
        **logits_tiles(vocabulary, logits.element_size(), target_of(logits), softcap=softcap is not None),
    )


_BY_TOKEN = ("logps", "lse", "entropy", "old", "ref", "adv", "weights", "grad_logps", "grad_entropy", "grad_lse")


@triton.jit(do_not_specialize=SCALE_RUN_TIME)
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


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """Multiplies a gradient (B, T, V), last stride 1, by factor (), in place; the host does not wait for it.

    Where the factor is 1 that costs one wave of programs: they share the pieces of all rows.
    """
    batch, length, vocabulary = gradient.shape
    rows = batch * length
    programs = min(rows * triton.cdiv(vocabulary, SCALE_BLOCK), RESIDENT * MULTIPROCESSORS[target_of(gradient)])
    scale_kernel[(programs,)](
        x_ptr=gradient,
        factor_ptr=factor,
        rows=rows,
        length=length,
        vocabulary=vocabulary,
        stride_b=gradient.stride(0),
        stride_t=gradient.stride(1),
        BLOCK=SCALE_BLOCK,
        num_warps=SCALE_WARPS,
    )


def compile_cases() -> list[CompileCase]:
    """Returns the statistics, the gradient and the loss in the forms that take most registers."""
    kl = PolicyLossConfig.official(beta=0.01, kl_importance_weighted=True)
    loss = ("logps", "entropy", "old", "adv", "weights")
    backward = ("lse", "entropy", "grad_logps", "grad_entropy", "grad_lse")
    scale = {"x_ptr": "*bf16", "factor_ptr": "*fp32", **dict.fromkeys(SCALE_RUN_TIME, "i32")}
    return [
        _compile_case("logits logprobs bf16", "bf16", ("logps", "lse")),
        _compile_case("logits logprobs entropy softcap fp32", "fp32", ("logps", "lse", "entropy"), softcap=True),
        _compile_case("logits gradient bf16", "bf16", backward[:3], out="bf16", statistics=False),
        _compile_case("logits gradient softcap fp32", "fp32", backward, out="bf16", statistics=False, softcap=True),
        _compile_case("logits loss bf16", "bf16", loss, out="bf16"),
        _compile_case("logits loss kl softcap bf16", "bf16", (*loss, "ref"), out="bf16", softcap=True, config=kl),
        _compile_case("logits loss short bf16 to fp32", "bf16", loss, out="fp32", vocabulary=1000, aligned=False),
        _compile_case("logits loss kl fp32", "fp32", (*loss, "ref"), out="fp32", config=kl),
        CompileCase("scale bf16", scale_kernel, scale, {"BLOCK": SCALE_BLOCK}, {"num_warps": SCALE_WARPS}),
    ]


def _compile_case(
    name: str,
    dtype: str,
    by_token: tuple[str, ...],
    *,
    out: str | None = None,
    statistics: bool = True,
    softcap: bool = False,
    config: PolicyLossConfig | None = None,
    vocabulary: int = 152064,
    aligned: bool = True,
) -> CompileCase:
    pointers = {"logits_ptr": f"*{dtype}", "targets_ptr": "*i64", "valid_ptr": "*i1"}
    pointers |= {f"{name}_ptr": "*fp32" for name in by_token} | ({} if out is None else {"out_ptr": f"*{out}"})
    absent = {f"{name}_ptr": None for name in (*_BY_TOKEN, "out") if f"{name}_ptr" not in pointers}
    constants: dict[str, Any] = {"STATISTICS": statistics, "SOFTCAP": softcap, "OUT_ALIGNED": aligned}
    constants |= term_constants(PolicyLossConfig() if config is None else config)
    signature = pointers | dict.fromkeys(RUN_TIME, "i32") | {"score_scale": "fp32", "inverse_cap": "fp32"}
    itemsize = 4 if dtype == "fp32" else 2
    return CompileCase(
        name,
        logits_kernel,
        signature,
        absent | constants | {"VEC": VECTOR // itemsize},
        tiles=lambda target: logits_tiles(vocabulary, itemsize, target, softcap=softcap),
    )
