"""The policy loss of logits: the same loss, its gradient written while the logits are read."""

import pytest
import torch
from policy_loss_cases import config_id, every_config, gpu_ulps, mean_magnitude
from torch.utils.checkpoint import checkpoint
from vocabulary_cases import PLAIN, Scaling, dense_loss, random_case

from vgpo_kernels import PolicyLossConfig, logits_policy_loss, policy_loss
from vgpo_kernels.testing import assert_error_budget

LENGTHS = [7, 3, 1, 0]
SCALED = Scaling(temperature=0.7, softcap=3.0)


def run(case, logits, config, scaling=PLAIN, **options):
    return logits_policy_loss(
        logits,
        case.targets,
        completion_mask=case.mask,
        temperature=scaling.temperature,
        softcap=scaling.softcap,
        config=config,
        **case.by_token,
        **options,
    )


def logits_of(case):
    return torch.nn.functional.linear(case.hidden, case.weight, case.bias)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("config", every_config(), ids=config_id)
def test_every_option_of_the_loss_in_float64(config, inplace):
    case = random_case(LENGTHS, 7, dtype=torch.float64, scaling=SCALED)
    expected = dense_loss(case, config, SCALED)
    output = run(case, logits_of(case), config, SCALED, inplace=inplace)
    torch.testing.assert_close(output.loss, expected.loss)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(output.metrics[name], value)
    for name in ("per_token_loss", "logps", "entropy"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name))
    found, wanted = (torch.autograd.grad(2 * x.loss, case.parameters()) for x in (output, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_within_the_budget(impl, dtype, level, device):
    """Logits of half precision are computed with in float32; their gradient is rounded once, at the end.

    Losses of tokens cancel in their mean, and what a GPU adds to them does not.
    """
    case = random_case(LENGTHS, 7)
    logits = logits_of(case).detach().to(dtype)
    config = PolicyLossConfig("grpo", level, epsilon_high=0.28, beta=0.05)
    results = []
    for kind in (torch.float64, torch.float32):
        leaf = logits.to(kind).requires_grad_() if kind == torch.float64 else logits.clone().requires_grad_()
        log_p = (leaf if kind == torch.float64 else leaf.float()).log_softmax(-1)
        chosen = log_p.gather(-1, case.targets.clamp(min=0)[..., None])[..., 0]
        output = policy_loss(chosen, completion_mask=case.mask, config=config, impl="reference", **case.by_token)
        results.append((output.loss.detach(), torch.autograd.grad(output.loss, leaf)[0], output.per_token_loss))
    (loss, gradient, per_token), (same_loss, same_gradient, _) = results
    cancelled = (mean_magnitude(per_token, case.mask, config, None) / loss.abs()).item()
    ulps = 2.0 + (gpu_ulps(config) * cancelled if impl == "triton" else 0.0)
    moved, leaf = case.on(device), logits.to(device).requires_grad_()
    output = run(moved, leaf, config, impl=impl)
    output.loss.backward()
    assert_error_budget("loss", output.loss.detach().cpu(), same_loss, loss, ulps=ulps)
    assert_error_budget("logits", leaf.grad.cpu(), same_gradient, gradient)
    assert leaf.grad.dtype == dtype
    assert not leaf.grad[~moved.mask].any()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_in_place_takes_no_memory_and_changes_nothing_else(impl, device):
    case = random_case(LENGTHS, 7)
    moved, logits = case.on(device), logits_of(case).detach().to(device)
    leaf = logits.clone().requires_grad_()
    run(moved, leaf, PolicyLossConfig(), impl=impl).loss.backward()
    kept = logits.clone().requires_grad_()
    made = kept * 1.0
    loss = run(moved, made, PolicyLossConfig(), inplace=True, impl=impl).loss
    written = made.detach().clone()
    loss.backward()
    assert torch.equal(kept.grad, leaf.grad)
    assert torch.equal(written, leaf.grad)  # a backward that begins with 1 changes nothing


def test_a_slice_of_logits_in_place_leaves_the_rest():
    case = random_case(LENGTHS, 7)
    whole = torch.randn(4, 8, 50)
    before = whole.clone()
    with torch.no_grad():
        run(case, whole[:, :-1], PolicyLossConfig(), inplace=True)
    assert torch.equal(whole[:, -1], before[:, -1])
    assert not torch.equal(whole[:, :-1][case.mask], before[:, :-1][case.mask])


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_backward_is_refused(inplace):
    case = random_case(LENGTHS, 7)
    loss = run(case, logits_of(case), PolicyLossConfig(), inplace=inplace).loss
    loss.backward(torch.tensor(2.0), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_that_something_else_reads_are_not_overwritten_in_silence():
    case = random_case(LENGTHS, 7)
    logits = logits_of(case)
    other = logits.square().sum()
    loss = run(case, logits, PolicyLossConfig(), inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_masked_rows_may_hold_anything():
    case = random_case(LENGTHS, 7)
    logits = logits_of(case).detach()
    dirty = torch.where(case.mask[..., None], logits, torch.nan).requires_grad_()
    clean = logits.clone().requires_grad_()
    for leaf in (dirty, clean):
        run(case, leaf, PolicyLossConfig("grpo")).loss.backward()
    assert torch.equal(dirty.grad, clean.grad)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_half_precision_under_a_loss_scale_keeps_small_gradients(loss_type):
    """A scaler multiplies the loss by 2^16 because fp16 holds nothing below 6e-8: what is lost before is lost."""
    case = random_case([50] * 40, 50)
    logits = logits_of(case).detach().half().requires_grad_()
    scale = 2.0**16
    config = PolicyLossConfig(loss_type)
    (run(case, logits, config).loss * scale).backward()
    exact = logits.detach().double().requires_grad_()
    run(case, exact, config, impl="reference").loss.backward()
    small = (exact.grad.abs() > 1e-9) & (exact.grad.abs() < 5e-8)
    assert small.sum() > 100
    error = (logits.grad.double() / scale - exact.grad)[small].abs()
    assert (error < 0.02 * exact.grad[small].abs()).double().mean() > 0.99


def test_inside_checkpointing():
    case = random_case(LENGTHS, 7, dtype=torch.float64)

    def loss(hidden):
        return run(case, hidden @ case.weight.T, PolicyLossConfig(), inplace=True).loss

    checkpoint(loss, case.hidden, use_reentrant=False).backward()
    expected = dense_loss(case, PolicyLossConfig(), PLAIN)
    torch.testing.assert_close(case.hidden.grad, torch.autograd.grad(expected.loss, case.hidden)[0])
