"""The operator `vgpo::visual_focus_score`."""

import torch
from torch import Tensor

from vgpo_kernels._dispatch import checks_values
from vgpo_kernels._operator import operator_body
from vgpo_kernels.focus.backend import backend
from vgpo_kernels.focus.checks import check_values


@torch.library.custom_op("vgpo::visual_focus_score", mutates_args=())
@operator_body
def visual_focus_score(
    hidden_states: Tensor,
    visual_mask: Tensor,
    completion_mask: Tensor,
    image_ids: Tensor | None,
    seq_ids: Tensor | None,
    impl: str | None,
) -> Tensor:
    """Scores each completion token against the visual prototypes; arguments as in the public function."""
    module = backend(impl, hidden_states.device, hidden_states.dtype)
    if checks_values(impl, hidden_states):
        check_values(visual_mask, completion_mask, image_ids, seq_ids)
    return module.visual_focus_score(hidden_states, visual_mask.bool(), completion_mask.bool(), image_ids, seq_ids)


@visual_focus_score.register_fake
def _(hidden_states: Tensor, *_: Tensor | str | None) -> Tensor:
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    return hidden_states.new_empty(hidden_states.shape[:2], dtype=dtype)
