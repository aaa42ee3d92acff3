"""The operators on logits: `vgpo::selective_logprobs`, `vgpo::logits_policy_loss` and its form in place.

The loss writes the gradient of the logits in the forward, normalised, so that a backward that begins with 1 has nothing
left to do.
"""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._dispatch import checks_values, implementation
from vgpo_kernels._operator import operator_body
from vgpo_kernels._validate import check_mask_values
from vgpo_kernels.policy_loss import terms
from vgpo_kernels.policy_loss.config import SCHEMA, PolicyLossConfig
from vgpo_kernels.policy_loss.logprob import check_targets, compute_dtype


@torch.library.custom_op("vgpo::selective_logprobs", mutates_args=())
@operator_body
def selective_logprobs(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logps, LSE and entropy (no elements unless asked for), (B, T), 0 where masked."""
    valid = None if mask is None else _valid("mask", mask, logits, impl)
    check_targets(targets, valid, logits.shape[-1])
    logps, lse, entropies = implementation("policy_loss", impl, logits).logits_logprobs(
        logits.detach(), targets, valid, temperature, softcap, entropy
    )
    return logps, lse, lse.new_zeros(0) if entropies is None else entropies


@selective_logprobs.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    _mask: Tensor | None,
    _temperature: float,
    _softcap: float | None,
    entropy: bool,
    _impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (targets.shape, targets.shape, targets.shape if entropy else (0,))
    logps, lse, entropies = (logits.new_empty(shape, dtype=compute_dtype(logits)) for shape in shapes)
    return logps, lse, entropies


@torch.library.custom_op("vgpo::selective_logprobs_backward", mutates_args=())
@operator_body
def selective_logprobs_backward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    grad_logps: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    impl: str | None,
) -> Tensor:
    """Returns the gradient of the logits, in their dtype."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grads = [None if x is None else x.contiguous() for x in (grad_logps, grad_entropy, grad_lse)]
    implementation("policy_loss", impl, logits).logits_gradient(
        logits,
        targets,
        None if mask is None else mask != 0,
        lse,
        entropy if entropy.shape == targets.shape else None,
        *grads,
        temperature,
        softcap,
        gradient,
    )
    return gradient


@selective_logprobs_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, mask, *ctx.options, _, ctx.impl = inputs
    _, lse, entropy = output
    if not entropy.numel():
        ctx.mark_non_differentiable(entropy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, mask, lse, entropy)


def _logprobs_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(grad is None for grad in grads):
        return (None,) * 7
    return selective_logprobs_backward(*ctx.saved_tensors, *grads, *ctx.options, ctx.impl), *[None] * 6


selective_logprobs.register_autograd(_logprobs_backward, setup_context=_setup_logprobs)


_TENSORS = (
    "Tensor targets, Tensor? old_logps, Tensor advantages, Tensor completion_mask, Tensor? ref_logps, "
    "Tensor? token_weights, Tensor? trajectory_weights, Tensor? num_items, float temperature, float? softcap"
)
_RESULTS = "Tensor loss, Tensor per_token, Tensor metrics, Tensor logps, Tensor entropy, Tensor scale"


def _write_loss(
    logits: Tensor,
    out: Tensor,
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
    *settings_and_impl: Any,
) -> tuple[Tensor, ...]:
    """Writes the gradient of the logits (B, T, V) to `out`; returns what _RESULTS names.

    The last result is the factor that the gradient still lacks: 1, but for fp16, where small numbers would be lost.
    """
    *settings, impl = settings_and_impl
    config = PolicyLossConfig(*settings)
    passes = implementation("policy_loss", impl, logits)
    valid = _valid("completion_mask", completion_mask, logits, impl)
    check_targets(targets, valid, logits.shape[-1])
    dtype = compute_dtype(logits)
    by_row = (completion_mask, ref_logps, token_weights, trajectory_weights, num_items, config)
    tokens = valid.sum().clamp(min=1).to(dtype)
    scale = terms.normalizer(tokens, targets.shape[0], config, num_items)
    inside = terms.row_scale(valid, config, dtype) if logits.dtype == torch.float16 else scale
    if config.importance_sampling_level == "sequence":
        logps, lse, entropy = passes.logits_logprobs(logits, targets, valid, temperature, softcap, True)
        *results, coefficients, _ = passes.policy_loss(logps, old_logps, advantages, *by_row)
        coefficients = coefficients * inside
        passes.logits_gradient(logits, targets, valid, lse, None, coefficients, None, None, temperature, softcap, out)
    else:
        weighted = terms.effective_advantages(advantages, valid, token_weights, trajectory_weights, dtype)
        row_weights = terms.row_weights(valid, config, dtype)
        row_weights = inside.expand(valid.shape) if row_weights is None else row_weights * inside
        tokens_of = [
            None if x is None else x.to(dtype).contiguous() for x in (old_logps, weighted, ref_logps, row_weights)
        ]
        logps, entropy = passes.logits_loss(logits, targets, valid, *tokens_of, temperature, softcap, config, out)
        *results, _, _ = passes.policy_loss(logps, old_logps, advantages, *by_row)
    return *results, logps, entropy, scale / inside


@torch.library.custom_op(
    "vgpo::logits_policy_loss",
    mutates_args=(),
    schema=f"(Tensor logits, {_TENSORS}, {SCHEMA}, str? impl) -> ({_RESULTS}, Tensor gradient)",
)
@operator_body
def logits_policy_loss(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Returns the results of the loss, and the gradient of the logits in their dtype."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return *_write_loss(logits, gradient, *arguments), gradient


@torch.library.custom_op(
    "vgpo::logits_policy_loss_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {_TENSORS}, {SCHEMA}, str? impl) -> ({_RESULTS})",
)
@operator_body
def logits_policy_loss_(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Returns the results of the loss, and turns the logits into their gradient."""
    return _write_loss(logits, logits, *arguments)


def _fake_results(logits: Tensor, targets: Tensor) -> list[Tensor]:
    shapes = ((), targets.shape, (len(terms.METRICS),), targets.shape, targets.shape, ())
    return [logits.new_empty(shape, dtype=compute_dtype(logits)) for shape in shapes]


@logits_policy_loss.register_fake
def _(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return *_fake_results(logits, targets), gradient


@logits_policy_loss_.register_fake
def _(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(_fake_results(logits, targets))


@torch.library.custom_op("vgpo::scale_", mutates_args=("gradient",))
@operator_body
def scale_(gradient: Tensor, factor: Tensor, impl: str | None) -> None:
    """Multiplies gradient (B, T, V) by factor (), in place; touches nothing where that is 1."""
    implementation("policy_loss", impl, gradient).scale_(gradient, factor)


@scale_.register_fake
def _(_gradient: Tensor, _factor: Tensor, _impl: str | None) -> None:
    return None


class LogitsPolicyLoss(torch.autograd.Function):
    """The loss with its gradient by the logits, which is handed out once: a second backward is an error of
    autograd's."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inplace: bool, *arguments: Any) -> tuple[Tensor, ...]:
        if inplace:
            gradient = logits.detach()
            results = logits_policy_loss_(gradient, *arguments)
        else:
            *results, gradient = logits_policy_loss(logits.detach(), *arguments)
        *outputs, scale = results
        ctx.save_for_backward(gradient, scale)
        ctx.impl = arguments[-1]
        ctx.arguments = len(arguments)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (1 + ctx.arguments)
        if grad_loss is None:
            return None, *nothing
        # Counted by autograd as a change of the saved tensor, so that it says so when asked for it once more.
        gradient, scale = ctx.saved_tensors
        scale_(gradient, grad_loss * scale, ctx.impl)
        return gradient, *nothing


def _valid(name: str, mask: Tensor, logits: Tensor, impl: str | None) -> Tensor:
    if checks_values(impl, logits):
        check_mask_values(name, mask)
    return mask != 0
