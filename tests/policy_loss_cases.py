"""What the tests of the policy loss share: inputs, configurations, an independent transcription of the formula."""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch
from gpu_arithmetic import allowance
from torch import Tensor

from vgpo_kernels.policy_loss import PolicyLossConfig, PolicyLossOutput, policy_loss
from vgpo_kernels.testing import assert_error_budget, ragged_mask

KL_LIMITS = {"kl_log_ratio_limit": 0.9, "kl_limit": 0.3}


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, under the names of the arguments."""

    logps: Tensor
    old_logps: Tensor | None
    advantages: Tensor
    completion_mask: Tensor
    ref_logps: Tensor | None = None
    token_weights: Tensor | None = None
    trajectory_weights: Tensor | None = None

    def map(self, change) -> "Inputs":
        """Applies `change` to each floating tensor."""
        changed = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None and value.is_floating_point()
        }
        return dataclasses.replace(self, **changed)

    def replace(self, **changes) -> "Inputs":
        return dataclasses.replace(self, **changes)

    def call(self, config: PolicyLossConfig, **options) -> PolicyLossOutput:
        tensors = {name: getattr(self, name) for name in NAMES}  # torch 2.11 cannot compile vars()
        return policy_loss(**tensors, config=config, **options)


NAMES = tuple(field.name for field in dataclasses.fields(Inputs))


def random_inputs(
    lengths: list[int], length: int, *, dtype: torch.dtype = torch.float32, weights: bool = True
) -> Inputs:
    """Log-ratios of standard deviation 0.6, so that every clip is met; right padding after `lengths[b]` tokens."""
    rows = len(lengths)
    logps = -torch.rand(rows, length) * 3
    floating = {
        "logps": logps,
        "old_logps": logps + 0.6 * torch.randn(rows, length),
        "ref_logps": logps + 0.6 * torch.randn(rows, length),
        "advantages": torch.randn(rows, length),
    }
    if weights:
        floating["token_weights"] = 0.1 + 1.9 * torch.rand(rows, length)
        floating["trajectory_weights"] = 0.9 + torch.rand(rows)
    return Inputs(completion_mask=ragged_mask(lengths, length), **{name: x.to(dtype) for name, x in floating.items()})


def every_config() -> list[PolicyLossConfig]:
    """All options combined, wherever they go together."""
    kl_settings = (
        {},
        {"beta": 0.1},
        # Limits that cut some of the log-ratios and some of the divergences of `random_inputs`.
        {"beta": 0.1, **KL_LIMITS},
    )
    weighted = tuple({"beta": 0.1, "kl_importance_weighted": True, **limits} for limits in ({}, KL_LIMITS))
    configs = []
    for loss_type, level in itertools.product(("grpo", "bnpo", "dr_grpo", "dapo"), ("token", "sequence")):
        for kl, delta, dual in itertools.product(kl_settings, (None, 1.6), (None, 1.4)):
            configs.append(
                PolicyLossConfig(
                    loss_type,
                    level,
                    epsilon_high=0.28,
                    delta=delta,
                    clip_ratio_dual=dual,
                    max_completion_length=50,
                    **kl,
                )
            )
        for kl in weighted:
            options = {"epsilon_high": 0.28, "clip_ratio_dual": 1.4, "max_completion_length": 50}
            configs.append(PolicyLossConfig(loss_type, level, **options, **kl))
    for level, kl in itertools.product(("token", "sequence"), kl_settings + weighted):
        configs.append(PolicyLossConfig("cispo", level, epsilon_high=1.2, **kl))
    return configs


def config_id(config: PolicyLossConfig) -> str:
    extras = {
        "delta": config.delta,
        "dual": config.clip_ratio_dual,
        "kl": config.beta or None,
        "limits": config.kl_limit,
        "weighted": config.kl_importance_weighted or None,
    }
    named = [name for name, value in extras.items() if value is not None]
    return "-".join([config.loss_type, config.importance_sampling_level, *named])


def transcription(inputs: Inputs, config: PolicyLossConfig, num_items: float | None = None) -> tuple[Tensor, Tensor]:
    """Loss and gradient from the published formulas: a row at a time, products compared, autograd of torch."""
    logps = inputs.logps.double().requires_grad_()
    rows = row_losses(inputs, logps, config)
    tokens = sum(row.numel() for row in rows)
    total = torch.stack([row.sum() for row in rows]).sum()
    if config.loss_type == "grpo":
        loss = torch.stack([row.mean() if row.numel() else row.sum() for row in rows]).mean()
    elif config.loss_type == "dr_grpo":
        loss = total / (len(rows) * config.max_completion_length)
    elif config.loss_type == "bnpo" or num_items is None:
        loss = total / max(tokens, 1)
    else:
        loss = total / max(num_items, 1)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.detach(), gradient


def row_losses(inputs: Inputs, logps: Tensor, config: PolicyLossConfig) -> list[Tensor]:
    """The loss of each row's valid tokens before any average, by autograd differentiable in `logps` (B, T)."""
    return [_row_terms(inputs, logps[b], b, config) for b in range(logps.shape[0])]


