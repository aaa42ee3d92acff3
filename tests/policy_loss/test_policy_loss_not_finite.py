"""Numbers that are not finite, and exp that overflows: what the loss makes of them, alike in every implementation."""

import math

import pytest
import torch
from policy_loss_cases import config_id, loss_and_gradient, on, random_inputs

from vgpo_kernels import PolicyLossConfig, linear_policy_loss, logits_policy_loss, policy_loss

INF, NAN = math.inf, math.nan
IMPLS = pytest.mark.parametrize("impl", ["reference", "native", "triton"])
# Of both levels, with and without each limit, dual clip and weights of the KL.
CONFIGS = [
    PolicyLossConfig("bnpo", "sequence"),
    PolicyLossConfig("grpo", "token", beta=0.1),
    PolicyLossConfig("dapo", "token", beta=0.1, kl_limit=2.0, delta=1.5),
    PolicyLossConfig("dapo", "sequence", beta=0.1, kl_log_ratio_limit=2.0, clip_ratio_dual=3.0),
    PolicyLossConfig("bnpo", "token", beta=0.1, kl_importance_weighted=True),
    PolicyLossConfig("grpo", "sequence", beta=0.1, kl_limit=2.0, kl_importance_weighted=True),
    PolicyLossConfig("cispo", "sequence", epsilon_high=2.0, beta=0.1, kl_importance_weighted=True),
]


def one_token(new, ref, config, *, old=None, advantage=0.5, impl, device):
    """Loss and derivative of the first of two tokens; the other one's log-probabilities are all -2."""
    logps = torch.tensor([[new, -2.0]], device=device, requires_grad=True)
    ref_logps = torch.tensor([[ref, -2.0]], device=device)
    old_logps = None if old is None else torch.tensor([[old, -2.0]], device=device)
    mask = torch.ones(1, 2, dtype=torch.bool, device=device)
    advantages = torch.tensor([advantage], device=device)
    output = policy_loss(logps, old_logps, advantages, mask, ref_logps=ref_logps, config=config, impl=impl)
    output.loss.backward()
    assert logps.grad[0, 1].item() == pytest.approx(-advantage / 2)
    return output.per_token_loss[0, 0].item(), 2 * logps.grad[0, 0].item()


@IMPLS
@pytest.mark.parametrize(
    ("fields", "new", "ref", "old", "loss", "gradient"),
    [
        # exp(100) overflows float32 behind the limit of the KL, of its log-ratio, and where there is none.
        ({"kl_limit": 10.0}, -101.0, -1.0, None, -0.5 + 1.0, -0.5),
        ({"kl_log_ratio_limit": 2.0}, -101.0, -1.0, None, -0.5 + 0.1 * (math.exp(2.0) - 3.0), -0.5),
        ({"kl_log_ratio_limit": 120.0, "kl_limit": 10.0}, -101.0, -1.0, None, -0.5 + 1.0, -0.5),
        ({}, -101.0, -1.0, None, INF, -INF),
        # An infinite log-ratio is one that overflows; the derivative of the KL where exp vanishes is 1.
        ({"kl_limit": 10.0}, -1.0, INF, None, -0.5 + 1.0, -0.5),
        ({}, -1.0, INF, None, INF, -INF),
        ({}, -1.0, -INF, None, INF, -0.5 + 0.1),
        ({"kl_limit": 10.0}, -1.0, -INF, None, -0.5 + 1.0, -0.5),
        # Beyond a limit the derivative is 0, on it whole: d is -2 and 2.
        ({"kl_log_ratio_limit": 2.0}, -1.0, -3.0, None, -0.5 + 0.1 * (math.exp(-2.0) + 1.0), -0.5 + 0.1 * 0.8646647),
        ({"kl_log_ratio_limit": 2.0}, -3.0, -1.0, None, -0.5 + 0.1 * (math.exp(2.0) - 3.0), -0.5 - 0.1 * 6.3890561),
        # Times the ratio: the derivative is that of the ratio where the KL is clamped, else -ratio * d.
        ({"kl_importance_weighted": True}, -101.0, -1.0, None, INF, -0.5 - 0.1 * 100.0),
        ({"kl_importance_weighted": True}, -101.0, -1.0, -1.0, 0.1, 0.0),  # exp(-100) (exp(100) - 101) is 1
        ({"kl_importance_weighted": True, "kl_limit": 10.0}, -101.0, -1.0, None, -0.5 + 1.0, -0.5 + 1.0),
        ({"kl_importance_weighted": True}, -1.0, -1.0, -101.0, -0.6, 0.0),  # a ratio that overflows, a KL of 0
        # NaN stays NaN, in the derivative, too.
        ({"kl_limit": 10.0, "kl_log_ratio_limit": 2.0}, -1.0, NAN, None, NAN, NAN),
        ({}, -1.0, NAN, None, NAN, NAN),
    ],
)
def test_loss_and_derivative_of_a_token(fields, new, ref, old, loss, gradient, impl, device):
    config = PolicyLossConfig("bnpo", beta=0.1, **fields)
    found = one_token(new, ref, config, old=old, impl=impl, device=device)
    assert found == pytest.approx((loss, gradient), rel=1e-5, abs=1e-6, nan_ok=True)


