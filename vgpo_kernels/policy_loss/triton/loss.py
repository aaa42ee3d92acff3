"""The policy loss as one Triton launch: a program owns a row and walks it in tiles."""

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, tl, triton
from vgpo_kernels.policy_loss import terms
from vgpo_kernels.policy_loss.backend import LossInputs, LossResults
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.policy_loss.triton.terms import bounded_ratio, k3, kl_to_reference, surrogate, term_constants

# One token a thread: with two or more, Triton 3.6 spills a register in more forms of the kernel.
BLOCK = 512
WARPS = 16

RUN_TIME = (
    "length",
    *(f"{name}_stride_{axis}" for name in ("logps", "old", "ref", "adv", "mask", "tw") for axis in ("b", "t")),
    "trw_stride_b",
)


@triton.jit
def _load(p_row, stride_t, o_t, m_valid):
    # [BLOCK]: masked positions are never read, so they may hold anything.
    return tl.load(p_row + o_t * stride_t, mask=m_valid, other=0.0).to(tl.float32)


@triton.jit
def _load_valid(p_mask_row, stride_t, o_t, length):
    return tl.load(p_mask_row + o_t * stride_t, mask=o_t < length, other=0) != 0


@triton.jit
def _load_advantages(p_adv_row, adv_stride_t, p_tw_row, tw_stride_t, trajectory_weight, o_t, m_valid):
    b_adv = _load(p_adv_row, adv_stride_t, o_t, m_valid)
    if p_tw_row is not None:
        b_adv *= _load(p_tw_row, tw_stride_t, o_t, m_valid)
    # The trajectory weight of a row without tokens may be NaN.
    return tl.where(m_valid, b_adv * trajectory_weight, 0.0)


