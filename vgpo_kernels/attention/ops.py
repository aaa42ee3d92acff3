"""The operators: their schemas, and the shapes of what they return."""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._dispatch import checks_values
from vgpo_kernels._operator import operator_body
from vgpo_kernels._validate import forbid
from vgpo_kernels.attention import backends, intervals
from vgpo_kernels.attention.backend import backend

LARGEST_MASS = 1.1  # of a query; above 1 by what an LSE made in half precision may be off


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _inside(key_start: Tensor, key_end: Tensor, q: Tensor, k: Tensor, impl: str | None) -> tuple[Tensor, Tensor]:
    """Returns int32 intervals within [0, Lk]: checked where reading is free, cut to it on a GPU."""
    if checks_values(impl, q):
        intervals.check_values(key_start, key_end, k.shape[2])
    return _cut(key_start, q, k, impl), _cut(key_end, q, k, impl)


def _cut(bound: Tensor, q: Tensor, k: Tensor, impl: str | None) -> Tensor:
    if bound.dtype != torch.int32 or checks_values(impl, q):
        bound = bound.clamp(min=0, max=k.shape[2]).to(torch.int32)
    # Others in int32 are the prologue's, which has cut them.
    return bound.contiguous()


@torch.library.custom_op("vgpo::attention_mass", mutates_args=())
@operator_body
def attention_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    segment_ids: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    num_segments: int,
    scale: float,
    softcap: float | None,
    impl: str | None,
) -> Tensor:
    """Sums attention probabilities by segment; (B, Hq, Lq, S), arguments as in the reference."""
    if checks_values(impl, q):
        wrong = (segment_ids < -1) | (segment_ids >= num_segments)
        forbid(wrong, "segment_ids", f"-1 or less than num_segments = {num_segments}", segment_ids)
    key_start, key_end = _inside(key_start, key_end, q, k, impl)
    mass = backend(impl, q.device, q.dtype).attention_mass(
        q, k, lse, segment_ids.int(), key_start, key_end, num_segments, scale, softcap
    )
    if checks_values(impl, q) and (largest := mass.sum(-1).nan_to_num(0.0).max()) > LARGEST_MASS:
        raise ValueError(
            f"lse: expected that of the same q, k, scale and masks, got one under which a query's masses sum to "
            f"{largest:.4g}"
        )
    return mass


@attention_mass.register_fake
def _(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    lse: Tensor,  # noqa: ARG001
    segment_ids: Tensor,  # noqa: ARG001
    key_start: Tensor,  # noqa: ARG001
    key_end: Tensor,  # noqa: ARG001
    num_segments: int,
    scale: float,  # noqa: ARG001
    softcap: float | None,  # noqa: ARG001
    impl: str | None,  # noqa: ARG001
) -> Tensor:
    return q.new_empty((*q.shape[:3], num_segments), dtype=_wide(q))


@torch.library.custom_op("vgpo::attention_column_sum", mutates_args=())
@operator_body
def attention_column_sum(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    keys: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    reduction: str,
    scale: float,
    softcap: float | None,
    impl: str | None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    first_query: int = 0,
) -> Tensor:
    """Sums attention probabilities by key; (B, Hq, n) for positions, (B, Hq, Lk) for a mask of keys.

    Takes the mask as its rule says it: kernels find the blocks of queries to visit while they make the intervals.
    """
    lengths = (q.shape[2], k.shape[2])
    rule = intervals.MaskRule(lengths, first_query, causal, window, key_mask, cu_seqlens, None, key_start, key_end)
    if not checks_values(impl, q):
        from vgpo_kernels.attention.triton import columns  # only Triton's kernels do not check values

        return columns(q, k, lse, keys, rule, reduction, scale, softcap)
    Lk = lengths[1]
    positions = intervals.positions(keys, key_mask, Lk)
    forbid((positions < -1) | (positions >= Lk), "keys", f"positions from 0 to {Lk - 1}, or -1", positions)
    bounds = _inside(*intervals.build(rule, q.shape[0], q.device), q, k, impl)
    run = backend(impl, q.device, q.dtype).attention_column_sum
    received = run(q, k, lse, positions.int(), *bounds, reduction, scale, softcap)
    if keys.dtype != torch.bool:
        return received
    places = torch.where(positions < 0, Lk, positions)[:, None].expand_as(received)
    whole = received.new_zeros((*received.shape[:2], Lk + 1))
    return whole.scatter(2, places, received)[..., :Lk].contiguous()


