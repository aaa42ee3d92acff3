"""Any configuration on log-ratios of any size: exp overflows behind clamps, ratios vanish, and every result is right.

Exact is a float64 transcription in which nothing overflows. Each result may be off by what float32 makes of the terms
that it is a sum of; where these terms overflow float32, nothing is asked of it.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_loss_cases import Inputs, loss_and_gradient, on, random_inputs, row_losses
from torch import Tensor

from vgpo_kernels import _native
from vgpo_kernels.policy_loss import PolicyLossConfig

ON_GPU = torch.cuda.is_available()
# Terms up to here do not overflow a row's sum in float32.
OVERFLOWS = 1e36


@st.composite
def configs(draw) -> PolicyLossConfig:
    """Every field, drawn."""

    def optional(low: float, high: float) -> float | None:
        return draw(st.none() | st.floats(low, high))

    loss_type = draw(st.sampled_from(["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]))
    if loss_type == "cispo":
        clips = {"epsilon_high": draw(st.floats(1.05, 8.0))}
    else:
        # Above 0: a ratio of exactly 1 lies on a bound of 1, where minimum and clamp choose other subgradients.
        clips = {"epsilon_low": draw(st.floats(0.05, 1.0)), "epsilon_high": draw(st.floats(0.05, 3.0))}
        clips |= {"delta": optional(1.1, 8.0), "clip_ratio_dual": optional(1.1, 8.0)}
    return PolicyLossConfig(
        loss_type,
        draw(st.sampled_from(["token", "sequence"])),
        **clips,
        beta=draw(st.sampled_from([0.0, 0.03, 1.0])),
        max_completion_length=40,
        kl_log_ratio_limit=optional(0.1, 150.0),
        kl_limit=optional(0.1, 150.0),
        kl_importance_weighted=draw(st.booleans()),
    )


# Standard deviations of the log-ratios to the old and to the reference policy: exp of 120 overflows float32.
SPREADS = st.tuples(*[st.sampled_from([0.3, 4.0, 120.0])] * 2)
PRESENT = st.tuples(*[st.booleans()] * 3)


def drawn_inputs(spreads: tuple[float, float], present: tuple[bool, bool, bool], seed: int) -> Inputs:
    torch.manual_seed(seed)
    inputs = random_inputs([6, 1, 0, 4], 6)
    old, ref = (inputs.logps + spread * torch.randn(inputs.logps.shape) for spread in spreads)
    names = ("old_logps", "token_weights", "trajectory_weights")
    inputs = inputs.replace(old_logps=old, ref_logps=ref)
    return inputs.replace(**{name: None for name, keep in zip(names, present, strict=True) if not keep})


class Exact(NamedTuple):
    """Loss and derivative of each token in float64, before the average, each with the size of its terms."""

    loss: Tensor
    gradient: Tensor
    loss_terms: Tensor
    gradient_terms: Tensor


def exact_terms(inputs: Inputs, config: PolicyLossConfig) -> Exact:
    """By autograd of the transcription, and by hand the size of what float32 adds up."""
    logps = inputs.logps.double().requires_grad_()
    keep, zeros = inputs.completion_mask, torch.zeros(logps.shape, dtype=torch.float64)
    loss = zeros.clone()
    for b, row in enumerate(row_losses(inputs, logps, config)):
        loss[b, keep[b]] = row
    (gradient,) = torch.autograd.grad(loss.sum(), logps)

    new, ref = logps.detach(), inputs.ref_logps.double()
    old = new if inputs.old_logps is None else inputs.old_logps.double()
    log_ratio = torch.where(keep, new - old, 0.0)
    if config.importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(1) / keep.sum(1).clamp(min=1))[:, None].expand(keep.shape)
    advantages = inputs.advantages.double().abs()
    for weights in (inputs.token_weights, inputs.trajectory_weights):
        if weights is not None:
            advantages = advantages * (weights if weights.dim() == 2 else weights[:, None]).double()
    # Whatever clips it, the ratio is at most itself, or where it is small about 1.
    by_ratio = advantages * log_ratio.clamp(min=0.0).exp()
    _, high, high_negative = config.log_bounds()
    by_ratio = torch.minimum(by_ratio, advantages * torch.tensor(max(high, high_negative), dtype=torch.float64).exp())
    d = ref - new
    if config.kl_log_ratio_limit is not None:
        d = d.clamp(-config.kl_log_ratio_limit, config.kl_log_ratio_limit)
    size, slope = d.exp() + d.abs() + 1.0, d.exp() + 1.0
    if config.kl_limit is not None:
        clamped = d.exp() - d - 1.0 > config.kl_limit
        size, slope = torch.where(clamped, config.kl_limit, size), torch.where(clamped, 0.0, slope)
    if config.kl_importance_weighted:
        ratio = log_ratio.exp()
        size = torch.maximum(ratio * size, size * 1e-38)
        by_token = torch.where(slope == 0.0, size, ratio * (d.abs() + 1.0))
        slope = ratio * slope if config.importance_sampling_level == "sequence" else by_token
    loss_terms = by_ratio * (new.abs() + 1.0 if config.loss_type == "cispo" else 1.0) + config.beta * size
    gradient_terms = by_ratio + config.beta * slope
    if config.importance_sampling_level == "sequence":
        shared = torch.where(keep, by_ratio + config.beta * size, 0.0).sum(1, keepdim=True)
        gradient_terms = gradient_terms + shared / keep.sum(1, keepdim=True).clamp(min=1)
    return Exact(loss.detach(), gradient, loss_terms, gradient_terms)


def assert_as_exact(name: str, actual: Tensor, exact: Tensor, terms: Tensor, *, tolerance: float) -> None:
    held = terms < OVERFLOWS
    error = (actual.double() - exact).abs()[held]
    # NaN is no error below anything.
    assert (error <= tolerance * (terms[held] + 1.0)).all(), f"{name}: {actual[held]}, exact {exact[held]}"


def assert_exact(inputs: Inputs, config: PolicyLossConfig, impl: str, device: str = "cpu", **options) -> None:
    """Per-token loss and gradient; a log-ratio of 500 is rounded by 3e-5, and its exp by as much of itself."""
    output, gradient = loss_and_gradient(on(device, inputs), config, impl=impl, **options)
    exact = exact_terms(inputs, config)
    tolerance = 1e-11 if inputs.logps.dtype == torch.float64 else 1e-4
    keep = inputs.completion_mask
    average = torch.ones(keep.shape, dtype=torch.float64) / averaged_over(keep, config)
    assert_as_exact("loss", output.per_token_loss.cpu(), exact.loss, exact.loss_terms, tolerance=tolerance)
    unscaled = torch.where(keep, gradient.cpu().double() / average, 0.0)
    assert_as_exact("gradient", unscaled, exact.gradient, exact.gradient_terms, tolerance=tolerance)
    assert (gradient.cpu()[~keep] == 0).all()


def averaged_over(keep: Tensor, config: PolicyLossConfig) -> Tensor:
    """What a token's loss is divided by."""
    if config.loss_type == "grpo":
        return keep.sum(1, keepdim=True).clamp(min=1) * len(keep)
    if config.loss_type == "dr_grpo":
        return torch.tensor(len(keep) * config.max_completion_length)
    return keep.sum()


@settings(max_examples=80, deadline=None)
@given(config=configs(), spreads=SPREADS, present=PRESENT, seed=st.integers(0, 2**16))
def test_reference(config, spreads, present, seed):
    inputs = drawn_inputs(spreads, present, seed)
    assert_exact(inputs.map(lambda x: x.double()), config, "reference")
    assert_exact(inputs, config, "reference")


@pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))
@settings(max_examples=80, deadline=None)
@given(config=configs(), spreads=SPREADS, present=PRESENT, seed=st.integers(0, 2**16))
def test_native(config, spreads, present, seed):
    assert_exact(drawn_inputs(spreads, present, seed), config, "native")


@settings(max_examples=200 if ON_GPU else 10, deadline=None)
@given(config=configs(), spreads=SPREADS, present=PRESENT, seed=st.integers(0, 2**16))
def test_kernels(config, spreads, present, seed):
    assert_exact(drawn_inputs(spreads, present, seed), config, "triton", "cuda" if ON_GPU else "cpu")
