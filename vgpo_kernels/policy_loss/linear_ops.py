"""The operators on hidden states and a head's weight: log-probabilities, the policy loss, visual dependency.

The loss makes its gradients in the forward, and its backward only scales them; log-probs make logits again in the
backward. Gradients that nobody wants are tensors of no elements.
"""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._dispatch import checks_values, implementation
from vgpo_kernels._operator import operator_body
from vgpo_kernels._validate import check_mask_values
from vgpo_kernels.policy_loss import linear, terms
from vgpo_kernels.policy_loss.config import SCHEMA, PolicyLossConfig
from vgpo_kernels.policy_loss.logprob import check_targets, compute_dtype


@torch.library.custom_op("vgpo::linear_logprobs", mutates_args=())
@operator_body
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logps, LSE and entropy (no elements unless asked for), shaped as `targets`, 0 where masked."""
    valid = _valid(mask, targets, hidden, impl)
    check_targets(targets, valid, weight.shape[0])
    index = valid.nonzero(as_tuple=True)
    found = implementation("policy_loss", impl, hidden).linear_logprobs(
        hidden.detach(), index, weight.detach(), bias, targets[index], temperature, softcap, entropy, None
    )
    return tuple(_filled(x, index, targets, hidden) for x in found)  # type: ignore[return-value]


@linear_logprobs.register_fake
def _(
    hidden: Tensor,
    _weight: Tensor,
    _bias: Tensor | None,
    targets: Tensor,
    _mask: Tensor | None,
    _temperature: float,
    _softcap: float | None,
    entropy: bool,
    _impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden)
    shapes = (targets.shape, targets.shape, targets.shape if entropy else (0,))
    logps, lse, entropies = (hidden.new_empty(shape, dtype=dtype) for shape in shapes)
    return logps, lse, entropies


@torch.library.custom_op("vgpo::linear_logprobs_backward", mutates_args=())
@operator_body
def linear_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    grad_logps: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of hidden states, weight and bias, in their dtypes."""
    gradients = linear.logprobs_backward(
        implementation("policy_loss", impl, hidden),
        hidden,
        linear.Head(weight, bias, temperature, softcap),
        targets,
        torch.ones_like(targets, dtype=torch.bool) if mask is None else mask != 0,
        lse,
        entropy if entropy.shape == targets.shape else None,
        grad_logps,
        grad_entropy,
        grad_lse,
        linear.Wanted(wants_hidden, wants_weight, wants_bias),
    )
    made = (gradients.hidden, gradients.weight, gradients.bias)
    return tuple(hidden.new_zeros(0) if x is None else x.to(hidden.dtype) for x in made)  # type: ignore[return-value]


@linear_logprobs_backward.register_fake
def _(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    wanted = arguments[-4:-1]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    made = [hidden.new_empty(shape if wants else (0,)) for shape, wants in zip(shapes, wanted, strict=True)]
    return made[0], made[1], made[2]


def _setup_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, targets, mask, *ctx.options, _, ctx.impl = inputs
    _, lse, entropy = output
    if not entropy.numel():
        ctx.mark_non_differentiable(entropy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, mask, lse, entropy)


def _logprobs_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(grad is None for grad in grads):
        return (None,) * 9
    wanted = ctx.needs_input_grad[:3]
    saved = ctx.saved_tensors
    made = linear_logprobs_backward(*saved, *grads, *ctx.options, *wanted, ctx.impl)
    return *(x if wants else None for x, wants in zip(made, wanted, strict=True)), *[None] * 6


linear_logprobs.register_autograd(_logprobs_backward, setup_context=_setup_logprobs)


_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? old_logps, Tensor advantages, "
    "Tensor completion_mask, Tensor? ref_logps, Tensor? token_weights, Tensor? trajectory_weights, Tensor? num_items"
)
_OPTIONS = (
    "float temperature, float? softcap, int? memory_budget, bool wants_hidden, bool wants_weight, bool wants_bias"
)
_RESULTS = (
    "Tensor loss, Tensor per_token, Tensor metrics, Tensor logps, Tensor entropy, "
    "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor scale"
)