@attention_column_sum.register_fake
def _(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    lse: Tensor,  # noqa: ARG001
    keys: Tensor,
    *options: Any,  # noqa: ARG001
) -> Tensor:
    return q.new_empty((*q.shape[:2], keys.shape[1]), dtype=_wide(q))


@torch.library.custom_op("vgpo::visual_attention", mutates_args=())
@operator_body
def visual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_kinds: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    scale: float,
    softcap: float | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attends, and sums the probabilities of visual keys: out, mass, lse; arguments as in the reference."""
    key_start, key_end = _inside(key_start, key_end, q, k, impl)
    run = backend(impl, q.device, q.dtype).visual_attention
    return run(q, k, v, key_kinds, key_start, key_end, scale, softcap)


@visual_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,  # noqa: ARG001
    key_kinds: Tensor,  # noqa: ARG001
    key_start: Tensor,  # noqa: ARG001
    key_end: Tensor,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    softcap: float | None,  # noqa: ARG001
    impl: str | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3], dtype=_wide(q)), q.new_empty(q.shape[:3], dtype=_wide(q))


@torch.library.custom_op("vgpo::visual_attention_backward", mutates_args=())
@operator_body
def visual_attention_backward(
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_kinds: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    out: Tensor,
    mass: Tensor | None,
    lse: Tensor,
    scale: float,
    softcap: float | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; arguments as in the reference."""
    key_start, key_end = _cut(key_start, q, k, impl), _cut(key_end, q, k, impl)
    run = backend(impl, q.device, q.dtype).visual_attention_backward
    return run(grad_out, grad_mass, grad_lse, q, k, v, key_kinds, key_start, key_end, out, mass, lse, scale, softcap)


@visual_attention_backward.register_fake
def _(
    grad_out: Tensor,  # noqa: ARG001
    grad_mass: Tensor | None,  # noqa: ARG001
    grad_lse: Tensor | None,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_kinds: Tensor,  # noqa: ARG001
    key_start: Tensor,  # noqa: ARG001
    key_end: Tensor,  # noqa: ARG001
    out: Tensor,  # noqa: ARG001
    mass: Tensor | None,  # noqa: ARG001
    lse: Tensor,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    softcap: float | None,  # noqa: ARG001
    impl: str | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return grads[0], grads[1], grads[2]


@torch.library.custom_op("vgpo::attention_with_lse", mutates_args=())
@operator_body
def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_kinds: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attends with a stock kernel: out and its LSE; arguments as in `backends.run`."""
    key_start, key_end = _inside(key_start, key_end, q, k, None)
    mask = backends.Mask(key_kinds, key_start, key_end, cu_seqlens, max_seqlen, causal, window)
    out, lse = backends.run(backend, q, k, v, mask, scale, softcap)
    return out.contiguous(), lse.contiguous()


@attention_with_lse.register_fake
def _(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,  # noqa: ARG001
    key_kinds: Tensor,  # noqa: ARG001
    key_start: Tensor,  # noqa: ARG001
    key_end: Tensor,  # noqa: ARG001
    cu_seqlens: Tensor | None,  # noqa: ARG001
    max_seqlen: int | None,  # noqa: ARG001
    causal: bool,  # noqa: ARG001
    window: int | None,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    softcap: float | None,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3], dtype=_wide(q))
