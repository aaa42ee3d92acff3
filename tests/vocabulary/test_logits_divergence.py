"""The Triton kernel of the divergence of two rows of logits, against torch in float64."""

import math

import pytest
import torch
from gpu_arithmetic import allowance
from logits_cases import MIXES
from torch import Tensor
from vocabulary_cases import PLAIN, Scaling

from vgpo_kernels.testing import assert_error_budget
from vgpo_kernels.vocabulary.triton.kl import logits_kl


def log_softmax(x: Tensor, scaling: Scaling) -> Tensor:
    if scaling.softcap is not None:
        x = scaling.softcap * torch.tanh(x / scaling.softcap)
    return (x / scaling.temperature).log_softmax(-1)


def exact_kl(p: Tensor, q: Tensor, scaling: Scaling) -> Tensor:
    log_p, log_q = (log_softmax(x, scaling) for x in (p, q))
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def assert_kl(p: Tensor, q: Tensor, scaling: Scaling = PLAIN, *, strict: bool = False) -> None:
    """`strict`: a GPU adds nothing to the error budget."""
    actual = logits_kl(p, q, *scaling)
    assert not (actual < 0).any()
    exact = exact_kl(p.double(), q.double(), scaling)
    ulps = 2.0 + (0.0 if strict else gpu_ulps(p.double(), q.double(), scaling))
    assert_error_budget("kl", actual, exact_kl(p.float(), q.float(), scaling), exact, ulps=ulps)


def gpu_ulps(p: Tensor, q: Tensor, scaling: Scaling) -> float:
    """The ulp of the largest divergence that a GPU's approximations add.

    An e of p or q is an exponential, and another brings it to the row's maximum. Relative errors of p's move the
    divergence by p (log(p / q) - KL - 1), of q's by q. tanh, an exponential and a division, is off by 4 ulp of a score,
    which is at most softcap / temperature; scores of p move the divergence by p (log(p / q) - KL), of q by q - p.
    """
    log_p, log_q = (log_softmax(x, scaling) for x in (p, q))
    kl = exact_kl(p, q, scaling)
    above = torch.where(log_p == -math.inf, 0.0, log_p - log_q - kl[:, None])
    added = allowance(2) * ((log_p.exp() * (above - 1).abs()).sum(-1) + 1)
    if scaling.softcap is not None:
        moved = log_p.exp() * above.abs() + (log_q.exp() - log_p.exp()).abs()
        added += allowance(2) * scaling.softcap / scaling.temperature * moved.sum(-1)
    finite = kl.isfinite()
    return (added[finite].max() / kl[finite].max()).item() if (kl[finite] > 0).any() else 0.0


@pytest.mark.parametrize(("dtype", "scaling"), MIXES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 5, 1003, 50257])
def test_divergence(vocabulary, dtype, scaling, device):
    p, q = ((4 * torch.randn(3, vocabulary)).to(device, dtype) for _ in range(2))
    assert_kl(p, q, scaling)


def test_divergence_of_rows_that_begin_elsewhere(device):
    p, wide = (torch.randn(4, 77, device=device), torch.randn(4, 2, 79, device=device))
    assert_kl(p, wide[:, 1, 1:78])
    assert_kl(wide[:, 1, 2:], p)
    assert_kl(p[1:2].half(), p[2:3])  # p and q of two dtypes


@pytest.mark.parametrize("distance", [0.0, 1e-4, 1e-2])
def test_divergence_of_nearly_the_same_rows(distance, device):
    """It is quadratic in the distance, far below what rounding leaves of its terms."""
    p = 3 * torch.randn(6, 1003, device=device)
    assert_kl(p, p + distance * torch.randn_like(p), strict=True)


def test_divergence_from_forbidden_tokens(device):
    p, q = (torch.randn(6, 5000, device=device) for _ in range(2))
    p[0, :4500] = q[0, :4500] = -math.inf  # neither may
    p[1, ::2] = -math.inf  # p may not
    q[2, 17] = -math.inf  # q may not: infinitely surprised
    q[3, 17] = -math.inf
    p[3, 17] = p[3, 4999] - 60.0  # however unlikely it is
    p[4] = -math.inf
    q[5] = -math.inf
    kl = logits_kl(p, q, 1.0, None)
    assert kl[2:4].tolist() == [math.inf, math.inf]
    assert kl[4:].isnan().all()
    assert_kl(p[:2], q[:2])


def test_divergence_of_huge_logits(device):
    p, q = (torch.randn(3, 300, device=device) for _ in range(2))
    p[0, 5] = q[0, 5] = 1e30
    p[1, 5] = 1e30
    q[2, 5] = -1e30
    assert_kl(p[:2], q[:2])
    assert_kl(p[2:], q[2:])
