"""Attention, focus, weights and policy loss beside what a trainer does without them."""

import pytest
import torch
from peers import (
    dense_focus,
    dense_policy_loss,
    eager_column_sum,
    eager_mass,
    token_loop_focus,
    token_loop_weights,
    trl_policy_loss,
    two_lse_mass,
)

import vgpo_kernels
from vgpo_kernels import PolicyLossConfig, VGPOConfig
from vgpo_kernels.testing import ragged_mask

# Small enough for the token loops to end: 8 completions of up to 256 tokens after 256 visual ones.
ROWS, VISUAL, TOKENS, STATE = 8, 256, 256, 1024


def completion_mask(device):
    return ragged_mask([TOKENS - 16 * row for row in range(ROWS)], TOKENS).to(device)


# 7B's heads over a prompt of 1024 visual tokens and a completion, whose queries alone are asked for.
HEADS, HEAD_DIM, PROMPT, QUERIES = (28, 4), 128, 1024, 512


@pytest.fixture(scope="module")
def attention(device):
    """Returns q of the completion, k, their LSE and the visual mask."""
    torch.manual_seed(0)
    length, dtype = PROMPT + QUERIES, torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.randn(1, QUERIES, HEADS[0], HEAD_DIM, device=device, dtype=dtype).transpose(1, 2)
    k = torch.randn(1, length, HEADS[1], HEAD_DIM, device=device, dtype=dtype).transpose(1, 2)
    _, lse = vgpo_kernels.attention_with_lse(q, k, k)
    return q, k, lse, torch.arange(length, device=device)[None] < PROMPT


def tolerance(q, single):
    """What peers may differ by: their maps are rounded to q's dtype on the way."""
    return {"rtol": 1e-4, "atol": single} if q.dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}


@pytest.mark.benchmark(group="attention mass, given the LSE")
@pytest.mark.parametrize("provider", ["vgpo_kernels", "two LSEs", "eager map"])
def test_attention_mass(provider, timed, attention):
    q, k, lse, visual = attention

    def ours():
        return vgpo_kernels.attention_mass(q, k, lse, visual.int() - 1, 1)[..., 0]

    providers = {
        "vgpo_kernels": ours,
        "two LSEs": lambda: two_lse_mass(q, k, lse, slice(0, PROMPT)),
        "eager map": lambda: eager_mass(q, k, visual),
    }
    torch.testing.assert_close(timed(providers[provider]).float(), ours(), **tolerance(q, 1e-5))


@pytest.mark.benchmark(group="attention column sum, given the LSE")
@pytest.mark.parametrize("provider", ["vgpo_kernels", "eager map"])
def test_attention_column_sum(provider, timed, attention):
    q, k, lse, visual = attention

    def ours():
        return vgpo_kernels.attention_column_sum(q, k, lse, visual)

    providers = {"vgpo_kernels": ours, "eager map": lambda: eager_column_sum(q, k, visual)}
    torch.testing.assert_close(timed(providers[provider]).float(), ours(), **tolerance(q, 1e-4))


@pytest.mark.benchmark(group="focus")
@pytest.mark.parametrize("provider", ["vgpo_kernels", "dense torch", "token loop"])
def test_focus(provider, timed, device):
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, VISUAL + TOKENS, STATE, device=device)
    none = torch.zeros(ROWS, TOKENS, dtype=torch.bool, device=device)
    visual = torch.cat([torch.ones(ROWS, VISUAL, dtype=torch.bool, device=device), none], dim=1)
    completion = torch.cat([torch.zeros_like(visual[:, :VISUAL]), completion_mask(device)], dim=1)
    providers = {
        "vgpo_kernels": vgpo_kernels.visual_focus_score,
        "dense torch": dense_focus,
        "token loop": token_loop_focus,
    }
    expected = vgpo_kernels.visual_focus_score(hidden, visual, completion)
    torch.testing.assert_close(timed(providers[provider], hidden, visual, completion), expected)


@pytest.mark.benchmark(group="weights")
@pytest.mark.parametrize("provider", ["vgpo_kernels", "token loop"])
def test_weights(provider, timed, device):
    torch.manual_seed(0)
    focus = torch.rand(ROWS, TOKENS, device=device) * 2 - 1
    mask, groups = completion_mask(device), torch.arange(ROWS, device=device) // 4
    expected = vgpo_kernels.vgpo_weights(focus, mask, groups, VGPOConfig.paper())
    if provider == "vgpo_kernels":
        timed(vgpo_kernels.vgpo_weights, focus, mask, groups, VGPOConfig.paper())
        return
    token_weights, trajectory_weights = timed(token_loop_weights, focus, mask, groups)
    torch.testing.assert_close(token_weights, expected.token_weights, rtol=0, atol=1e-5)
    torch.testing.assert_close(trajectory_weights, expected.trajectory_weights, rtol=0, atol=1e-4)


@pytest.mark.benchmark(group="policy loss, forward and backward")
@pytest.mark.parametrize("provider", ["vgpo_kernels", "dense torch", "TRL"])
def test_policy_loss(provider, timed, device):
    if provider == "TRL":
        pytest.importorskip("trl")
    torch.manual_seed(0)
    rows, tokens = 64, 2048
    logps = torch.randn(rows, tokens, device=device).requires_grad_()
    old = logps.detach() + 0.1 * torch.randn_like(logps)
    advantages = torch.randn(rows, device=device)
    mask = ragged_mask([tokens - 16 * row for row in range(rows)], tokens).to(device)
    config = PolicyLossConfig(loss_type="dapo", epsilon_low=0.2, epsilon_high=0.28)

    def ours():
        loss = vgpo_kernels.policy_loss(logps, old, advantages, mask, config=config).loss
        return loss, *torch.autograd.grad(loss, logps)

    def dense():
        loss = dense_policy_loss(logps, old, advantages[:, None].expand_as(logps), mask)
        return loss, *torch.autograd.grad(loss, logps)

    def trl():
        loss = trl_policy_loss(logps, old, advantages, mask)
        return loss, *torch.autograd.grad(loss, logps)

    result = timed({"vgpo_kernels": ours, "dense torch": dense, "TRL": trl}[provider])
    for actual, expected in zip(result, ours(), strict=True):
        torch.testing.assert_close(actual, expected)
