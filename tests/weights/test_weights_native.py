"""The CPU kernel of the weights against the plain torch weights, on every instruction set."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vgpo_kernels import VGPOConfig, _native, vgpo_weights
from vgpo_kernels.testing import assert_error_budget, ragged_mask
from vgpo_kernels.weights import native, reference

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))

RECIPES = ["paper", "balanced"]
CHANGES = [
    {},
    {"schedule": "exponential", "exponent": 1.5},
    {"schedule": "exponential"},  # the exponent 2 has code of its own
    {"schedule": "step", "step_position": 0.6},
    {"gate": False, "trajectory_score": "normalized_mean"},
    {"compensation": False},
    {"gamma": 0.0},
    {"gamma": 1.0, "kappa": 1.0},
    {"intra": False},
    {"inter": False},
    {"token_clamp": (0.8, 1.2), "trajectory_clamp": (0.9, 1.05), "preserve_mean": True},
    {"token_clamp": (1.0, 1.1), "trajectory_clamp": (0.9, 1.0), "preserve_mean": True},
    {"token_clamp": (0.8, 1.2), "trajectory_clamp": (0.9, 1.05), "preserve_mean": False},
    {"trajectory_score": "normalized_sum", "tail_rounding": "float64", "trajectory_clamp": (0.9, 2.0)},
]


def batch(lengths, width, dtype=torch.float32, seed=0):
    """Focus, mask, group labels, which rows see an image, advantages."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    focus = (torch.rand(rows, width, generator=generator) * 1.6 - 0.6).to(dtype)
    group_ids = torch.randint(-2, 3, (rows,), generator=generator)
    sees = torch.rand(rows, generator=generator) < 0.8
    return focus, ragged_mask(lengths, width), group_ids, sees, torch.randn(rows, generator=generator)


def assert_matches_reference(focus, mask, group_ids, sees, advantages, config, **options):
    options |= {"has_visual": sees, "advantages": advantages}
    found = vgpo_weights(focus, mask, group_ids, config, impl="native", **options)
    same = vgpo_weights(focus, mask, group_ids, config, impl="reference", **options)
    exact = vgpo_weights(focus.double(), mask, group_ids, config, impl="reference", **options)
    assert torch.equal(found.gate, exact.gate)
    for name in ("token_weights", "trajectory_weights", "normalized", "score"):
        assert_error_budget(name, getattr(found, name), getattr(same, name), getattr(exact, name))


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("source", ["similarity", "attention"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_option(recipe, changes, source):
    focus, *others = batch([90, 1, 33, 0, 64, 77, 90], 90)
    config = VGPOConfig.from_recipe(recipe, negative_strength=0.25, warmup_steps=8, **changes)
    focus = focus.abs() if source == "attention" else focus
    assert_matches_reference(focus, *others, config, source=source, step=6)


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("lengths", "width"),
    [
        ([1], 1),  # the smallest batch
        ([15, 16, 17], 17),  # around the sixteen lanes of the widest vector
        ([2048, 2047], 2048),  # whole vectors only, and all but one token of them
        ([20_003, 5], 20_003),  # a row that is longer than a task's tokens
        ([b % 4 for b in range(7000)], 3),  # short rows of several tasks
    ],
)
def test_sizes(lengths, width, recipe):
    assert_matches_reference(*batch(lengths, width), VGPOConfig.from_recipe(recipe))


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, recipe):
    assert_matches_reference(*batch([70, 33, 1, 0], 70, dtype), VGPOConfig.from_recipe(recipe))


def laid_out(x, layout):
    """The same values with other strides; what lies between them is NaN, the largest label or True."""
    fill = math.nan if x.is_floating_point() else True if x.dtype == torch.bool else 2**40
    if layout == "turned":
        return x.t().contiguous().t()
    if layout == "spread":
        return torch.stack([x, torch.full_like(x, fill)], dim=-1)[..., 0]
    if layout == "shifted":
        return torch.cat([x.new_full((1,), fill), x.flatten()])[1:].view(x.shape)
    return x


