"""What holds for every batch: order, labels and splits do not matter, and weights keep their mean and bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vgpo_kernels import VGPOConfig, vgpo_weights

RECIPES = ["paper", "balanced"]
TORCH_AND_NATIVE = ["reference", "native"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sums are float64 and elementwise work does not depend on the neighbours: at most the last bit differs.
ATOL = 2.5e-7


@st.composite
def batches(draw, most_rows=7, most_tokens=24):
    """Draws a focus with ties, a mask with holes, group labels, and which rows have an image."""
    rows, tokens = draw(st.integers(1, most_rows)), draw(st.integers(1, most_tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.sampled_from([2, 9, 10**6]))  # constant rows, ties, or neither
    focus = torch.randint(-levels, levels + 1, (rows, tokens), generator=generator) / levels
    mask = torch.rand(rows, tokens, generator=generator) < draw(st.sampled_from([0.3, 0.9, 1.0]))
    group_ids = torch.tensor(draw(st.lists(st.integers(-2, 2), min_size=rows, max_size=rows)))
    sees = torch.rand(rows, generator=generator) < 0.9
    return focus, mask, group_ids, sees


def weigh(impl, recipe, focus, mask, group_ids, sees):
    return vgpo_weights(focus, mask, group_ids, VGPOConfig.from_recipe(recipe), has_visual=sees, impl=impl)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=ATOL)


def on_device(inputs):
    return tuple(x.to(DEVICE) for x in inputs)


@pytest.mark.parametrize("impl", TORCH_AND_NATIVE)
@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=50, deadline=None)
@given(inputs=batches(), seed=st.integers(0, 1000))
def test_row_order_never_matters(impl, recipe, inputs, seed):
    order = torch.randperm(len(inputs[0]), generator=torch.Generator().manual_seed(seed))
    expected = weigh(impl, recipe, *inputs)
    found = weigh(impl, recipe, *(x[order] for x in inputs))
    assert_same(found, [x[order] for x in expected])


@pytest.mark.parametrize("impl", TORCH_AND_NATIVE)
@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=50, deadline=None)
@given(inputs=batches(), labels=st.permutations([-(2**40), -1, 0, 7, 2**50]))
def test_group_labels_never_matter(impl, recipe, inputs, labels):
    focus, mask, group_ids, sees = inputs
    renamed = torch.tensor(labels)[group_ids + 2]
    assert_same(weigh(impl, recipe, focus, mask, renamed, sees), weigh(impl, recipe, *inputs))


@pytest.mark.parametrize("impl", TORCH_AND_NATIVE)
@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=50, deadline=None)
@given(inputs=batches())
def test_the_split_into_micro_batches_never_matters(impl, recipe, inputs):
    expected = weigh(impl, recipe, *inputs)
    for label in inputs[2].unique():
        rows = inputs[2] == label
        assert_same(weigh(impl, recipe, *(x[rows] for x in inputs)), [x[rows] for x in expected])


@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=4, deadline=None)
@given(
    inputs=batches(most_rows=3, most_tokens=12),
    labels=st.permutations([-(2**40), -1, 0, 7, 2**50]),
    seed=st.integers(0, 99),
)
def test_order_labels_and_split_never_matter_to_the_kernels(recipe, inputs, labels, seed):
    focus, mask, group_ids, sees = inputs
    order = torch.randperm(len(focus), generator=torch.Generator().manual_seed(seed))
    changed = on_device((focus[order], mask[order], torch.tensor(labels)[group_ids + 2][order], sees[order]))
    expected = [x[order.to(DEVICE)] for x in weigh("triton", recipe, *on_device(inputs))]
    assert_same(weigh("triton", recipe, *changed), expected)
    rows = changed[2] == changed[2][0]
    assert_same(weigh("triton", recipe, *(x[rows] for x in changed)), [x[rows] for x in expected])


@pytest.mark.parametrize("impl", TORCH_AND_NATIVE)
@pytest.mark.parametrize("clamp", [(0.1, 2.0), (0.8, 1.2), (1.0, 1.5)])
@settings(max_examples=60, deadline=None)
@given(inputs=batches())
def test_balanced_weights_keep_mean_one_and_their_bounds(impl, clamp, inputs):
    _, mask, group_ids, sees = inputs
    config = VGPOConfig.balanced(token_clamp=clamp, trajectory_clamp=clamp)
    w = vgpo_weights(*inputs[:3], config, has_visual=sees, impl=impl)
    for weights in (w.token_weights, w.trajectory_weights):
        assert (weights >= torch.tensor(clamp[0])).all()
        assert (weights <= torch.tensor(clamp[1])).all()
    counts = mask.sum(1)
    means = torch.where(mask, w.token_weights, 0).double().sum(1) / counts.clamp(min=1)
    torch.testing.assert_close(means[counts > 0], torch.ones_like(means[counts > 0]), rtol=0, atol=1e-6)
    for label in group_ids.unique():
        assert w.trajectory_weights[group_ids == label].double().mean().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("impl", TORCH_AND_NATIVE)
@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True), min_size=1, max_size=40
    ),
    repeats=st.integers(1, 3),
    percent=st.integers(0, 100),
)
def test_the_gate_is_topk_for_any_floats(impl, values, repeats, percent):
    row = torch.tensor(values * repeats)[None]
    config = VGPOConfig.paper(gamma=1.0, kappa=percent / 100)
    top = max(1, row.shape[1] * percent // 100)
    expected = row >= torch.topk(row, top).values[:, -1:]
    group_ids, seen = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    w = vgpo_weights(row, torch.ones_like(row), group_ids, config, has_visual=seen, impl=impl)
    assert torch.equal(w.gate, expected)


@settings(max_examples=10, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True), min_size=1, max_size=40
    ),
    percent=st.integers(0, 100),
)
def test_the_kernels_gate_is_topk_for_any_floats(values, percent):
    row = torch.tensor(values * 2)[None]
    config = VGPOConfig.paper(gamma=1.0, kappa=percent / 100)
    top = max(1, row.shape[1] * percent // 100)
    expected = row >= torch.topk(row, top).values[:, -1:]
    row = row.to(DEVICE)
    group_ids, seen = (torch.zeros(1, dtype=dtype, device=DEVICE) for dtype in (torch.int64, torch.bool))
    w = vgpo_weights(row, torch.ones_like(row), group_ids, config, has_visual=~seen, impl="triton")
    assert torch.equal(w.gate.cpu(), expected)
