"""What an implementation of attention has, and which one runs."""

from typing import Protocol

import torch
from torch import Tensor

from vgpo_kernels._dispatch import choose
from vgpo_kernels.attention.intervals import KeyMask


class Backend(Protocol):
    """The functions of an implementation; arguments as in the reference."""

    def attention_mass(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        segment_ids: Tensor,
        key_start: Tensor,
        key_end: Tensor,
        num_segments: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Returns the probabilities summed by segment of keys, (B, Hq, Lq, S)."""

    def attention_column_sum(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        positions: Tensor,
        key_start: Tensor,
        key_end: Tensor,
        reduction: str,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Returns the probabilities reduced over queries, (B, Hq, n)."""

    def visual_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: KeyMask,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns out, mass of visual keys and LSE."""

    def visual_attention_backward(
        self,
        grad_out: Tensor,
        grad_mass: Tensor | None,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: KeyMask,
        out: Tensor,
        mass: Tensor | None,
        lse: Tensor,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of q, k and v."""


def backend(impl: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """Returns the implementation that runs an operation whose main input has that device and dtype."""
    match choose(impl, device, dtype)[0]:
        case "triton":
            from vgpo_kernels.attention import triton

            return triton  # type: ignore[return-value]  # no mass only if told with_mass=False
        case "native":
            from vgpo_kernels.attention import native

            return native
        case _:
            from vgpo_kernels.attention import reference

            return reference
