"""The operators on logits: `vgpo::selective_logprobs`, `vgpo::logits_policy_loss` and its form in place.

The loss writes the gradient of the logits in the forward, normalised, so that a backward that begins with 1 has nothing
left to do.
"""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._dtypes import compute_dtype
from vgpo_kernels._operator import operator_body
from vgpo_kernels.policy_loss import terms
from vgpo_kernels.policy_loss.backend import INPUTS_SCHEMA, LossInputs
from vgpo_kernels.policy_loss.config import SETTINGS_SCHEMA, PolicyLossConfig
from vgpo_kernels.vocabulary.backend import backend
from vgpo_kernels.vocabulary.checks import valid_tokens


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
    valid = valid_tokens("mask", mask, targets, logits.shape[-1], impl)
    logps, lse, entropies = backend(impl, logits.device, logits.dtype).logits_logprobs(
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
    logps = logits.new_empty(targets.shape, dtype=compute_dtype(logits.dtype))
    return logps, torch.empty_like(logps), logps.new_empty(targets.shape if entropy else (0,))


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
    by_logps, by_entropy, by_lse = (None if x is None else x.contiguous() for x in (grad_logps, grad_entropy, grad_lse))
    backend(impl, logits.device, logits.dtype).logits_gradient(
        logits,
        targets,
        None if mask is None else mask != 0,
        lse,
        entropy if entropy.shape == targets.shape else None,
        by_logps,
        by_entropy,
        by_lse,
        temperature,
        softcap,
        gradient,
    )
    return gradient


@selective_logprobs_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, mask, ctx.temperature, ctx.softcap, _, ctx.impl = inputs
    _, lse, entropy = output
    if not entropy.numel():
        ctx.mark_non_differentiable(entropy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, mask, lse, entropy)


def _logprobs_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(grad is None for grad in grads):
        return (None,) * 7
    gradient = selective_logprobs_backward(*ctx.saved_tensors, *grads, ctx.temperature, ctx.softcap, ctx.impl)
    return gradient, *[None] * 6


selective_logprobs.register_autograd(_logprobs_backward, setup_context=_setup_logprobs)


_ARGUMENTS = f"Tensor targets, {INPUTS_SCHEMA}, *, float temperature, float? softcap, {SETTINGS_SCHEMA}, str? impl"
_RESULTS = "Tensor loss, Tensor per_token, Tensor metrics, Tensor logps, Tensor entropy, Tensor normalizer"


def _write_loss(
    logits: Tensor,
    out: Tensor,
    targets: Tensor,
    inputs: LossInputs,
    temperature: float,
    softcap: float | None,
    config: PolicyLossConfig,
    impl: str | None,
) -> tuple[Tensor, ...]:
    """Writes the gradient of the logits (B, T, V) to `out`; returns what _RESULTS names.

    The last result is the factor that the gradient still lacks: 1, but for fp16, where small numbers would be lost.
    """
    valid_tokens("completion_mask", inputs.completion_mask, targets, logits.shape[-1], impl)
    passes, valid = backend(impl, logits.device, logits.dtype), inputs.completion_mask != 0
    dtype = compute_dtype(logits.dtype)
    tokens = valid.sum().clamp(min=1).to(dtype)
    normalizer = terms.normalizer(tokens, targets.shape[0], config, inputs.num_items)
    inside = terms.row_multiplier(valid, config, dtype) if logits.dtype == torch.float16 else normalizer
    if config.importance_sampling_level == "sequence":
        logps, lse, entropy = passes.logits_logprobs(logits, targets, valid, temperature, softcap, True)
        results = passes.policy_loss(logps, inputs, config)
        by_logps = results.gradient * inside
        passes.logits_gradient(logits, targets, valid, lse, None, by_logps, None, None, temperature, softcap, out)
    else:
        weighted = terms.effective_advantages(inputs, valid, dtype)
        row_weights = terms.row_weights(valid, config, dtype)
        row_weights = inside.expand(valid.shape) if row_weights is None else row_weights * inside
        old, ref = (None if x is None else x.to(dtype).contiguous() for x in (inputs.old_logps, inputs.ref_logps))
        advantages, weights = weighted.contiguous(), row_weights.contiguous()
        logps, entropy = passes.logits_loss(
            logits, targets, valid, old, advantages, ref, weights, temperature, softcap, config, out
        )
        results = passes.policy_loss(logps, inputs, config)
    outputs = (results.loss, results.per_token, results.metrics, logps, entropy)
    return *outputs, normalizer / inside  # type: ignore[return-value]  # the entropy was asked for


@torch.library.custom_op(
    "vgpo::logits_policy_loss",
    mutates_args=(),
    schema=f"(Tensor logits, {_ARGUMENTS}) -> ({_RESULTS}, Tensor gradient)",
)
@operator_body
def logits_policy_loss(
    logits: Tensor,
    targets: Tensor,
    *loss_inputs: Tensor | None,
    temperature: float,
    softcap: float | None,
    impl: str | None,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """Returns the results of the loss, and the gradient of the logits in their dtype."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    inputs, config = LossInputs._make(loss_inputs), PolicyLossConfig(**settings)
    return *_write_loss(logits, gradient, targets, inputs, temperature, softcap, config, impl), gradient


@torch.library.custom_op(
    "vgpo::logits_policy_loss_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {_ARGUMENTS}) -> ({_RESULTS})",
)
@operator_body
def logits_policy_loss_(
    logits: Tensor,
    targets: Tensor,
    *loss_inputs: Tensor | None,
    temperature: float,
    softcap: float | None,
    impl: str | None,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """Returns the results of the loss, and turns the logits into their gradient."""
    inputs, config = LossInputs._make(loss_inputs), PolicyLossConfig(**settings)
    return _write_loss(logits, logits, targets, inputs, temperature, softcap, config, impl)


@logits_policy_loss.register_fake
def _(logits: Tensor, targets: Tensor, *_: Tensor | None, **__: Any) -> tuple[Tensor, ...]:
    return *_fake_results(logits, targets), torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@logits_policy_loss_.register_fake
def _fake_results(logits: Tensor, targets: Tensor, *_: Tensor | None, **__: Any) -> tuple[Tensor, ...]:
    shapes = ((), targets.shape, (len(terms.METRICS),), targets.shape, targets.shape, ())
    return tuple(logits.new_empty(shape, dtype=compute_dtype(logits.dtype)) for shape in shapes)


@torch.library.custom_op("vgpo::scale_", mutates_args=("gradient",))
@operator_body
def scale_(gradient: Tensor, factor: Tensor, impl: str | None) -> None:
    """Multiplies gradient (B, T, V) by factor (), in place; touches nothing where that is 1."""
    backend(impl, gradient.device, gradient.dtype).scale_gradient_(gradient, factor)


@scale_.register_fake
def _(*_: Any) -> None:
    return None


class LogitsPolicyLoss(torch.autograd.Function):
    """The loss with its gradient by the logits, which is handed out once: a second backward is an error of
    autograd's."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        inplace: bool,
        targets: Tensor,
        inputs: LossInputs,
        temperature: float,
        softcap: float | None,
        config: PolicyLossConfig,
        impl: str | None,
    ) -> tuple[Tensor, ...]:
        """Returns loss, per-token loss, metrics, logps and entropy."""
        options = {"temperature": temperature, "softcap": softcap, "impl": impl, **config.settings()}
        if inplace:
            gradient = logits.detach()
            *outputs, normalizer = logits_policy_loss_(gradient, targets, *inputs, **options)
        else:
            *outputs, normalizer, gradient = logits_policy_loss(logits.detach(), targets, *inputs, **options)
        ctx.save_for_backward(gradient, normalizer)
        ctx.impl = impl
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradient of the logits."""
        if grad_loss is None:
            return (None,) * 8
        # Counted by autograd as a change of the saved tensor, so that it says so when asked for it once more.
        gradient, normalizer = ctx.saved_tensors
        scale_(gradient, grad_loss * normalizer, ctx.impl)
        return gradient, *[None] * 7
