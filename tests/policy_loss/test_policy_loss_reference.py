"""The reference of the policy loss against an independent float64 transcription, and its corners."""

import math

import pytest
import torch
from policy_loss_cases import (
    Inputs,
    config_id,
    every_config,
    loss_and_gradient,
    random_inputs,
    transcription,
)

from vgpo_kernels.policy_loss import PolicyLossConfig, ops, policy_loss, terms
from vgpo_kernels.policy_loss.backend import LossInputs
from vgpo_kernels.testing import ragged_mask

# One full row, one single token, one row of padding, one in between.
LENGTHS = [9, 1, 0, 5]


@pytest.fixture
def inputs() -> Inputs:
    return random_inputs(LENGTHS, 9).map(lambda x: x.double())


@pytest.mark.parametrize("config", every_config(), ids=config_id)
def test_loss_and_gradient_match_the_transcription(inputs, config):
    num_items = 23.0 if config.divides_by_num_items else None
    output, gradient = loss_and_gradient(inputs, config, num_items_in_batch=num_items)
    loss, expected = transcription(inputs, config, num_items)
    torch.testing.assert_close(output.loss.detach(), loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_type", ["bnpo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "changes",
    [
        {"old_logps": None},
        {"advantages": torch.tensor([1.5, -0.5, 2.0, -1.0], dtype=torch.float64)},
        {"token_weights": None},
        {"trajectory_weights": None},
    ],
    ids=["no-old-logps", "advantage-a-row", "no-token-weights", "no-trajectory-weights"],
)
def test_optional_arguments(inputs, loss_type, level, changes):
    config = PolicyLossConfig(loss_type, level, epsilon_high=1.1 if loss_type == "cispo" else 0.2)
    output, gradient = loss_and_gradient(inputs.replace(**changes), config)
    loss, expected = transcription(inputs.replace(**changes), config)
    torch.testing.assert_close(output.loss.detach(), loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1, 3])
def test_advantages_are_told_apart_by_rank_when_lengths_agree(size):
    """T == B: a (B,) advantage belongs to rows, however many columns there are."""
    inputs = random_inputs([size] * size, size, weights=False)
    by_row = torch.arange(1.0, size + 1.0)
    config = PolicyLossConfig()
    as_rows = inputs.replace(advantages=by_row).call(config).per_token_loss
    spelled_out = inputs.replace(advantages=by_row[:, None].expand(size, size)).call(config).per_token_loss
    assert torch.equal(as_rows, spelled_out)


def test_metrics_match_their_definitions(inputs):
    config = PolicyLossConfig("bnpo", epsilon_high=0.28, clip_ratio_dual=1.4, beta=0.1)
    output = inputs.call(config)
    keep = inputs.completion_mask
    log_ratio = (inputs.logps - inputs.old_logps)[keep]
    ratio, advantage = log_ratio.exp(), inputs.advantages[keep]
    d = (inputs.ref_logps - inputs.logps)[keep]
    expected = {
        "clip_fraction_low": ((advantage < 0) & (ratio < 0.8)).double().mean(),
        "clip_fraction_high": ((advantage > 0) & (ratio > 1.28)).double().mean(),
        "clip_fraction_dual": ((advantage < 0) & (ratio > 1.4)).double().mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "kl": (d.exp() - d - 1).mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "entropy_proxy": -inputs.logps[keep].mean(),
    }
    assert set(output.metrics) == set(expected) == set(terms.METRICS)
    for name, value in expected.items():
        torch.testing.assert_close(output.metrics[name], value, rtol=1e-12, atol=1e-14)
        if name.startswith("clip"):
            assert value > 0, f"{name}: the inputs should meet every clip"


