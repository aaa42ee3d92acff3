"""Checks of the arguments: their kinds and shapes from the public function, their values from the operator."""

from torch import Tensor

from vgpo_kernels._validate import FLOATING, INTEGER, MASK, check_mask_values, check_not_empty, check_tensor, forbid


def check_arguments(
    hidden_states: Tensor,
    visual_mask: Tensor,
    completion_mask: Tensor,
    image_ids: Tensor | None,
    seq_ids: Tensor | None,
) -> None:
    """Raises ValueError or TypeError for a wrong kind, shape, dtype or device; reads no values."""
    check_tensor("hidden_states", hidden_states, shape=("B", "L", "D"), dtypes=FLOATING)
    check_not_empty("hidden_states", hidden_states)
    shape, device = hidden_states.shape[:2], hidden_states.device
    check_tensor("visual_mask", visual_mask, shape=shape, dtypes=MASK, device=device)
    check_tensor("completion_mask", completion_mask, shape=shape, dtypes=MASK, device=device)
    for name, ids in (("image_ids", image_ids), ("seq_ids", seq_ids)):
        if ids is not None:
            check_tensor(name, ids, shape=shape, dtypes=INTEGER, device=device)


def check_values(
    visual_mask: Tensor, completion_mask: Tensor, image_ids: Tensor | None, seq_ids: Tensor | None
) -> None:
    """Raises ValueError, with the first position, where masks or ids contradict each other; on a GPU it waits for it.

    Args:
        visual_mask: (B, L), 0 or 1.
        completion_mask: (B, L), 0 or 1.
        image_ids: (B, L) integers or None; from 0 at visual tokens.
        seq_ids: (B, L) integers or None; from 0 at visual and completion tokens.
    """
    check_mask_values("visual_mask", visual_mask)
    check_mask_values("completion_mask", completion_mask)
    visual, completion = visual_mask.bool(), completion_mask.bool()
    forbid(visual & completion, "completion_mask", "no visual token in the completion", completion_mask)
    if image_ids is not None:
        forbid(visual & (image_ids < 0), "image_ids", "0 or more at every visual token", image_ids)
    if seq_ids is not None:
        used = visual | completion
        forbid(used & (seq_ids < 0), "seq_ids", "0 or more at visual and completion tokens", seq_ids)
