"""The Triton kernel of the policy loss against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_loss_cases import (
    assert_matches_reference,
    config_id,
    every_config,
    loss_and_gradient,
    on,
    random_inputs,
)

from vgpo_kernels.policy_loss import PolicyLossConfig
from vgpo_kernels.policy_loss.triton import loss as kernels
from vgpo_kernels.testing import assert_error_budget

ON_GPU = torch.cuda.is_available()
SOME_CONFIGS = [
    PolicyLossConfig.official().replace(beta=0.1),
    PolicyLossConfig("grpo", "sequence", epsilon_high=0.28, delta=1.6, beta=0.1),
    PolicyLossConfig("cispo", "sequence", epsilon_high=1.2),
]


@pytest.mark.parametrize("config", every_config(), ids=config_id)
def test_every_option(config, device):
    num_items = 9.0 if config.divides_by_num_items else None
    assert_matches_reference(random_inputs([7, 4], 7), config, device, num_items_in_batch=num_items)


@pytest.mark.parametrize("config", SOME_CONFIGS[1:], ids=config_id)
def test_a_row_with_one_ratio_where_nothing_cancels(config, device):
    """Advantages of one sign: the gradient is as large as its terms, and so is the ulp it is held to."""
    inputs = random_inputs([700, 33, 1], 700)
    inputs = inputs.replace(advantages=inputs.advantages.abs(), ref_logps=inputs.logps.clone())
    _, exact = loss_and_gradient(inputs.map(lambda x: x.double()), config, impl="reference")
    _, same = loss_and_gradient(inputs, config, impl="reference")
    _, gradient = loss_and_gradient(on(device, inputs), config, impl="triton")
    assert_error_budget("gradient", gradient.cpu(), same, exact)


@pytest.mark.parametrize("config", SOME_CONFIGS, ids=config_id)
@pytest.mark.parametrize(
    ("lengths", "length"),
    [
        ([1], 1),  # the smallest batch
        ([2], 2),  # one row
        ([1, 0, 1], 1),  # one column, one row of padding
        ([512, 500], 512),  # exactly one tile
        ([513, 512], 513),  # one token in a second tile, once masked
        ([5000, 4609], 5000),  # ten tiles
        ([0, 3000], 3001),  # tiles that are all padding
    ],
)
def test_sizes(lengths, length, config, device):
    assert kernels.BLOCK == 512
    assert_matches_reference(random_inputs(lengths, length), config, device)


def test_many_rows(device):
    """Rows lie on grid axis 0, whose limit is not the 65,535 of the others; the interpreter takes fewer rows."""
    rows = 70_000 if ON_GPU else 150
    lengths = [b % 4 for b in range(rows)]
    assert_matches_reference(random_inputs(lengths, 3), SOME_CONFIGS[0], device)


@pytest.mark.parametrize("config", SOME_CONFIGS, ids=config_id)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(config, dtype, device):
    assert_matches_reference(random_inputs([33, 20, 1], 33, dtype=dtype), config, device)


@pytest.mark.parametrize("config", SOME_CONFIGS, ids=config_id)
def test_optional_arguments_left_out(config, device):
    inputs = random_inputs([9, 5], 9, weights=False).replace(old_logps=None)
    inputs = inputs.replace(advantages=inputs.advantages[:, 0].contiguous())
    assert_matches_reference(inputs, config, device)


@settings(max_examples=15, deadline=None)
@given(
    config=st.sampled_from(every_config()),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    present=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 2**16),
)
def test_any_shape_with_any_arguments(config, lengths, present, seed):
    torch.manual_seed(seed)
    inputs = random_inputs(lengths, 20)
    names = ("old_logps", "token_weights", "trajectory_weights")
    inputs = inputs.replace(**{name: None for name, keep in zip(names, present, strict=True) if not keep})
    assert_matches_reference(inputs, config, "cuda" if ON_GPU else "cpu")


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_every_kind_of_mask(mask_dtype, device):
    inputs = on(device, random_inputs([7, 4], 7))
    changed = inputs.replace(completion_mask=inputs.completion_mask.to(mask_dtype))
    expected = inputs.call(SOME_CONFIGS[0], impl="triton")
    assert torch.equal(changed.call(SOME_CONFIGS[0], impl="triton").loss, expected.loss)


@pytest.mark.parametrize("config", SOME_CONFIGS, ids=config_id)
def test_masked_positions_change_nothing(config, device):
    inputs = on(device, random_inputs([9, 0, 5], 9))
    keep = inputs.completion_mask
    output, gradient = loss_and_gradient(inputs, config, impl="triton")
    for garbage in (math.nan, math.inf):
        dirty = inputs.map(
            lambda x, garbage=garbage: torch.where(
                keep if x.dim() == 2 else keep.any(1), x, torch.full_like(x, garbage)
            )
        )
        dirty_output, dirty_gradient = loss_and_gradient(dirty, config, impl="triton")
        assert torch.equal(dirty_output.loss, output.loss)
        assert torch.equal(dirty_output.per_token_loss, output.per_token_loss)
        assert torch.equal(dirty_gradient, gradient)
        assert dirty_output.metrics == output.metrics


def test_nan_at_a_valid_token_is_not_hidden(device):
    """Comparisons with NaN are false, so a clip written with min and max would quietly return its bound."""
    inputs = on(device, random_inputs([3, 3], 3))
    inputs.logps[0, 1] = math.nan
    output = inputs.call(SOME_CONFIGS[0], impl="triton")
    assert output.loss.isnan()
    assert output.per_token_loss.isnan().sum() == 1


@pytest.mark.parametrize("config", SOME_CONFIGS, ids=config_id)
def test_strided_inputs_are_read_in_place(config, device):
    """Transposed, sliced out of a wider tensor, and expanded; stride 1 along T in none of them."""
    inputs = on(device, random_inputs([9, 5], 9))
    expected, expected_gradient = loss_and_gradient(inputs, config, impl="triton")

    def strided(x):
        if x.dim() == 1:
            return torch.stack([x, x], dim=1)[:, 1]
        return torch.stack([x, torch.full_like(x, math.nan)], dim=2).transpose(0, 1)[..., 0].transpose(0, 1)

    mask = inputs.completion_mask.t().contiguous().t()
    views = inputs.map(strided).replace(completion_mask=mask)
    assert not views.logps.is_contiguous()
    logps = views.logps.requires_grad_()
    output = views.call(config, impl="triton")
    (gradient,) = torch.autograd.grad(output.loss, logps)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


def test_same_bits_from_run_to_run(device):
    inputs = on(device, random_inputs([1500, 7, 900], 1500))
    first, first_gradient = loss_and_gradient(inputs, SOME_CONFIGS[1], impl="triton")
    second, second_gradient = loss_and_gradient(inputs, SOME_CONFIGS[1], impl="triton")
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first_gradient, second_gradient)
    assert first.metrics == second.metrics


def test_backward_twice_and_scaled(device):
    inputs = on(device, random_inputs([9, 5], 9))
    logps = inputs.logps.clone().requires_grad_()
    loss = inputs.replace(logps=logps).call(SOME_CONFIGS[1], impl="triton").loss
    loss.backward(retain_graph=True)
    once = logps.grad.clone()
    (3.0 * loss).backward()
    torch.testing.assert_close(logps.grad, 4.0 * once)


def test_no_compilation_a_length():
    """Lengths and strides are neither specialised nor compile-time."""
    run_time = [name for name in kernels.policy_loss_kernel.arg_names if "stride" in name] + ["length"]
    assert set(run_time) == set(kernels.RUN_TIME)
    constants = {name for name in kernels.policy_loss_kernel.arg_names if name.isupper()}
    assert not constants & set(run_time)


def test_compile_cases_name_every_argument():
    for case in kernels.compile_cases():
        assert list(case.signature) == list(case.kernel.arg_names)
        constants = {name for name, kind in case.signature.items() if kind == "constexpr"}
        assert constants == set(case.constexprs)