@triton.jit(do_not_specialize=RUN_TIME)
def policy_loss_kernel(
    logps_ptr,  # (B, T)
    old_ptr,  # (B, T) or None
    ref_ptr,  # (B, T) or None
    adv_ptr,  # (B, T)
    mask_ptr,  # (B, T)
    tw_ptr,  # (B, T) or None
    trw_ptr,  # (B,) or None
    loss_ptr,  # (B, T) contiguous
    grad_ptr,  # (B, T) contiguous
    rows_ptr,  # (B, ROW_COLUMNS) contiguous
    length,
    logps_stride_b,
    logps_stride_t,
    old_stride_b,
    old_stride_t,
    ref_stride_b,
    ref_stride_t,
    adv_stride_b,
    adv_stride_t,
    mask_stride_b,
    mask_stride_t,
    tw_stride_b,
    tw_stride_t,
    trw_stride_b,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    HIGH_NEGATIVE: tl.constexpr,
    BETA: tl.constexpr,
    KL_LOG_LIMIT: tl.constexpr,
    KL_LIMIT: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
    CISPO: tl.constexpr,
    SEQUENCE: tl.constexpr,
    ROW_MEAN: tl.constexpr,
    ROW_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_tile = tl.arange(0, BLOCK).to(tl.int64)
    p_logps = logps_ptr + row * logps_stride_b
    p_adv = adv_ptr + row * adv_stride_b
    p_mask = mask_ptr + row * mask_stride_b
    p_old = None
    if old_ptr is not None:
        p_old = old_ptr + row * old_stride_b
    p_ref = None
    if ref_ptr is not None:
        p_ref = ref_ptr + row * ref_stride_b
    p_tw = None
    if tw_ptr is not None:
        p_tw = tw_ptr + row * tw_stride_b
    trajectory_weight = 1.0
    if trw_ptr is not None:
        trajectory_weight = tl.load(trw_ptr + row * trw_stride_b).to(tl.float32)

    row_weight = 1.0
    row_log_ratio = 0.0
    row_gradient = 0.0
    if SEQUENCE or ROW_MEAN:
        acc_count = tl.zeros([BLOCK], tl.float32)
        acc_log_ratio = tl.zeros([BLOCK], tl.float32)
        acc_positive = tl.zeros([BLOCK], tl.float32)
        acc_negative = tl.zeros([BLOCK], tl.float32)
        for start in range(0, length, BLOCK):
            o_t = start + o_tile
            m_valid = _load_valid(p_mask, mask_stride_t, o_t, length)
            acc_count += m_valid.to(tl.float32)
            if SEQUENCE:
                b_adv = _load_advantages(p_adv, adv_stride_t, p_tw, tw_stride_t, trajectory_weight, o_t, m_valid)
                acc_positive += tl.where(b_adv < 0, 0.0, b_adv)
                acc_negative += tl.where(b_adv < 0, b_adv, 0.0)
                b_logps = _load(p_logps, logps_stride_t, o_t, m_valid)
                b_old = b_logps if p_old is None else _load(p_old, old_stride_t, o_t, m_valid)
                acc_log_ratio += b_logps - b_old
        row_inverse = tl.div_rn(1.0, tl.maximum(tl.sum(acc_count), 1.0))
        if ROW_MEAN:
            row_weight = row_inverse
        if SEQUENCE:
            # A row has one ratio, so its clipped surrogate is linear in the advantages of either sign.
            row_log_ratio = tl.sum(acc_log_ratio) * row_inverse
            if not CISPO:
                ratio, outside = bounded_ratio(row_log_ratio, False, LOW, HIGH, HIGH_NEGATIVE)
                negative_ratio, negative_outside = bounded_ratio(row_log_ratio, True, LOW, HIGH, HIGH_NEGATIVE)
                # Advantages of both signs cancel: added in one sum, not as the difference of two larger ones.
                acc_moving = tl.where(outside, 0.0, acc_positive) + tl.where(negative_outside, 0.0, acc_negative)
                moving = tl.sum(acc_moving)
                # Where both move it is the same ratio; where none does, it may be infinite.
                row_ratio = tl.where(outside, negative_ratio, ratio)
                row_gradient = tl.where((moving == 0.0) & (row_ratio > 0.0), 0.0, -row_ratio * moving * row_inverse)
            if ref_ptr is not None and (KL_WEIGHTED and BETA != 0.0):
                acc_through = tl.zeros([BLOCK], tl.float32)
                for start in range(0, length, BLOCK):
                    o_t = start + o_tile
                    m_valid = _load_valid(p_mask, mask_stride_t, o_t, length)
                    b_logps = _load(p_logps, logps_stride_t, o_t, m_valid)
                    b_ref = _load(p_ref, ref_stride_t, o_t, m_valid)
                    b_kl, _ = kl_to_reference(b_logps, row_log_ratio, b_ref, KL_LOG_LIMIT, KL_LIMIT, True, True)
                    acc_through += b_kl
                row_gradient += BETA * tl.sum(acc_through) * row_inverse

    acc_loss = tl.zeros([BLOCK], tl.float32)
    acc_tokens = tl.zeros([BLOCK], tl.float32)
    acc_low = tl.zeros([BLOCK], tl.float32)
    acc_high = tl.zeros([BLOCK], tl.float32)
    acc_dual = tl.zeros([BLOCK], tl.float32)
    acc_change = tl.zeros([BLOCK], tl.float32)
    acc_kl = tl.zeros([BLOCK], tl.float32)
    acc_ratio = tl.zeros([BLOCK], tl.float32)
    acc_logps = tl.zeros([BLOCK], tl.float32)
    max_ratio = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        o_t = start + o_tile
        m_valid = _load_valid(p_mask, mask_stride_t, o_t, length)
        b_logps = _load(p_logps, logps_stride_t, o_t, m_valid)
        b_adv = _load_advantages(p_adv, adv_stride_t, p_tw, tw_stride_t, trajectory_weight, o_t, m_valid)
        m_negative = b_adv < 0
        b_change = b_logps - b_logps
        if p_old is not None:
            b_change = b_logps - _load(p_old, old_stride_t, o_t, m_valid)
        b_log_ratio = b_change
        if SEQUENCE:
            b_log_ratio = tl.where(m_valid, row_log_ratio, 0.0)

        b_loss, b_grad = surrogate(b_logps, b_log_ratio, b_adv, LOW, HIGH, HIGH_NEGATIVE, CISPO)
        if SEQUENCE and not CISPO:
            b_grad = tl.zeros([BLOCK], tl.float32)
        if ref_ptr is not None:
            b_ref = _load(p_ref, ref_stride_t, o_t, m_valid)
            b_kl, b_kl_grad = kl_to_reference(
                b_logps, b_log_ratio, b_ref, KL_LOG_LIMIT, KL_LIMIT, KL_WEIGHTED, SEQUENCE
            )
            acc_kl += b_kl
            if BETA != 0.0:
                b_loss += BETA * b_kl
                b_grad += BETA * b_kl_grad
        if SEQUENCE:
            b_grad += row_gradient
        b_loss = tl.where(m_valid, b_loss, 0.0)
        b_grad = tl.where(m_valid, b_grad, 0.0)
        m_row = o_t < length
        tl.store(loss_ptr + row * length + o_t, b_loss, mask=m_row)
        tl.store(grad_ptr + row * length + o_t, b_grad * row_weight, mask=m_row)

        b_ratio = tl.where(m_valid, tl.exp(b_log_ratio), 0.0)
        acc_loss += b_loss
        acc_tokens += m_valid.to(tl.float32)
        acc_low += (m_negative & (b_log_ratio < LOW)).to(tl.float32)
        acc_high += ((b_adv > 0) & (b_log_ratio > HIGH)).to(tl.float32)
        acc_dual += (m_negative & (b_log_ratio > HIGH_NEGATIVE)).to(tl.float32)
        if p_old is not None:
            acc_change += k3(b_change, tl.exp(b_change))
        acc_ratio += b_ratio
        acc_logps -= b_logps
        max_ratio = tl.maximum(max_ratio, b_ratio)

    p_rows = rows_ptr + row * ROW_COLUMNS
    tl.store(p_rows, tl.sum(acc_loss) * row_weight)
    tl.store(p_rows + 1, tl.sum(acc_tokens))
    tl.store(p_rows + 2, tl.sum(acc_low))
    tl.store(p_rows + 3, tl.sum(acc_high))
    tl.store(p_rows + 4, tl.sum(acc_dual))
    tl.store(p_rows + 5, tl.sum(acc_change))
    tl.store(p_rows + 6, tl.sum(acc_kl))
    ratios = tl.sum(acc_ratio)
    tl.store(p_rows + 7, ratios)
    tl.store(p_rows + 8, tl.sum(acc_logps))
    # A maximum may drop NaN, a sum does not.
    tl.store(p_rows + 9, tl.where(ratios == ratios, tl.max(max_ratio), ratios))


def policy_loss(logps: Tensor, inputs: LossInputs, config: PolicyLossConfig) -> LossResults:
    """Returns the loss of log-probabilities (B, T) and its gradient."""
    rows, length = logps.shape
    advantages = inputs.advantages[:, None].expand(rows, length) if inputs.advantages.dim() == 1 else inputs.advantages
    per_token = torch.empty((rows, length), dtype=torch.float32, device=logps.device)
    gradient = torch.empty_like(per_token)
    partial = torch.empty((rows, terms.ROW_COLUMNS), dtype=torch.float32, device=logps.device)
    tensors = {
        "logps": logps,
        "old": inputs.old_logps,
        "ref": inputs.ref_logps,
        "adv": advantages,
        "mask": inputs.completion_mask,
        "tw": inputs.token_weights,
    }
    trajectory_weights = inputs.trajectory_weights
    policy_loss_kernel[(rows,)](
        **{f"{name}_ptr": tensor for name, tensor in tensors.items()},
        **{f"{name}_stride_b": 0 if x is None else x.stride(0) for name, x in tensors.items()},
        **{f"{name}_stride_t": 0 if x is None else x.stride(1) for name, x in tensors.items()},
        trw_ptr=trajectory_weights,
        trw_stride_b=0 if trajectory_weights is None else trajectory_weights.stride(0),
        loss_ptr=per_token,
        grad_ptr=gradient,
        rows_ptr=partial,
        length=length,
        **_constants(config),
        num_warps=WARPS,
    )
    loss, metrics, normalizer = terms.reduce_rows(partial, config, inputs.num_items)
    return LossResults(loss, per_token, metrics, gradient, normalizer)


def _constants(config: PolicyLossConfig) -> dict[str, float | bool | int | None]:
    return term_constants(config) | {
        "SEQUENCE": config.importance_sampling_level == "sequence",
        "ROW_MEAN": config.loss_type == "grpo",
        "ROW_COLUMNS": terms.ROW_COLUMNS,
        "BLOCK": BLOCK,
    }


def compile_cases() -> list[CompileCase]:
    """Returns the smallest and the largest form of the kernel."""
    everything = PolicyLossConfig.official(
        loss_type="grpo", importance_sampling_level="sequence", beta=0.01, kl_importance_weighted=True
    )
    return [
        _compile_case("policy_loss token bf16", PolicyLossConfig(), "*bf16", optional=False),
        _compile_case("policy_loss official fp32", PolicyLossConfig.official(), "*fp32", optional=True),
        _compile_case("policy_loss sequence kl fp32", everything, "*fp32", optional=True),
    ]


def _compile_case(name: str, config: PolicyLossConfig, dtype: str, *, optional: bool) -> CompileCase:
    given = {f"{tensor}_ptr": dtype for tensor in ("logps", "adv")} | {"mask_ptr": "*i1"}
    given |= {f"{tensor}_ptr": "*fp32" for tensor in ("loss", "grad", "rows")}
    extra = [f"{tensor}_ptr" for tensor in ("old", "ref", "tw", "trw")]
    constants = _constants(config)
    signature = {
        **given,
        **dict.fromkeys(extra, dtype if optional else "constexpr"),
        **dict.fromkeys(RUN_TIME, "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    absent = {} if optional else dict.fromkeys(extra)
    ordered = {argument: signature[argument] for argument in policy_loss_kernel.arg_names}
    return CompileCase(name, policy_loss_kernel, ordered, {**absent, **constants}, {"num_warps": WARPS})
