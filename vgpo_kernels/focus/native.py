"""The focus score on CPUs: csrc/focus.h."""

from vgpo_kernels.focus.reference import visual_focus_score

__all__ = ["visual_focus_score"]
