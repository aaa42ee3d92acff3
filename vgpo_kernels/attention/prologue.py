"""What an operator is given for a mask: what each key is, and the interval of keys that each query sees.

Torch takes a dozen launches to make them. Where Triton runs, one kernel does (`triton.key_mask`); where values are
checked, torch's are checked before they are narrowed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels._dispatch import debugging
from vgpo_kernels._operator import operator_body
from vgpo_kernels.attention import intervals
from vgpo_kernels.attention.intervals import MaskRule


class KeyMask(NamedTuple):
    """A mask as operators take it.

    Args:
        keys: (B, Lk), the segment of each key or -1; or its kind, int8.
        key_start, key_end: (B, Lq) integers.
    """

    keys: Tensor
    key_start: Tensor
    key_end: Tensor


def of_segments(rule: MaskRule, segment_ids: Tensor, q: Tensor, impl: str | None) -> KeyMask:
    """Returns the mask of an operator that is told the segments of keys."""
    if _by_kernel(q, impl):
        return KeyMask(*_launch(rule, segment_ids, True))
    return KeyMask(intervals.segments(segment_ids, rule.key_mask), *intervals.build(rule, q.shape[0], q.device))


def of_visual_keys(rule: MaskRule, visual_mask: Tensor, q: Tensor, impl: str | None) -> KeyMask:
    """Returns the mask of an operator that is told the kinds of keys."""
    visual_mask = visual_mask.detach()
    if _by_kernel(q, impl):
        return KeyMask(*_launch(rule, visual_mask, False))
    return KeyMask(intervals.key_kinds(visual_mask, rule.key_mask), *intervals.build(rule, q.shape[0], q.device))


def _by_kernel(q: Tensor, impl: str | None) -> bool:
    """Whether the kernel makes them; asked of tensors without data, too, and while a graph is made."""
    if impl not in (None, "triton") or q.dtype == torch.float64 or not (impl or q.is_cuda):
        return False
    return torch.compiler.is_compiling() or not debugging()


def _launch(rule: MaskRule, keys: Tensor, segments: bool) -> tuple[Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor] = torch.ops.vgpo.attention_prologue(
        keys, segments, rule.key_mask, rule.cu_seqlens, rule.cache_lengths, rule.key_start, rule.key_end,
        rule.lengths[0], rule.first_query, rule.causal, rule.window,
    )  # fmt: skip
    return made


@operator_body
def _run(
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
    from vgpo_kernels.attention.triton import make_mask

    return make_mask(rule, keys, segments)


def _fake(keys: Tensor, segments: bool, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    bounds = [keys.new_empty((keys.shape[0], options[5]), dtype=torch.int32) for _ in range(2)]
    return keys.new_empty(keys.shape, dtype=torch.int32 if segments else torch.int8), bounds[0], bounds[1]


# Not a `custom_op`, whose Python costs as much as the launches that the kernel saves.
LIBRARY = torch.library.Library("vgpo", "FRAGMENT")
NAME = "vgpo::attention_prologue"
LIBRARY.define(
    "attention_prologue(Tensor keys, bool segments, Tensor? key_mask, Tensor? cu_seqlens, Tensor? cache_lengths, "
    "Tensor? key_start, Tensor? key_end, SymInt Lq, SymInt first_query, bool causal, SymInt? window) "
    "-> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
for device in ("CPU", "CUDA"):
    LIBRARY.impl("attention_prologue", _run, device)
torch.library.register_fake(NAME, _fake, lib=LIBRARY)
