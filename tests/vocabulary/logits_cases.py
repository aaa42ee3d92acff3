"""What the tests of kernels on logits share: inputs, torch's results, error budgets.

Exact is torch's log_softmax and autograd in float64. The baseline of every error budget is what torch does with logits
of that dtype: it computes in fp32 from them, and rounds the gradient to the dtype of `out` at the end.
"""

import math
from typing import NamedTuple

import torch
from gpu_arithmetic import allowance
from torch import Tensor
from vocabulary_cases import PLAIN, Scaling

from vgpo_kernels.policy_loss import PolicyLossConfig, terms
from vgpo_kernels.testing import assert_error_budget
from vgpo_kernels.vocabulary.triton import logits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SOME_CONFIG = PolicyLossConfig.official(beta=0.1)
SCALED = Scaling(1.3, 5.0)  # the cap bends logits of a standard deviation of 4
MIXES = [(torch.float32, PLAIN), (torch.float16, Scaling(0.7)), (torch.bfloat16, SCALED), (torch.float32, SCALED)]


class Case(NamedTuple):
    """Logits (B, T, V) and what goes with them, on the device."""

    logits: Tensor
    targets: Tensor
    grads: tuple[Tensor, Tensor, Tensor]  # by logps, LSE and entropy


def random_case(shape: tuple[int, int, int], dtype: torch.dtype, device: str, spread: float = 4.0) -> Case:
    batch, length, vocabulary = shape
    values = (spread * torch.randn(shape)).to(dtype)
    targets = torch.randint(vocabulary, (batch, length))
    grads = [torch.randn(batch, length).to(device) for _ in range(3)]
    return Case(values.to(device), targets.to(device), tuple(grads))


def dense(x: Tensor, targets: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor, Tensor]:
    """logps, LSE and entropy in the dtype of `x`, by torch."""
    if scaling.softcap is not None:
        x = scaling.softcap * torch.tanh(x / scaling.softcap)
    z = x / scaling.temperature
    log_p = z.log_softmax(-1)
    entropy = -torch.where(log_p == -math.inf, 0.0, log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), z.logsumexp(-1), entropy


def formula_gradient(x: Tensor, case: Case, lse: Tensor, entropy: Tensor, scaling: Scaling) -> Tensor:
    """The gradient by logits `x` of LSE and entropy as they are given, rounded to fp32, in the dtype of `x`."""
    by_logps, by_lse, by_entropy, lse, entropy = (v.to(x.dtype).unsqueeze(-1) for v in (*case.grads, lse, entropy))
    tanh = torch.zeros_like(x) if scaling.softcap is None else torch.tanh(x / scaling.softcap)
    z = (x if scaling.softcap is None else scaling.softcap * tanh) / scaling.temperature
    p = (z - lse).exp()
    hit = torch.zeros_like(x).scatter_(-1, case.targets.unsqueeze(-1), 1.0)
    by_z = by_logps * (hit - p) + by_lse * p - by_entropy * p * (z - lse + entropy)
    return by_z / scaling.temperature * (1 - tanh.square())


def assert_statistics(case: Case, scaling: Scaling = PLAIN) -> None:
    exact = dense(case.logits.double(), case.targets, scaling)
    same_dtype = dense(case.logits.float(), case.targets, scaling)
    actual = logits.logits_logprobs(case.logits, case.targets, None, *scaling, True)
    for name, *values in zip(("logps", "lse", "entropy"), actual, same_dtype, exact, strict=True):
        assert_error_budget(name, *values)


def assert_gradient(case: Case, scaling: Scaling, out: Tensor, given: tuple[bool, bool, bool] = (True,) * 3) -> None:
    """`given`: which of the gradients by logps, LSE and entropy there are.

    A GPU adds 2 ulp for the exponential of z - LSE. tanh is an exponential and a division, 4 ulp of u: of z, at most
    softcap / temperature, too, and so the exponential's times that; and twice as many of the slope 1 - u^2.
    """
    bent = 0.0 if scaling.softcap is None else scaling.softcap / scaling.temperature + 2.0
    ulps = 2.0 + allowance(1 + 2 * bent)
    lse, entropy = (x.float() for x in dense(case.logits.double(), case.targets, scaling)[1:])
    by_logps, by_lse, by_entropy = (grad if there else None for grad, there in zip(case.grads, given, strict=True))
    logits.logits_gradient(case.logits, case.targets, None, lse, entropy, by_logps, by_entropy, by_lse, *scaling, out)
    case = case._replace(grads=tuple(grad * there for grad, there in zip(case.grads, given, strict=True)))
    exact = formula_gradient(case.logits.double(), case, lse, entropy, scaling)
    same_dtype = formula_gradient(case.logits.float(), case, lse, entropy, scaling).to(out.dtype)
    assert_error_budget("gradient", out, same_dtype, exact, ulps=ulps)


class LossInputs(NamedTuple):
    """What the loss takes beside logits and targets, (B, T) each."""

    old_logps: Tensor | None
    advantages: Tensor
    ref_logps: Tensor | None
    row_weights: Tensor | None

    @classmethod
    def random(cls, case: Case, scaling: Scaling = PLAIN) -> "LossInputs":
        """Log-ratios of standard deviation 0.6, so that every clip is met."""
        logps = dense(case.logits.double(), case.targets, scaling)[0].float()
        old, ref = (logps + 0.6 * torch.randn(logps.shape).to(logps.device) for _ in range(2))
        return cls(old, torch.randn(logps.shape).to(logps.device), ref, 0.1 + torch.rand(logps.shape).to(logps.device))


def dense_loss(x: Tensor, case: Case, inputs: LossInputs, scaling: Scaling, config: PolicyLossConfig) -> tuple:
    """logps, entropy and the gradient of the loss, with the coefficients of `terms`."""
    leaf = x.detach().clone().requires_grad_()
    logps, _, entropy = dense(leaf, case.targets, scaling)
    old, advantages, ref, weights = (None if value is None else value.to(x.dtype) for value in inputs)
    valid = torch.ones_like(case.targets, dtype=torch.bool)
    coefficients = terms.loss_with_gradient(logps.detach(), old, advantages, ref, valid, config).gradient
    if weights is not None:
        coefficients = coefficients * weights
    return logps.detach(), entropy.detach(), torch.autograd.grad((coefficients * logps).sum(), leaf)[0]


def assert_loss(
    case: Case,
    inputs: LossInputs,
    config: PolicyLossConfig,
    out: Tensor,
    scaling: Scaling = PLAIN,
) -> None:
    exact = dense_loss(case.logits.double(), case, inputs, scaling, config)
    *same_dtype, gradient = dense_loss(case.logits.float(), case, inputs, scaling, config)
    logps, entropy = logits.logits_loss(case.logits, case.targets, None, *inputs, *scaling, config, out)
    assert_error_budget("logps", logps, same_dtype[0], exact[0])
    assert_error_budget("entropy", entropy, same_dtype[1], exact[1])
    assert_error_budget("gradient", out, gradient.to(out.dtype), exact[2])
