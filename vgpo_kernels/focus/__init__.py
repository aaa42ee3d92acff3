"""How much each generated token looks at the image, from the model's last hidden states."""

from vgpo_kernels.focus.api import visual_focus_score

__all__ = ["visual_focus_score"]
