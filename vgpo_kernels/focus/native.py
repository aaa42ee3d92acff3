"""The focus score on CPUs: csrc/focus.h."""

import torch
from torch import Tensor

from vgpo_kernels import _native
from vgpo_kernels.focus.prototypes import index_prototypes

__all__ = ["visual_focus_score"]


def visual_focus_score(
    hidden_states: Tensor,
    visual_mask: Tensor,
    completion_mask: Tensor,
    image_ids: Tensor | None,
    seq_ids: Tensor | None,
) -> Tensor:
    """Returns the (B, L) fp32 focus scores; arguments as in the reference, hidden states not float64."""
    focus = hidden_states.new_zeros(hidden_states.shape[:2], dtype=torch.float32)
    completion = _tokens(completion_mask)
    if image_ids is None and seq_ids is None:
        # A row's prototype is number `row`, made of no token where the row has no image.
        visual, begin, end = _tokens(visual_mask), None, None
        bounds = torch.nn.functional.pad(visual_mask.sum(1).cumsum(0), (1, 0))
    else:
        group = index_prototypes(visual_mask, image_ids, seq_ids)
        visual, bounds = group.tokens, group.bounds
        begin, end = group.begin.flatten()[completion], group.end.flatten()[completion]
    _native.call("visual_focus", focus.view(-1), hidden_states, visual, bounds, completion, begin, end)
    return focus


def _tokens(mask: Tensor) -> Tensor:
    """Returns the (n,) numbers, row * L + position, of the tokens in a mask (B, L)."""
    return mask.flatten().nonzero().squeeze(1)