@torch.library.custom_op(
    "vgpo::linear_policy_loss",
    mutates_args=(),
    schema=f"({_TENSORS}, {_OPTIONS}, {SCHEMA}, str? impl) -> ({_RESULTS})",
)
@operator_body
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    trajectory_weights: Tensor | None,
    num_items: Tensor | None,
    temperature: float,
    softcap: float | None,
    memory_budget: int | None,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
    *settings_and_impl: Any,
) -> tuple[Tensor, ...]:
    """Returns loss, per-token loss, metrics, logps, entropy, gradients before normalisation, and the normaliser."""
    *settings, impl = settings_and_impl
    check_targets(targets, _valid(completion_mask, targets, hidden, impl, "completion_mask"), weight.shape[0])
    by_token, logps, entropy, gradients = linear.policy_loss(
        implementation("policy_loss", impl, hidden),
        hidden.detach(),
        linear.Head(weight.detach(), bias, temperature, softcap),
        targets,
        old_logps,
        advantages,
        completion_mask,
        ref_logps,
        token_weights,
        trajectory_weights,
        num_items,
        PolicyLossConfig(*settings),
        memory_budget,
        linear.Wanted(wants_hidden, wants_weight, wants_bias),
    )
    loss, per_token, metrics, scale = by_token
    made = (gradients.hidden, gradients.weight, gradients.bias)
    return (
        loss,
        per_token,
        metrics,
        logps,
        entropy,
        *(hidden.new_zeros(0) if x is None else x for x in made),
        scale,
    )


@linear_policy_loss.register_fake
def _(hidden: Tensor, weight: Tensor, _bias: Tensor | None, targets: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    wants_hidden, wants_weight, wants_bias = arguments[10:13]
    dtype = compute_dtype(hidden)

    def made(wanted: bool, shape: Any, dtype: torch.dtype) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype) if wanted else hidden.new_empty(0)

    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(targets.shape, dtype=dtype),
        hidden.new_empty((len(terms.METRICS),), dtype=dtype),
        hidden.new_empty(targets.shape, dtype=dtype),
        hidden.new_empty(targets.shape, dtype=dtype),
        made(wants_hidden, hidden.shape, hidden.dtype),
        made(wants_weight, weight.shape, dtype),
        made(wants_bias, weight.shape[:1], dtype),
        hidden.new_empty((), dtype=dtype),
    )


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Only the loss has a gradient; without zeros made up for the other outputs.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[5:])
    ctx.dtype = inputs[0].dtype
    ctx.wanted = inputs[14:17]
    ctx.inputs = len(inputs)


def _loss_backward(ctx: Any, grad_loss: Tensor | None, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * ctx.inputs
    *gradients, scale = ctx.saved_tensors
    factor = grad_loss * scale
    scaled = [_scaled(x, factor, ctx.dtype) if wants else None for x, wants in zip(gradients, ctx.wanted, strict=True)]
    return *scaled, *[None] * (ctx.inputs - 3)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns gradient * factor in `dtype`, without a copy in another one."""
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


linear_policy_loss.register_autograd(_loss_backward, setup_context=_setup_loss)


@torch.library.custom_op("vgpo::linear_visual_dependency", mutates_args=())
@operator_body
def linear_visual_dependency(
    hidden: Tensor,
    hidden_corrupted: Tensor,
    weight: Tensor,
    weight_corrupted: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    kind: str,
    impl: str | None,
) -> Tensor:
    """Returns how much each token depends on what was corrupted, shaped as `targets`, 0 where masked."""
    valid = _valid(mask, targets, hidden, impl)
    check_targets(targets, valid, weight.shape[0])
    index = valid.nonzero(as_tuple=True)
    found = linear.visual_dependency(
        implementation("policy_loss", impl, hidden),
        hidden,
        hidden_corrupted,
        linear.Head(weight, bias, temperature, softcap),
        linear.Head(weight_corrupted, bias, temperature, softcap),
        targets,
        index,
        kind,
    )
    return _filled(found, index, targets, hidden)


@linear_visual_dependency.register_fake
def _(
    hidden: Tensor, _corrupted: Tensor, _weight: Tensor, _other: Tensor, _bias: Tensor | None, targets: Tensor, *_: Any
) -> Tensor:
    return hidden.new_empty(targets.shape, dtype=compute_dtype(hidden))


def _valid(mask: Tensor | None, targets: Tensor, hidden: Tensor, impl: str | None, name: str = "mask") -> Tensor:
    if mask is None:
        return torch.ones_like(targets, dtype=torch.bool)
    if checks_values(impl, hidden):
        check_mask_values(name, mask)
    return mask != 0


def _filled(values: Tensor | None, index: linear.Index, targets: Tensor, hidden: Tensor) -> Tensor:
    """Returns the values at `index` of a tensor shaped as `targets`, 0 elsewhere; no elements for None."""
    dtype = compute_dtype(hidden)
    if values is None:
        return hidden.new_zeros(0, dtype=dtype)
    return torch.zeros(targets.shape, dtype=dtype, device=targets.device).index_put_(index, values)
