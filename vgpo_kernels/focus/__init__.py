"""How much each generated token looks at the image, from the last hidden states; public: `visual_focus_score`.

`api` checks (`checks`) and calls the operator (`ops`), which runs `reference`, `native` or `triton`.
"""

from vgpo_kernels.focus.api import visual_focus_score

__all__ = ["visual_focus_score"]