def _row_terms(inputs: Inputs, logps: Tensor, b: int, config: PolicyLossConfig) -> Tensor:
    keep = inputs.completion_mask[b] != 0
    new = logps[keep]
    old = new.detach() if inputs.old_logps is None else inputs.old_logps[b][keep].double()
    advantage = (inputs.advantages[b] if inputs.advantages.dim() == 1 else inputs.advantages[b][keep]).double()
    if inputs.token_weights is not None:
        advantage = advantage * inputs.token_weights[b][keep].double()
    if inputs.trajectory_weights is not None:
        advantage = advantage * inputs.trajectory_weights[b].double()
    ratio = torch.exp(new - old)
    if config.importance_sampling_level == "sequence" and new.numel():
        ratio = torch.exp((new - old).mean())
    if config.loss_type == "cispo":
        loss = -ratio.detach().clamp(max=config.epsilon_high) * advantage * new
    else:
        followed = ratio if config.delta is None else ratio.clamp(max=config.delta)
        clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
        loss = -torch.minimum(followed * advantage, clipped * advantage)
        if config.clip_ratio_dual is not None:
            ceiling = torch.minimum(loss, -config.clip_ratio_dual * advantage)
            loss = torch.where(advantage < 0, ceiling, loss)
    if config.beta:
        whole = inputs.ref_logps[b][keep].double() - new
        d = whole
        if config.kl_log_ratio_limit is not None:
            d = whole.clamp(-config.kl_log_ratio_limit, config.kl_log_ratio_limit)
        kl = unlimited = d.exp() - d - 1
        if config.kl_limit is not None:
            kl = kl.clamp(-config.kl_limit, config.kl_limit)
        if config.kl_importance_weighted:
            kl = kl * ratio
            if config.importance_sampling_level == "token":
                # Multiplied out, since autograd of the product cancels terms in exp(d), too large for float64.
                open_ = (whole == d) & (unlimited.abs() <= (config.kl_limit or math.inf))
                kl = torch.where(open_, (inputs.ref_logps[b][keep].double() - old).exp() - ratio * (d + 1), kl)
        loss = loss + config.beta * kl
    return loss


def assert_mean_within_budget(
    name: str, actual: Tensor, same_dtype: Tensor, exact: Tensor, magnitude: Tensor, ulps: float = 2.0
) -> None:
    """The error budget for a mean: terms of both signs cancel, their rounding errors do not.

    So an ulp is that of `magnitude`, the same mean of the terms' absolute values.
    """
    beside = [torch.stack([value.double(), magnitude]) for value in (actual, same_dtype, exact)]
    assert_error_budget(name, beside[0].to(actual.dtype), beside[1].to(actual.dtype), beside[2], ulps=ulps)


