"""What an implementation of the focus score has, and which one runs."""

from typing import Protocol

import torch
from torch import Tensor

from vgpo_kernels._dispatch import choose


class Backend(Protocol):
    """The function of an implementation."""

    def visual_focus_score(
        self,
        hidden_states: Tensor,
        visual_mask: Tensor,
        completion_mask: Tensor,
        image_ids: Tensor | None,
        seq_ids: Tensor | None,
    ) -> Tensor:
        """Returns the (B, L) scores."""


def backend(impl: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """Returns the implementation that runs an operation whose main input has that device and dtype."""
    match choose(impl, device, dtype)[0]:
        case "triton":
            from vgpo_kernels.focus import triton

            return triton
        case "native":
            from vgpo_kernels.focus import native

            return native
        case _:
            from vgpo_kernels.focus import reference

            return reference