def test_ratio_metrics_at_sequence_level_count_a_row_once_a_token(inputs):
    output = inputs.call(PolicyLossConfig(importance_sampling_level="sequence"))
    ratios = [(inputs.logps - inputs.old_logps)[b][: LENGTHS[b]].mean().exp() for b in range(4) if LENGTHS[b]]
    repeated = torch.stack(ratios).repeat_interleave(torch.tensor([n for n in LENGTHS if n]))
    torch.testing.assert_close(output.metrics["ratio_mean"], repeated.mean())
    torch.testing.assert_close(output.metrics["ratio_max"], repeated.max())


def test_per_token_loss_sums_to_the_loss(inputs):
    output = inputs.call(PolicyLossConfig("bnpo", beta=0.1))
    assert not output.per_token_loss.requires_grad
    torch.testing.assert_close(output.per_token_loss.sum() / sum(LENGTHS), output.loss)
    assert (output.per_token_loss[~inputs.completion_mask] == 0).all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_ratio_of_one_has_the_whole_gradient(advantage):
    """Bounds at exactly 1 (epsilon 0): the ratio sits on the boundary, where torch.clamp still passes it on."""
    logps = torch.zeros(1, 3, requires_grad=True)
    config = PolicyLossConfig("bnpo", epsilon_low=0.0, epsilon_high=0.0)
    policy_loss(logps, None, torch.tensor([advantage]), torch.ones(1, 3), config=config).loss.backward()
    torch.testing.assert_close(logps.grad, torch.full((1, 3), -advantage / 3))


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_dual_clip_acts_on_negative_advantages_only(impl, level, device):
    """Ratio 2, dual clip 1.5: a negative advantage stops at 1.5 with no gradient, a positive one at 1.2."""
    logps = torch.full((2, 1), math.log(2.0), device=device, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0], device=device)
    mask = torch.ones(2, 1, device=device)
    config = PolicyLossConfig("bnpo", level, clip_ratio_dual=1.5)
    old = torch.zeros(2, 1, device=device)
    output = policy_loss(logps, old, advantages, mask, config=config, impl=impl)
    expected = torch.tensor([[-1.2], [1.5]], device=device)
    torch.testing.assert_close(output.per_token_loss, expected)
    output.loss.backward()
    assert torch.equal(logps.grad, torch.zeros_like(logps))
    free = policy_loss(logps, old, advantages, mask, config=config.replace(clip_ratio_dual=None), impl=impl)
    torch.testing.assert_close(free.per_token_loss, torch.tensor([[-1.2], [2.0]], device=device))


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_overflowing_ratio_is_cut_before_exp(impl, level, device):
    """exp(200) is inf in float32; a clipped token has a finite loss and gradient 0, where 0 * inf would be NaN."""
    logps = torch.full((2, 2), 200.0, device=device, requires_grad=True)
    old = torch.zeros(2, 2, device=device)
    mask = torch.ones(2, 2, device=device)
    config = PolicyLossConfig("bnpo", level, clip_ratio_dual=3.0)
    output = policy_loss(logps, old, torch.tensor([1.0, -1.0], device=device), mask, config=config, impl=impl)
    output.loss.backward()
    torch.testing.assert_close(output.per_token_loss[:, 0].cpu(), torch.tensor([-1.2, 3.0]))
    assert torch.equal(logps.grad, torch.zeros_like(logps))
    assert output.metrics["ratio_max"] == math.inf


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
def test_overflow_without_a_bound_is_inf_as_in_torch(impl, device):
    logps = torch.full((1, 1), 200.0, device=device, requires_grad=True)
    zero, one = torch.zeros(1, 1, device=device), torch.ones(1, 1, device=device)
    output = policy_loss(logps, zero, -one[0], one, impl=impl)
    output.loss.backward()
    assert output.loss == math.inf
    assert logps.grad.item() == math.inf


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_batch_without_a_valid_token(impl, loss_type, level, device):
    inputs = random_inputs([0, 0], 3).map(lambda x: torch.full_like(x, math.nan).to(device))
    inputs = inputs.replace(completion_mask=inputs.completion_mask.to(device))
    config = PolicyLossConfig(loss_type, level, epsilon_high=1.0, max_completion_length=4, beta=0.1)
    output, gradient = loss_and_gradient(inputs, config, impl=impl)
    assert output.loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert all(value == 0 for value in output.metrics.values())


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_empty_row_counts_among_the_rows(loss_type):
    inputs = random_inputs([4, 0], 4)
    config = PolicyLossConfig(loss_type, max_completion_length=8)
    alone = random_inputs([4], 4).replace(**{name: getattr(inputs, name)[:1] for name in inputs.__dict__})
    torch.testing.assert_close(inputs.call(config).loss, alone.call(config).loss / 2)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_every_kind_of_mask(inputs, mask_dtype):
    config = PolicyLossConfig("grpo")
    changed = inputs.replace(completion_mask=inputs.completion_mask.to(mask_dtype)).call(config).loss
    assert torch.equal(changed, inputs.call(config).loss)