@IMPLS
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_infinite_ratio_without_a_bound_has_an_infinite_gradient(level, impl, device):
    """Nothing clips a negative advantage from above, so 0 would hide the token from every look at the gradient."""
    old = torch.tensor([[-INF, -2.0]], device=device)
    logps = torch.tensor([[-1.0, -2.0]], device=device, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool, device=device)
    config = PolicyLossConfig("bnpo", level)
    output = policy_loss(logps, old, torch.tensor([-1.0], device=device), mask, config=config, impl=impl)
    output.loss.backward()
    assert output.loss.item() == INF
    assert logps.grad[0].tolist() == [INF, INF if level == "sequence" else 0.5]


@IMPLS
@pytest.mark.parametrize(("advantage", "bound"), [(1.0, 1.28), (-1.0, 0.8), (-1.0, 3.0)])
def test_a_ratio_on_its_bound_has_the_whole_gradient(advantage, bound, impl, device):
    config = PolicyLossConfig("bnpo", epsilon_low=0.2, epsilon_high=0.28, clip_ratio_dual=3.0)
    exact = torch.tensor([[math.log(bound)]])
    below, above = (torch.nextafter(exact, torch.tensor(to)) for to in (-INF, INF))
    inside = [above, below][bound != 0.8]
    gradients = []
    for log_ratio in (inside, above if bound != 0.8 else below):
        logps = log_ratio.to(device).requires_grad_()
        mask = torch.ones(1, 1, device=device)
        given = (torch.zeros(1, 1, device=device), torch.tensor([advantage], device=device), mask)
        policy_loss(logps, *given, config=config, impl=impl).loss.backward()
        gradients.append(logps.grad.item())
    assert gradients == pytest.approx([-advantage * bound, 0.0], rel=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
@pytest.mark.parametrize("name", ["logps", "old_logps", "ref_logps", "advantages", "logps without old_logps"])
def test_kernels_show_what_is_no_number_as_the_reference_does(name, config, device):
    """A row for each of NaN, inf and -inf; at sequence level all of the row shows it."""
    inputs = random_inputs([9, 9, 9], 9)
    name, *without = name.split(" without ")
    changed = getattr(inputs, name).clone()
    changed[:, 3] = torch.tensor([NAN, INF, -INF])
    inputs = inputs.replace(**{name: changed}, **dict.fromkeys(without))
    expected, expected_gradient = loss_and_gradient(inputs, config, impl="reference")
    output, gradient = loss_and_gradient(on(device, inputs), config, impl="triton")
    torch.testing.assert_close(output.per_token_loss.cpu(), expected.per_token_loss, equal_nan=True)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, equal_nan=True)
    metrics = [torch.stack(list(x.metrics.values())).cpu() for x in (output, expected)]
    torch.testing.assert_close(*metrics, equal_nan=True)


@pytest.mark.parametrize(
    ("function", "impl"),
    [(logits_policy_loss, "native"), (linear_policy_loss, "native"), (logits_policy_loss, "triton")],
)
@pytest.mark.parametrize("config", CONFIGS[1:5], ids=config_id)
def test_logits_with_log_ratios_of_any_size(function, config, impl, device):
    """Log-probabilities down to -200, one of a logit of -inf, log-ratios of a standard deviation of 100."""
    logits = 60.0 * torch.randn(3, 5, 7)
    targets = torch.randint(7, (3, 5))
    old, ref = (
        logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0] + 100.0 * torch.randn(3, 5) for _ in range(2)
    )
    if function is logits_policy_loss:
        logits[0, 1, targets[0, 1]] = -INF
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[2, 3:] = False
    constants = (targets, old, torch.randn(3, 5), mask)

    def run(impl, device):
        leaf = logits.to(device).requires_grad_()
        head = (torch.eye(7, device=device),) if function is linear_policy_loss else ()
        given = [x.to(device) for x in constants]
        output = function(leaf, *head, *given, ref_logps=ref.to(device), config=config, impl=impl)
        output.loss.backward()
        return output.per_token_loss.cpu(), leaf.grad.cpu()

    for found, expected in zip(run(impl, device), run("reference", "cpu"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
