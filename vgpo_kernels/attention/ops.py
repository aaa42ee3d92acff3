"""The operators of attention: their schemas, the shapes of what they return, and their gradients.

Under `torch.library` operators take tensors and numbers only: masks are bundled behind them, as `KeyMask`.
"""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._dispatch import checks_values, debugging
from vgpo_kernels._operator import operator_body
from vgpo_kernels._validate import forbid
from vgpo_kernels.attention import intervals, stock_kernels
from vgpo_kernels.attention.backend import backend
from vgpo_kernels.attention.intervals import KeyMask, MaskRule

LARGEST_MASS = 1.1  # of a query; above 1 by what an LSE made in half precision may be off


def key_mask(
    rule: MaskRule, keys: Tensor, segments: bool, q: Tensor, impl: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns starts and ends (B, Lq) of queries, and segments or kinds (B, Lk) of keys, as operators take them.

    Torch takes a dozen launches to make them. On GPUs one kernel does; where values are checked, torch's are checked
    before they are narrowed.

    Args:
        keys: (B, Lk), the segments; or, without `segments`, what is not 0 where a key is visual.
    """
    keys = keys.detach()
    # Asked of tensors without data, too, and while a graph is made.
    on_triton = impl == "triton" or (impl is None and q.is_cuda)
    if on_triton and q.dtype != torch.float64 and (torch.compiler.is_compiling() or not debugging()):
        kinds, start, end = torch.ops.vgpo.attention_prologue(
            keys, segments, rule.key_mask, rule.cu_seqlens, rule.cache_lengths, rule.key_start, rule.key_end,
            rule.lengths[0], rule.first_query, rule.causal, rule.window,
        )  # fmt: skip
        return start, end, kinds
    start, end = intervals.build(rule, q.shape[0], q.device)
    return start, end, (intervals.segments if segments else intervals.key_kinds)(keys, rule.key_mask)


@operator_body
def _attention_prologue(
    keys: Tensor,
    segments: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cache_lengths: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    Lq: int,
    first_query: int,
    causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns keys, key_start and key_end, int32 within [0, Lk]; kinds are int8."""
    lengths = (Lq, keys.shape[1])
    rule = MaskRule(lengths, first_query, causal, window, key_mask, cu_seqlens, cache_lengths, key_start, key_end)
    from vgpo_kernels.attention.triton import make_mask  # the one implementation that makes a mask by a kernel

    return make_mask(rule, keys, segments)


def _fake_prologue(keys: Tensor, segments: bool, *rule: Any) -> tuple[Tensor, Tensor, Tensor]:
    start = keys.new_empty((keys.shape[0], rule[5]), dtype=torch.int32)
    return keys.new_empty(keys.shape, dtype=torch.int32 if segments else torch.int8), start, torch.empty_like(start)


# Not a `custom_op`, whose Python costs as much as the launches that the kernel saves.
LIBRARY = torch.library.Library("vgpo", "FRAGMENT")
LIBRARY.define(
    "attention_prologue(Tensor keys, bool segments, Tensor? key_mask, Tensor? cu_seqlens, Tensor? cache_lengths, "
    "Tensor? key_start, Tensor? key_end, SymInt Lq, SymInt first_query, bool causal, SymInt? window) "
    "-> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
for device in ("CPU", "CUDA"):
    LIBRARY.impl("attention_prologue", _attention_prologue, device)
torch.library.register_fake("vgpo::attention_prologue", _fake_prologue, lib=LIBRARY)


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
    # Other bounds in int32 come from `attention_prologue`, which has cut them.
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
    q: Tensor, _k: Tensor, _lse: Tensor, _ids: Tensor, _start: Tensor, _end: Tensor, num_segments: int, *_: Any
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
    rule = MaskRule(lengths, first_query, causal, window, key_mask, cu_seqlens, None, key_start, key_end)
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
def _(q: Tensor, _k: Tensor, _lse: Tensor, keys: Tensor, *_: Any) -> Tensor:
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
    mask = KeyMask(*_inside(key_start, key_end, q, k, impl), key_kinds)
    return backend(impl, q.device, q.dtype).visual_attention(q, k, v, mask, scale, softcap)


@visual_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
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
    mask = KeyMask(_cut(key_start, q, k, impl), _cut(key_end, q, k, impl), key_kinds)
    run = backend(impl, q.device, q.dtype).visual_attention_backward
    return run(grad_out, grad_mass, grad_lse, q, k, v, mask, out, mass, lse, scale, softcap)


@visual_attention_backward.register_fake
def _(
    _out: Tensor, _mass: Tensor | None, _lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
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
    """Attends with the kernel of a backend: out and its LSE; arguments as in `stock_kernels.Backend.run`."""
    mask = KeyMask(*_inside(key_start, key_end, q, k, None), key_kinds)
    Lq, Lk = q.shape[2], k.shape[2]
    rule = MaskRule((Lq, Lk), Lk - Lq, causal, window, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    out, lse = stock_kernels.BACKENDS[backend].run(q, k, v, mask, rule, scale, softcap)
    return out.contiguous(), lse.contiguous()


@attention_with_lse.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=_wide(q))


def _save_visual_attention(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    q, k, v, key_kinds, key_start, key_end, ctx.scale, ctx.softcap, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, key_kinds, key_start, key_end, *output)


def _grad_visual_attention(
    ctx: Any, grad_out: Tensor | None, grad_mass: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, key_kinds, key_start, key_end, out, mass, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = visual_attention_backward(
        grad_out, grad_mass, grad_lse, q, k, v, key_kinds, key_start, key_end, out, mass, lse,
        ctx.scale, ctx.softcap, ctx.impl,
    )  # fmt: skip
    return *grads, *(None,) * 6


def _save_attention_with_lse(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    q, k, v, key_kinds, key_start, key_end, _, _, _, _, ctx.scale, ctx.softcap, _ = inputs
    ctx.save_for_backward(q, k, v, key_kinds, key_start, key_end, *output)


def _grad_attention_with_lse(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, key_kinds, key_start, key_end, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = visual_attention_backward(
        grad_out, None, grad_lse, q, k, v, key_kinds, key_start, key_end, out, None, lse, ctx.scale, ctx.softcap, None
    )
    return *grads, *(None,) * 10


def _refuse(*_: Any) -> Any:
    raise RuntimeError("visual attention is differentiable once: its gradient has none")


visual_attention.register_autograd(_grad_visual_attention, setup_context=_save_visual_attention)
attention_with_lse.register_autograd(_grad_attention_with_lse, setup_context=_save_attention_with_lse)
visual_attention_backward.register_autograd(_refuse)
