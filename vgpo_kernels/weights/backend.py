"""What an implementation of the weights has, and which one runs."""

from typing import Protocol

import torch
from torch import Tensor

from vgpo_kernels._dispatch import choose
from vgpo_kernels.weights.config import VGPOConfig


class Backend(Protocol):
    """The function of an implementation."""

    def weights(
        self,
        focus: Tensor,
        completion_mask: Tensor,
        group_ids: Tensor,
        has_visual: Tensor,
        advantages: Tensor | None,
        config: VGPOConfig,
        source: str,
        warmup: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns token weights (B, T), trajectory weights (B,), normalized (B, T), gate (B, T), score (B,)."""


def backend(impl: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """Returns the implementation that runs an operation whose main input has that device and dtype."""
    match choose(impl, device, dtype)[0]:
        case "triton":
            from vgpo_kernels.weights import triton

            return triton
        case "native":
            from vgpo_kernels.weights import native

            return native
        case _:
            from vgpo_kernels.weights import reference

            return reference