def mean_magnitude(per_token: Tensor, mask: Tensor, config: PolicyLossConfig, num_items: float | None) -> Tensor:
    """The loss if every token's loss were positive."""
    rows, tokens = per_token.abs().sum(1), mask.sum(1)
    if config.loss_type == "grpo":
        return (rows / tokens.clamp(min=1)).mean()
    if config.loss_type == "dr_grpo":
        return rows.sum() / (len(rows) * config.max_completion_length)
    return rows.sum() / (num_items or tokens.sum().clamp(min=1))


def row_mean_magnitude(per_token: Tensor, mask: Tensor, config: PolicyLossConfig, num_items: float | None) -> Tensor:
    """The gradient of a row with one ratio, (B, T), if every token's loss were positive: a mean over the row, too."""
    ones = torch.ones_like(per_token, requires_grad=True)
    (weights,) = torch.autograd.grad(mean_magnitude(ones, mask, config, num_items), ones)
    return weights * per_token.abs().sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def loss_and_gradient(inputs: Inputs, config: PolicyLossConfig, **options) -> tuple[PolicyLossOutput, Tensor]:
    """One call and one backward."""
    logps = inputs.logps.detach().clone().requires_grad_()
    output = inputs.replace(logps=logps).call(config, **options)
    output.loss.backward()
    return output, logps.grad


def on(device: str, inputs: Inputs) -> Inputs:
    """The inputs on that device."""
    moved = inputs.map(lambda x: x.to(device))
    return moved.replace(completion_mask=inputs.completion_mask.to(device))


def gpu_ulps(config: PolicyLossConfig) -> float:
    """The ulp of the largest loss of a token that a GPU's exponentials add.

    ratio * advantage has one, beta * exp(d) of the KL another, weighting the KL by the ratio a third. They are terms of
    a sum and no larger than the largest loss. Rounding x log2(e) before adds |x| / 2 ulp, for the log-ratios drawn here
    no more than the rounding of a sum that the 2 ulp of every budget are for.
    """
    return allowance(1 + (config.beta != 0.0) + config.kl_importance_weighted)


def assert_matches_reference(
    inputs: Inputs, config: PolicyLossConfig, device: str, *, impl: str = "triton", **options
) -> None:
    """Loss, per-token loss, gradient and metrics within the error budget, and what a GPU adds to it."""
    ulps = 2.0 + (gpu_ulps(config) if impl == "triton" else 0.0)
    exact, exact_gradient = loss_and_gradient(inputs.map(lambda x: x.double()), config, impl="reference", **options)
    torch_output, torch_gradient = loss_and_gradient(inputs, config, impl="reference", **options)
    output, gradient = loss_and_gradient(on(device, inputs), config, impl=impl, **options)

    weighted = (exact.per_token_loss, inputs.completion_mask, config, options.get("num_items_in_batch"))
    gradients = (gradient.cpu(), torch_gradient, exact_gradient)
    if config.importance_sampling_level == "sequence":
        assert_mean_within_budget("gradient", *gradients, row_mean_magnitude(*weighted), ulps)
    else:
        assert_error_budget("gradient", *gradients, ulps=ulps)
    losses = (x.loss.detach().cpu() for x in (output, torch_output, exact))
    assert_mean_within_budget("loss", *losses, mean_magnitude(*weighted), ulps)
    per_token = (output.per_token_loss.cpu(), torch_output.per_token_loss, exact.per_token_loss)
    assert_error_budget("per-token loss", *per_token, ulps=ulps)
    # One budget for all: each is a mean of differences of numbers as large as the ratio.
    metrics = [torch.stack(list(x.metrics.values())).cpu() for x in (output, torch_output, exact)]
    assert_error_budget("metrics", *metrics, ulps=ulps)
    assert (gradient.cpu()[~inputs.completion_mask] == 0).all()
