"""Checks that read the tensors, so that on a GPU they wait for the device."""

from torch import Tensor

from vgpo_kernels._validate import check_mask_values, forbid


def check_values(
    visual_mask: Tensor, completion_mask: Tensor, image_ids: Tensor | None, seq_ids: Tensor | None
) -> None:
    """Raises ValueError, with the first position, where masks or ids contradict each other.

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
