"""The operator `vgpo::policy_loss`, and its autograd: the gradient is made in the forward, the backward scales it."""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._dispatch import checks_values
from vgpo_kernels._dtypes import compute_dtype
from vgpo_kernels._operator import operator_body
from vgpo_kernels._validate import check_mask_values
from vgpo_kernels.policy_loss.backend import INPUTS_SCHEMA, LossInputs, LossResults, backend
from vgpo_kernels.policy_loss.config import SETTINGS_SCHEMA, PolicyLossConfig
from vgpo_kernels.policy_loss.terms import METRICS


@torch.library.custom_op(
    "vgpo::policy_loss",
    mutates_args=(),
    schema=f"(Tensor logps, {INPUTS_SCHEMA}, *, {SETTINGS_SCHEMA}, str? impl) -> "
    "(Tensor loss, Tensor per_token, Tensor metrics, Tensor gradient, Tensor normalizer)",
)
@operator_body
def policy_loss(logps: Tensor, *loss_inputs: Tensor | None, impl: str | None, **settings: Any) -> LossResults:
    """Returns the loss, its per-token values, metrics, gradient before normalisation, and normaliser."""
    inputs = LossInputs._make(loss_inputs)
    if checks_values(impl, logps):
        check_mask_values("completion_mask", inputs.completion_mask)
    return backend(impl, logps.device, logps.dtype).policy_loss(logps.detach(), inputs, PolicyLossConfig(**settings))


@policy_loss.register_fake
def _(logps: Tensor, *_: Tensor | None, **__: Any) -> tuple[Tensor, ...]:
    shapes = ((), logps.shape, (len(METRICS),), logps.shape, ())
    return tuple(logps.new_empty(shape, dtype=compute_dtype(logps.dtype)) for shape in shapes)


class PolicyLoss(torch.autograd.Function):
    """`vgpo::policy_loss` with its gradient.

    Not registered with the operator: torch would look through the schema in each call, 0.1 ms for as many arguments.
    """

    @staticmethod
    def forward(logps: Tensor, inputs: LossInputs, config: PolicyLossConfig, impl: str | None) -> tuple[Tensor, ...]:
        """Returns what the operator does."""
        return policy_loss(logps, *inputs, impl=impl, **config.settings())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps gradient and normaliser. Only the loss has a gradient; without zeros made up for the other outputs."""
        _, _, _, gradient, normalizer = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, normalizer)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        """Returns the gradient of the log-probabilities, normalised."""
        if grad_loss is None:
            return None, None, None, None
        gradient, normalizer = ctx.saved_tensors
        return (gradient * (grad_loss * normalizer)).to(ctx.dtype), None, None, None
