"""Log-probabilities and the policy loss of hidden states beside whole logits, TRL's fused head and Liger's loss."""

from typing import NamedTuple

import pytest
import torch
from peers import dense_logprobs, dense_policy_loss, liger_linear_loss, trl_fused_head
from torch import Tensor

import vgpo_kernels
from vgpo_kernels import PolicyLossConfig

ROUNDS = 3
OURS, PLAIN = "vgpo_kernels", "vgpo_kernels, reference"


class States(NamedTuple):
    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (B, T)
    old_logps: Tensor
    advantages: Tensor  # (B,)
    mask: Tensor


@pytest.fixture(scope="module")
def states(device):
    """7B's head over 8 completions of 2,560 tokens on a GPU; a vocabulary of 50,000 and 4,096 tokens elsewhere."""
    torch.manual_seed(0)
    rows, tokens, size, vocabulary = (8, 2560, 3584, 152_064) if device == "cuda" else (4, 1024, 512, 50_000)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(rows, tokens, size, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, size, device=device) * size**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows, tokens), device=device)
    with torch.no_grad():
        old = vgpo_kernels.linear_logprobs(hidden, weight, targets).logps
    old += 0.1 * torch.randn_like(old)
    mask = torch.ones(rows, tokens, dtype=torch.bool, device=device)
    return States(hidden, weight, targets, old, torch.randn(rows, device=device), mask)


def assert_close(actual, expected, dtype):
    """By norms, since gradients are small: in half precision peers round logits or gradients on the way."""
    allowed = 1e-4 if dtype == torch.float32 else 2e-2
    for one, other in zip(actual, expected, strict=True):
        distance = (one.float() - other.float()).norm() / other.float().norm()
        assert distance < allowed, f"{distance:.1e} of the norm away from ours"


@pytest.mark.benchmark(group="log-probs and entropy of hidden states, forward")
@pytest.mark.parametrize("provider", [OURS, PLAIN, "dense torch", "TRL fused head"])
@torch.no_grad()
def test_linear_logprobs(provider, timed, states):
    if provider == "TRL fused head":
        pytest.importorskip("trl")
    given = states[:3]

    def ours(impl=None):
        return vgpo_kernels.linear_logprobs(*given, entropy=True, impl=impl)[:2]

    providers = {
        OURS: ours,
        PLAIN: lambda: ours("reference"),
        "dense torch": lambda: dense_logprobs(*given),
        "TRL fused head": lambda: trl_fused_head(*given),
    }
    assert_close(providers[provider](), ours(), states.hidden.dtype)
    timed(providers[provider], rounds=ROUNDS)


@pytest.mark.benchmark(group="policy loss of hidden states, forward and backward")
@pytest.mark.parametrize("provider", [OURS, PLAIN, "dense torch", "TRL fused head", "Liger"])
def test_linear_policy_loss(provider, timed, states):
    for library in {"TRL fused head": ["trl"], "Liger": ["liger_kernel"]}.get(provider, []):
        pytest.importorskip(library)
    hidden, weight, targets, old, advantages, mask = states
    config = PolicyLossConfig("bnpo", epsilon_high=0.28)

    def loss_of(logps):
        return dense_policy_loss(logps, old, advantages[:, None].expand_as(old), mask)

    losses = {
        OURS: lambda: vgpo_kernels.linear_policy_loss(*states, config=config).loss,
        PLAIN: lambda: vgpo_kernels.linear_policy_loss(*states, config=config, impl="reference").loss,
        "dense torch": lambda: loss_of(dense_logprobs(hidden, weight, targets)[0]),
        "TRL fused head": lambda: loss_of(trl_fused_head(hidden, weight, targets)[0]),
        "Liger": lambda: liger_linear_loss(*states),
    }

    def step(name):
        loss = losses[name]()
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    assert_close(step(provider), step(OURS), hidden.dtype)
    timed(step, provider, rounds=ROUNDS)