@settings(max_examples=150, deadline=None)
@given(
    recipe=st.sampled_from(RECIPES),
    changes=st.sampled_from(CHANGES),
    rows=st.integers(1, 6),
    width=st.integers(1, 70),
    share=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    levels=st.sampled_from([1, 4, 2**10]),
    layouts=st.lists(st.sampled_from(["plain", "turned", "spread", "shifted"]), min_size=5, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_stride_with_holes_and_ties(recipe, changes, rows, width, share, levels, layouts, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    focus, _, *others = batch([0] * rows, width, dtype, seed)
    focus = (focus * levels).round() / levels
    mask = torch.rand(rows, width, generator=generator) < share
    read = mask & others[1][:, None]
    focus = torch.where(read, focus, torch.full_like(focus, math.nan))
    views = [laid_out(x, layout) for x, layout in zip((focus, mask, *others), layouts, strict=True)]
    assert_matches_reference(*views, VGPOConfig.from_recipe(recipe, negative_strength=0.5, **changes))


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_row_for_all(recipe):
    """Strides of 0."""
    focus, mask, group_ids, sees, advantages = batch([40, 40, 40], 40)
    config = VGPOConfig.from_recipe(recipe)
    assert_matches_reference(focus[:1].expand(3, 40), mask[:1].expand(3, 40), group_ids, sees, advantages, config)
    assert_matches_reference(focus[:, :1].expand(3, 40), mask, group_ids[:1].expand(3), sees, advantages, config)


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused_with_its_place(value, recipe):
    focus, mask, group_ids, *_ = batch([40, 20], 40)
    focus[0, 30:] = value
    mask[0, 31:] = False
    with pytest.raises(ValueError, match=f"focus: expected finite scores .*got {value} at row 0, column 30 .1 in all"):
        vgpo_weights(focus, mask, group_ids, VGPOConfig.from_recipe(recipe), impl="native")
    mask[0, 30] = False
    w = vgpo_weights(focus, mask, group_ids, VGPOConfig.from_recipe(recipe), impl="native")
    assert all(x.isfinite().all() for x in w)


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_bits_on_any_number_of_threads(recipe):
    focus, mask, group_ids, sees, _ = batch([b * 10 for b in range(90)], 900)  # 81,000 tokens: five tasks
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            config = VGPOConfig.from_recipe(recipe)
            found.append(vgpo_weights(focus, mask, group_ids, config, has_visual=sees, impl="native"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert torch.equal(a, b)


def test_outputs_are_those_of_the_reference():
    focus, mask, group_ids, sees, advantages = batch([5, 2], 5, torch.bfloat16)
    arguments = (focus, mask, group_ids, sees, advantages, VGPOConfig.balanced(), "similarity", 1.0)
    for found, expected in zip(native.weights(*arguments), reference.weights(*arguments), strict=True):
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


def arguments(**changes):
    """Those of the kernel, for 2 rows of 3 tokens."""
    two, one = torch.zeros(2, 3), torch.zeros(2)
    given = {
        **{"token": two.clone(), "trajectory": one.clone(), "normalized": two.clone(), "gate": two.bool()},
        **{"score": one.clone(), "focus": two, "mask": two.bool(), "groups": one.long(), "visual": one.bool()},
        **{"negative": one.bool(), "options": native._options(VGPOConfig.balanced(), "similarity"), "strength": 1.0},
    }
    return (given | changes).values()


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("name", ["token", "normalized", "gate", "mask"])
def test_the_kernel_refuses_wrong_sizes_by_token(name):
    dtype = torch.bool if name in ("gate", "mask") else torch.float32
    for shape in ((2, 4), (3, 3), (0, 3), (2, 0)):
        with pytest.raises(ValueError, match=f"{name}: expected size"):
            _native.call("weights", *arguments(**{name: torch.zeros(shape, dtype=dtype)}))


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("name", ["trajectory", "score", "groups", "visual", "negative"])
def test_the_kernel_refuses_wrong_sizes_by_row(name):
    dtypes = {"trajectory": torch.float32, "score": torch.float32, "groups": torch.int64}
    for rows in (0, 1, 3):
        with pytest.raises(ValueError, match=f"{name}: expected size 2"):
            _native.call("weights", *arguments(**{name: torch.zeros(rows, dtype=dtypes.get(name, torch.bool))}))


def test_the_kernel_refuses_what_is_no_argument():
    with pytest.raises(ValueError, match="options: expected size 20"):
        _native.call("weights", *arguments(options=torch.zeros(19).double()))
    with pytest.raises(TypeError, match="argument 7: expected a tensor of another dtype"):
        _native.call("weights", *arguments(groups=torch.zeros(2)))
    with pytest.raises(TypeError, match="argument 5: expected a tensor of 2 dimensions"):
        _native.call("weights", *arguments(focus=torch.zeros(2)))


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_the_kernel_takes_empty_tensors(shape):
    empty, row = torch.zeros(shape), torch.zeros(shape[0])
    trajectory = torch.full_like(row, math.nan)
    changes = dict.fromkeys(("token", "normalized", "focus"), empty) | dict.fromkeys(("gate", "mask"), empty.bool())
    changes |= {"trajectory": trajectory, "score": row, "groups": row.long(), "visual": row.bool(), "negative": None}
    _native.call("weights", *arguments(**changes))
    assert (trajectory == 1).all()
