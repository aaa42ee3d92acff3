"""The operator `vgpo::policy_loss`, and its autograd: the gradient is made in the forward, the backward scales it."""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._dispatch import checks_values, implementation
from vgpo_kernels._operator import operator_body
from vgpo_kernels._validate import check_mask_values
from vgpo_kernels.policy_loss import terms
from vgpo_kernels.policy_loss.config import SCHEMA, PolicyLossConfig
from vgpo_kernels.policy_loss.logprob import compute_dtype

_TENSORS = (
    "Tensor logps, Tensor? old_logps, Tensor advantages, Tensor completion_mask, Tensor? ref_logps, "
    "Tensor? token_weights, Tensor? trajectory_weights, Tensor? num_items"
)
_RESULTS = "Tensor loss, Tensor per_token, Tensor metrics, Tensor gradient, Tensor scale"


@torch.library.custom_op(
    "vgpo::policy_loss", mutates_args=(), schema=f"({_TENSORS}, {SCHEMA}, str? impl) -> ({_RESULTS})"
)
@operator_body
def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    trajectory_weights: Tensor | None,
    num_items: Tensor | None,
    *settings_and_impl: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss (), per-token loss (B, T), metrics, unnormalised gradient (B, T) and its normaliser ()."""
    *settings, impl = settings_and_impl
    if checks_values(impl, logps):
        check_mask_values("completion_mask", completion_mask)
    config = PolicyLossConfig(*settings)
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = implementation("policy_loss", impl, logps).policy_loss(
        logps.detach(),
        old_logps,
        advantages,
        completion_mask,
        ref_logps,
        token_weights,
        trajectory_weights,
        num_items,
        config,
    )
    return results


@policy_loss.register_fake
def _(logps: Tensor, *_args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logps)
    return (
        logps.new_empty((), dtype=dtype),
        logps.new_empty(logps.shape, dtype=dtype),
        logps.new_empty((len(terms.METRICS),), dtype=dtype),
        logps.new_empty(logps.shape, dtype=dtype),
        logps.new_empty((), dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Only the loss has a gradient; without zeros made up for the other outputs.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3], output[4])
    ctx.dtype = inputs[0].dtype
    ctx.constants = len(inputs) - 1


def _backward(ctx: Any, grad_loss: Tensor | None, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * (1 + ctx.constants)
    gradient, scale = ctx.saved_tensors
    return (gradient * (grad_loss * scale)).to(ctx.dtype), *[None] * ctx.constants


class PolicyLoss(torch.autograd.Function):
    """`vgpo::policy_loss` with its gradient.

    Not registered with the operator: torch would look through the schema in each call, 0.1 ms for as many arguments.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        """Returns what the operator does."""
        return policy_loss(*arguments)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)
