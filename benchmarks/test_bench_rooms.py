"""Attention, focus, weights and policy loss beside what a trainer does without them, and beside our plain torch."""

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

OURS, PLAIN = "vgpo_kernels", "vgpo_kernels, reference"
IMPL = {OURS: None, PLAIN: "reference"}

# Rollouts: 64 completions of up to 2048 tokens, in groups of 8.
ROWS, TOKENS = 64, 2048
# States of 8 of them, after 1024 visual tokens, in 7B's width.
STATE_ROWS, VISUAL, STATE = 8, 1024, 3584
# 7B's heads over a prompt of 1024 visual tokens and a completion, whose queries alone are asked for.
HEADS, HEAD_DIM, PROMPT, QUERIES = (28, 4), 128, 1024, 2048


def completion_mask(rows, tokens, device):
    return ragged_mask([tokens - 16 * row for row in range(rows)], tokens).to(device)


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
@pytest.mark.parametrize("provider", [OURS, PLAIN, "two LSEs", "eager map"])
def test_attention_mass(provider, timed, attention):
    q, k, lse, visual = attention

    def ours(impl=None):
        return vgpo_kernels.attention_mass(q, k, lse, visual.int() - 1, 1, impl=impl)[..., 0]

    providers = {
        OURS: ours,
        PLAIN: lambda: ours("reference"),
        "two LSEs": lambda: two_lse_mass(q, k, lse, slice(0, PROMPT)),
        "eager map": lambda: eager_mass(q, k, visual),
    }
    torch.testing.assert_close(timed(providers[provider]).float(), ours(), **tolerance(q, 1e-5))


@pytest.mark.benchmark(group="attention column sum, given the LSE")
@pytest.mark.parametrize("provider", [OURS, PLAIN, "eager map"])
def test_attention_column_sum(provider, timed, attention):
    q, k, lse, visual = attention

    def ours(impl=None):
        return vgpo_kernels.attention_column_sum(q, k, lse, visual, impl=impl)

    providers = {OURS: ours, PLAIN: lambda: ours("reference"), "eager map": lambda: eager_column_sum(q, k, visual)}
    torch.testing.assert_close(timed(providers[provider]).float(), ours(), **tolerance(q, 1e-4))


@pytest.fixture(scope="module")
def cache(device):
    """Returns q of one new token a row, caches of keys and values, their visual mask and lengths."""
    torch.manual_seed(0)
    rows, length, dtype = 8, PROMPT + 1024, torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.randn(rows, HEADS[0], 1, HEAD_DIM, device=device, dtype=dtype)
    k, v = torch.randn(2, rows, HEADS[1], length, HEAD_DIM, device=device, dtype=dtype)
    visual = (torch.arange(length, device=device) < PROMPT).expand(rows, -1)
    return q, k, v, visual, torch.full((rows,), length, device=device)


@pytest.mark.benchmark(group="attention of one token to a cache")
@pytest.mark.parametrize("provider", [OURS, PLAIN, "SDPA, no mass"])
def test_decode(provider, timed, cache):
    q, k, v, _, _ = cache

    def ours(impl=None):
        return vgpo_kernels.visual_attention_decode(*cache, impl=impl).out

    def stock():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    providers = {OURS: ours, PLAIN: lambda: ours("reference"), "SDPA, no mass": stock}
    torch.testing.assert_close(timed(providers[provider]).float(), ours().float(), **tolerance(q, 1e-5))


@pytest.fixture(scope="module")
def states(device):
    """Returns hidden states, the visual mask and the completion mask."""
    torch.manual_seed(0)
    hidden = torch.randn(STATE_ROWS, VISUAL + VISUAL, STATE, device=device)
    visual = (torch.arange(hidden.shape[1], device=device) < VISUAL).expand(STATE_ROWS, -1)
    completion = torch.zeros_like(visual)
    completion[:, VISUAL:] = completion_mask(STATE_ROWS, VISUAL, device)
    return hidden, visual, completion


@pytest.mark.benchmark(group="focus")
@pytest.mark.parametrize("provider", [OURS, PLAIN, "dense torch", "token loop", "copy of the rows read"])
def test_focus(provider, timed, states):
    hidden, visual, completion = states
    expected = vgpo_kernels.visual_focus_score(*states)
    if provider == "copy of the rows read":
        # What the memory gives: as many bytes as the score reads, read once and written once.
        rows = int((visual | completion).sum())
        timed(torch.empty_like(hidden).flatten(0, 1)[:rows].copy_, hidden.flatten(0, 1)[:rows])
        return
    providers = {
        OURS: vgpo_kernels.visual_focus_score,
        PLAIN: lambda *given: vgpo_kernels.visual_focus_score(*given, impl="reference"),
        "dense torch": dense_focus,
        "token loop": token_loop_focus,
    }
    rounds = 1 if provider == "token loop" else None
    torch.testing.assert_close(timed(providers[provider], *states, rounds=rounds), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.benchmark(group="weights")
@pytest.mark.parametrize("provider", [OURS, PLAIN, "token loop"])
def test_weights(provider, timed, device):
    torch.manual_seed(0)
    focus = torch.rand(ROWS, TOKENS, device=device) * 2 - 1
    mask, groups = completion_mask(ROWS, TOKENS, device), torch.arange(ROWS, device=device) // 8
    expected = vgpo_kernels.vgpo_weights(focus, mask, groups, VGPOConfig.paper())[:2]
    if provider == "token loop":
        found = timed(token_loop_weights, focus, mask, groups, rounds=1)
    else:
        found = timed(lambda: vgpo_kernels.vgpo_weights(focus, mask, groups, VGPOConfig.paper(), impl=IMPL[provider]))
    for actual, wanted in zip(found, expected, strict=False):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-4)


@pytest.mark.benchmark(group="policy loss, forward and backward")
@pytest.mark.parametrize("provider", [OURS, PLAIN, "dense torch", "TRL"])
def test_policy_loss(provider, timed, device):
    if provider == "TRL":
        pytest.importorskip("trl")
    torch.manual_seed(0)
    logps = torch.randn(ROWS, TOKENS, device=device).requires_grad_()
    old = logps.detach() + 0.1 * torch.randn_like(logps)
    advantages = torch.randn(ROWS, device=device)
    mask = completion_mask(ROWS, TOKENS, device)
    config = PolicyLossConfig(loss_type="dapo", epsilon_low=0.2, epsilon_high=0.28)

    def ours(impl=None):
        return vgpo_kernels.policy_loss(logps, old, advantages, mask, config=config, impl=impl).loss

    losses = {
        OURS: ours,
        PLAIN: lambda: ours("reference"),
        "dense torch": lambda: dense_policy_loss(logps, old, advantages[:, None].expand_as(logps), mask),
        "TRL": lambda: trl_policy_loss(logps, old, advantages, mask),
    }

    def step(name):
        loss = losses[name]()
        return loss, *torch.autograd.grad(loss, logps)

    for actual, expected in zip(timed(step, provider), step(OURS), strict=True):
        torch.testing.assert_close(actual, expected)
