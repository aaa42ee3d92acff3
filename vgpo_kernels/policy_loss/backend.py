"""What an implementation of the loss takes and returns, and which one runs."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vgpo_kernels._dispatch import choose
from vgpo_kernels.policy_loss.config import PolicyLossConfig

# The fields of LossInputs in an operator's schema.
INPUTS_SCHEMA = (
    "Tensor? old_logps, Tensor advantages, Tensor completion_mask, Tensor? ref_logps, Tensor? token_weights, "
    "Tensor? trajectory_weights, Tensor? num_items"
)


class LossInputs(NamedTuple):
    """The constants of the loss, as in the public function.

    Args:
        old_logps, ref_logps, token_weights: (B, T) floating.
        advantages: (B, T) or (B,) floating.
        completion_mask: (B, T) bool or 0/1.
        trajectory_weights: (B,) floating.
        num_items: () number of tokens that "dapo" and "cispo" divide by.
    """

    old_logps: Tensor | None
    advantages: Tensor
    completion_mask: Tensor
    ref_logps: Tensor | None
    token_weights: Tensor | None
    trajectory_weights: Tensor | None
    num_items: Tensor | None = None


class LossResults(NamedTuple):
    """The loss of a batch, fp32 (fp64 for fp64 log-probabilities).

    Args:
        loss: ().
        per_token: (B, T), 0 where masked.
        metrics: (len(METRICS),).
        gradient: (B, T), of the sum over tokens by the log-probabilities, before it is multiplied by the normaliser.
        normalizer: (), the factor between the sum over tokens and the loss.
    """

    loss: Tensor
    per_token: Tensor
    metrics: Tensor
    gradient: Tensor
    normalizer: Tensor


class Backend(Protocol):
    """The functions of an implementation."""

    def policy_loss(self, logps: Tensor, inputs: LossInputs, config: PolicyLossConfig) -> LossResults:
        """Returns the loss of log-probabilities (B, T) and its gradient."""


def backend(impl: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """Returns the implementation that runs an operation whose main input has that device and dtype."""
    match choose(impl, device, dtype)[0]:
        case "triton":
            from vgpo_kernels.policy_loss import triton

            return triton
        case "native":
            from vgpo_kernels.policy_loss import native

            return native
        case _:
            from vgpo_kernels.policy_loss import reference

            return reference