def test_masked_positions_change_nothing(inputs):
    config = PolicyLossConfig.official().replace(beta=0.1, importance_sampling_level="sequence")
    output, gradient = loss_and_gradient(inputs, config)
    for garbage in (math.nan, math.inf, -math.inf):
        dirty, dirty_gradient = loss_and_gradient(with_garbage(inputs, garbage), config)
        assert torch.equal(dirty.loss, output.loss)
        assert torch.equal(dirty_gradient, gradient)
        assert (dirty_gradient[~inputs.completion_mask] == 0).all()
        assert torch.equal(dirty.per_token_loss, output.per_token_loss)
        assert dirty.metrics == output.metrics


def with_garbage(inputs: Inputs, garbage: float) -> Inputs:
    """Fills masked positions, and the trajectory weight of rows without a token."""
    keep = inputs.completion_mask
    filled = inputs.map(lambda x: torch.where(keep if x.dim() == 2 else keep.any(1), x, torch.full_like(x, garbage)))
    assert not filled.logps.isfinite().all()
    return filled


def test_backward_twice_and_scaled(inputs):
    logps = inputs.logps.clone().requires_grad_()
    config = PolicyLossConfig("grpo", beta=0.1)
    loss = inputs.replace(logps=logps).call(config).loss
    loss.backward(retain_graph=True)
    once = logps.grad.clone()
    (3.0 * loss).backward()
    torch.testing.assert_close(logps.grad, 4.0 * once)


def test_gradient_reaches_logps_alone(inputs):
    tracked = inputs.map(lambda x: x.clone().requires_grad_())
    output = tracked.call(PolicyLossConfig("grpo", beta=0.1))
    output.loss.backward()
    names = [name for name in inputs.__dict__ if name not in ("logps", "completion_mask")]
    assert tracked.logps.grad is not None
    assert all(getattr(tracked, name).grad is None for name in names)
    assert not any(metric.requires_grad for metric in output.metrics.values())


