"""The operators on hidden states and a head's weight: log-probabilities, the policy loss, visual dependency.

The loss makes its gradients in the forward, and its backward only scales them; log-probs make logits again in the
backward. Gradients that are not needed are tensors of no elements.
"""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._dtypes import compute_dtype
from vgpo_kernels._operator import operator_body
from vgpo_kernels.policy_loss.backend import INPUTS_SCHEMA, LossInputs
from vgpo_kernels.policy_loss.config import SETTINGS_SCHEMA, PolicyLossConfig
from vgpo_kernels.policy_loss.terms import METRICS
from vgpo_kernels.vocabulary import chunked
from vgpo_kernels.vocabulary.backend import Head, Index, backend
from vgpo_kernels.vocabulary.checks import valid_tokens
from vgpo_kernels.vocabulary.chunked import GradientsNeeded


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
    index = _index(valid_tokens("mask", mask, targets, weight.shape[0], impl), targets)
    head = Head(weight.detach(), bias, temperature, softcap)
    logps, lse, entropies = chunked.logprobs(
        backend(impl, hidden.device, hidden.dtype), hidden.detach(), head, targets[index], index, entropy
    )
    nothing = lse.new_zeros(0) if entropies is None else _filled(entropies, index, targets)
    return _filled(logps, index, targets), _filled(lse, index, targets), nothing


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
    logps = hidden.new_empty(targets.shape, dtype=compute_dtype(hidden.dtype))
    return logps, torch.empty_like(logps), logps.new_empty(targets.shape if entropy else (0,))


@torch.library.custom_op(
    "vgpo::linear_logprobs_backward",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? mask, Tensor lse, Tensor entropy, "
    "Tensor? grad_logps, Tensor? grad_lse, Tensor? grad_entropy, float temperature, float? softcap, *, "
    "bool needs_hidden, bool needs_weight, bool needs_bias, str? impl) -> (Tensor, Tensor, Tensor)",
)
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
    *,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    impl: str | None,
) -> tuple[Tensor, ...]:
    """Returns the gradients of hidden states, weight and bias, in their dtypes."""
    gradients = chunked.logprobs_backward(
        backend(impl, hidden.device, hidden.dtype),
        hidden,
        Head(weight, bias, temperature, softcap),
        targets,
        _index(None if mask is None else mask != 0, targets),
        lse,
        entropy if entropy.shape == targets.shape else None,
        grad_logps,
        grad_entropy,
        grad_lse,
        GradientsNeeded(needs_hidden, needs_weight, needs_bias),
    )
    return tuple(hidden.new_zeros(0) if x is None else x.to(hidden.dtype) for x in gradients)


@linear_logprobs_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, *_: Any, needs_hidden: bool, needs_weight: bool, needs_bias: bool, **__: Any
) -> tuple[Tensor, ...]:
    needed = ((hidden.shape, needs_hidden), (weight.shape, needs_weight), (weight.shape[:1], needs_bias))
    return tuple(hidden.new_empty(shape if needs else (0,)) for shape, needs in needed)


def _setup_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, targets, mask, ctx.temperature, ctx.softcap, _, ctx.impl = inputs
    _, lse, entropy = output
    if not entropy.numel():
        ctx.mark_non_differentiable(entropy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, mask, lse, entropy)


def _logprobs_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(grad is None for grad in grads):
        return (None,) * 9
    needed = ctx.needs_input_grad[:3]
    names = ("needs_hidden", "needs_weight", "needs_bias")
    made = linear_logprobs_backward(
        *ctx.saved_tensors, *grads, ctx.temperature, ctx.softcap, **dict(zip(names, needed, strict=True)), impl=ctx.impl
    )
    return *(x if needs else None for x, needs in zip(made, needed, strict=True)), *[None] * 6


linear_logprobs.register_autograd(_logprobs_backward, setup_context=_setup_logprobs)


