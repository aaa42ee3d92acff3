"""What an implementation of the vocabulary pass has, and which one runs."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vgpo_kernels._dispatch import choose
from vgpo_kernels.policy_loss import backend as policy_loss_backend
from vgpo_kernels.policy_loss.config import PolicyLossConfig

Index = tuple[Tensor, ...]  # of tokens: (m,) int64 for each leading dimension
Logprobs = tuple[Tensor, Tensor, Tensor | None]  # logps, LSE, and entropy if it is needed


class Head(NamedTuple):
    """What makes logits of hidden states: softcap(hidden @ weight^T + bias) / temperature."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    temperature: float
    softcap: float | None


class Backend(policy_loss_backend.Backend, Protocol):
    """The functions of an implementation; logits are (B, T, V), what belongs to a token (B, T)."""

    @property
    def fused_logprobs(self) -> Callable[[Tensor, Index, Head, Tensor, bool], Logprobs] | None:
        """A kernel without logits from hidden (..., D), the index of m tokens, head, targets (m,) and whether the
        entropy is needed, to (m,) results; None: they are made from chunks of logits."""

    def logits_of(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """Returns hidden (n, D) @ weight (V, D)^T + bias (V,), written to `out` (n, V)."""

    def logits_logprobs(
        self,
        logits: Tensor,
        targets: Tensor,
        valid: Tensor | None,
        temperature: float,
        softcap: float | None,
        entropy: bool,
    ) -> Logprobs:
        """Returns logps, LSE and entropy (None unless asked for), 0 in rows that are not valid."""

    def logits_gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        valid: Tensor | None,
        lse: Tensor,
        entropy: Tensor | None,
        grad_logps: Tensor | None,
        grad_entropy: Tensor | None,
        grad_lse: Tensor | None,
        temperature: float,
        softcap: float | None,
        out: Tensor,
    ) -> None:
        """Writes to `out`, which may be `logits`, what the gradients of logps, entropy and LSE give by the logits."""

    def logits_loss(
        self,
        logits: Tensor,
        targets: Tensor,
        valid: Tensor | None,
        old_logps: Tensor | None,
        advantages: Tensor,
        ref_logps: Tensor | None,
        row_weights: Tensor | None,
        temperature: float,
        softcap: float | None,
        config: PolicyLossConfig,
        out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Returns logps and entropy, and writes the gradient of the token-level loss by the logits to `out`."""

    def logits_kl(self, logits_p: Tensor, logits_q: Tensor, temperature: float, softcap: float | None) -> Tensor:
        """Returns KL(softmax(p) || softmax(q)) of each row, (n,), of two (n, V) logits."""

    def scale_gradient_(self, gradient: Tensor, factor: Tensor) -> None:
        """Multiplies a gradient (B, T, V) by factor (), in place."""


def backend(impl: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """Returns the implementation that runs an operation whose main input has that device and dtype."""
    match choose(impl, device, dtype)[0]:
        case "triton":
            from vgpo_kernels.vocabulary import triton

            return triton
        case "native":
            from vgpo_kernels.vocabulary import native

            return native
        case _:
            from vgpo_kernels.vocabulary import reference

            return reference