def test_without_gradient(inputs):
    config = PolicyLossConfig(beta=0.1)
    expected = inputs.call(config).loss
    assert not expected.requires_grad
    tracked = inputs.replace(logps=inputs.logps.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(tracked.call(config).loss, expected)
    with torch.inference_mode():
        assert torch.equal(inputs.map(torch.clone).call(config).loss, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_the_results(inputs, dtype):
    output, gradient = loss_and_gradient(inputs.map(lambda x: x.to(dtype)), PolicyLossConfig())
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    assert gradient.dtype == dtype
    assert output.loss.dtype == output.per_token_loss.dtype == computed
    assert all(metric.dtype == computed for metric in output.metrics.values())


def test_num_items_as_a_number_and_as_a_tensor(inputs):
    config = PolicyLossConfig("dapo")
    own = inputs.call(config).loss
    assert torch.equal(inputs.call(config, num_items_in_batch=sum(LENGTHS)).loss, own)
    assert torch.equal(inputs.call(config, num_items_in_batch=torch.tensor(sum(LENGTHS))).loss, own)
    torch.testing.assert_close(inputs.call(config, num_items_in_batch=2.0 * sum(LENGTHS)).loss, own / 2)
    summed = inputs.call(config).per_token_loss.sum()
    torch.testing.assert_close(inputs.call(config, num_items_in_batch=0).loss, summed)


# "cispo" is left out: its ratio is a constant for the gradient, so no difference quotient gives it.
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck(inputs, loss_type, level):
    config = PolicyLossConfig(loss_type, level, clip_ratio_dual=1.4, beta=0.1, max_completion_length=9)
    logps = inputs.logps.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: inputs.replace(logps=x).call(config).loss, logps)


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
@pytest.mark.parametrize("full", [True, False], ids=["all-arguments", "fewest-arguments"])
def test_opcheck(impl, full, device):
    inputs = random_inputs([4, 2], 5, weights=full).map(lambda x: x.to(device))
    optional = [inputs.ref_logps, inputs.token_weights, inputs.trajectory_weights] if full else [None] * 3
    arguments = (
        inputs.logps,
        inputs.old_logps if full else None,
        inputs.advantages if full else inputs.advantages[:, 0],
        inputs.completion_mask.to(device),
        *optional,
        torch.tensor(9.0, device=device) if full else None,
    )
    config = PolicyLossConfig.official(loss_type="dapo", beta=0.1 if full else 0.0, kl_importance_weighted=full)
    torch.library.opcheck(ops.policy_loss, arguments, {"impl": impl, **config.settings()})


def test_the_gradient_by_torch_func(device):
    inputs = random_inputs([6, 3], 6).map(lambda x: x.to(device))
    inputs = inputs.replace(completion_mask=inputs.completion_mask.to(device))
    _, expected = loss_and_gradient(inputs, PolicyLossConfig())
    gradient = torch.func.grad(lambda logps: inputs.replace(logps=logps).call(PolicyLossConfig()).loss)(inputs.logps)
    assert torch.equal(gradient, expected)


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
def test_compiles_once_for_all_lengths(impl, device):
    config = PolicyLossConfig("grpo", "sequence", clip_ratio_dual=3.0, beta=0.1)
    torch._dynamo.reset()

    def step(inputs: Inputs):
        output = inputs.call(config, impl=impl)
        return output.loss, output.metrics["kl"]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, length in (([3, 5], 5), ([8, 2], 11), ([4, 4, 6], 7)):
        inputs = random_inputs(lengths, length).map(lambda x: x.to(device))
        inputs = inputs.replace(completion_mask=inputs.completion_mask.to(device))
        eager, expected = loss_and_gradient(inputs, config, impl=impl)
        logps = inputs.logps.clone().requires_grad_()
        loss, kl = compiled(inputs.replace(logps=logps))
        loss.backward()
        torch.testing.assert_close(loss, eager.loss)
        torch.testing.assert_close(kl, eager.metrics["kl"])
        torch.testing.assert_close(logps.grad, expected)


@pytest.mark.parametrize("left_padded", [False, True])
def test_terms_work_on_a_flat_chunk_of_tokens(left_padded):
    """A fused caller holds tokens of many rows in one list; at token level each term takes any shape."""
    inputs = random_inputs([6, 3], 6).map(lambda x: x.double())
    keep = ragged_mask([6, 3], 6, left_padded=left_padded)
    config = PolicyLossConfig("bnpo", beta=0.1, clip_ratio_dual=1.4)
    whole, gradient = loss_and_gradient(inputs.replace(completion_mask=keep), config)
    constants = {name: x for name, x in inputs.__dict__.items() if name != "logps"}
    weighted = terms.effective_advantages(LossInputs(**constants), keep, torch.float64)
    chunk = terms.loss_with_gradient(
        inputs.logps[keep],
        inputs.old_logps[keep],
        weighted[keep],
        inputs.ref_logps[keep],
        torch.ones(9, dtype=torch.bool),
        config,
    )
    torch.testing.assert_close(chunk.per_token, whole.per_token_loss[keep])
    torch.testing.assert_close(chunk.gradient / 9, gradient[keep])