@torch.library.custom_op(
    "vgpo::linear_policy_loss",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {INPUTS_SCHEMA}, *, "
    "float temperature, float? softcap, int? memory_budget, bool needs_hidden, bool needs_weight, bool needs_bias, "
    f"{SETTINGS_SCHEMA}, str? impl) -> "
    "(Tensor loss, Tensor per_token, Tensor metrics, Tensor logps, Tensor entropy, "
    "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor normalizer)",
)
@operator_body
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *loss_inputs: Tensor | None,
    temperature: float,
    softcap: float | None,
    memory_budget: int | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    impl: str | None,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """Returns loss, per-token loss, metrics, logps, entropy, gradients before normalisation, and the normaliser."""
    inputs = LossInputs._make(loss_inputs)
    valid_tokens("completion_mask", inputs.completion_mask, targets, weight.shape[0], impl)
    results, logps, entropy, gradients = chunked.policy_loss(
        backend(impl, hidden.device, hidden.dtype),
        hidden.detach(),
        Head(weight.detach(), bias, temperature, softcap),
        targets,
        inputs,
        PolicyLossConfig(**settings),
        memory_budget,
        GradientsNeeded(needs_hidden, needs_weight, needs_bias),
    )
    made = (hidden.new_zeros(0) if x is None else x for x in gradients)
    return results.loss, results.per_token, results.metrics, logps, entropy, *made, results.normalizer


@linear_policy_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    _bias: Tensor | None,
    targets: Tensor,
    *_: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    **__: Any,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(hidden.dtype)
    shapes = ((), targets.shape, (len(METRICS),), targets.shape, targets.shape)
    loss, per_token, metrics, logps, entropy = (hidden.new_empty(shape, dtype=dtype) for shape in shapes)
    of_hidden = hidden.new_empty(hidden.shape if needs_hidden else 0)
    of_weight = hidden.new_empty(weight.shape, dtype=dtype) if needs_weight else hidden.new_empty(0)
    of_bias = hidden.new_empty(weight.shape[0], dtype=dtype) if needs_bias else hidden.new_empty(0)
    return loss, per_token, metrics, logps, entropy, of_hidden, of_weight, of_bias, torch.empty_like(loss)


def _setup_loss(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    # Only the loss has a gradient; without zeros made up for the other outputs.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[5:])
    ctx.dtype = inputs[0].dtype
    ctx.needed = [keyword_only_inputs[f"needs_{name}"] for name in ("hidden", "weight", "bias")]


def _loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    constants = (None,) * (1 + len(LossInputs._fields))
    if grad_loss is None:
        return None, None, None, *constants
    *gradients, normalizer = ctx.saved_tensors
    factor = grad_loss * normalizer
    scaled = (_scaled(x, factor, ctx.dtype) if needs else None for x, needs in zip(gradients, ctx.needed, strict=True))
    return *scaled, *constants


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
    index = _index(valid_tokens("mask", mask, targets, weight.shape[0], impl), targets)
    found = chunked.visual_dependency(
        backend(impl, hidden.device, hidden.dtype),
        hidden,
        hidden_corrupted,
        Head(weight, bias, temperature, softcap),
        Head(weight_corrupted, bias, temperature, softcap),
        targets,
        index,
        kind,
    )
    return _filled(found, index, targets)


@linear_visual_dependency.register_fake
def _(
    hidden: Tensor, _corrupted: Tensor, _weight: Tensor, _other: Tensor, _bias: Tensor | None, targets: Tensor, *_: Any
) -> Tensor:
    return hidden.new_empty(targets.shape, dtype=compute_dtype(hidden.dtype))


def _index(valid: Tensor | None, targets: Tensor) -> Index:
    """Returns the places of the valid tokens; None: of all."""
    return (torch.ones_like(targets, dtype=torch.bool) if valid is None else valid).nonzero(as_tuple=True)


def _filled(values: Tensor, index: Index, targets: Tensor) -> Tensor:
    """Returns the values at `index` of a tensor shaped as `targets`, 0 elsewhere."""
    return values.new_zeros(targets.shape).index_put_(index, values)
