"""The CPU kernels against the reference, within the error budget, on every instruction set."""

import pytest
import torch
from focus_cases import KINDS, inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vgpo_kernels import _native
from vgpo_kernels.focus import native, reference, visual_focus_score
from vgpo_kernels.testing import assert_error_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("capability")


def check(states, visual, completion, ids):
    """Compares with the reference, and returns the scores."""
    named = (ids.get("image_ids"), ids.get("seq_ids"))
    scores = native.visual_focus_score(states, visual, completion, *named)
    same_dtype = reference.visual_focus_score(states, visual, completion, *named)
    exact = reference.visual_focus_score(states.double(), visual, completion, *named)
    assert scores.dtype == torch.float32
    assert scores.stride() == same_dtype.stride()
    assert_error_budget("focus", scores, same_dtype, exact)
    return scores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "length", "size"),
    [
        (3, 61, 67),  # no whole vector, no whole group of rows
        (2, 128, 64),  # whole vectors
        (2, 20, 1),  # one column, fewer than a vector
        (2, 700, 21),  # more rows a prototype than a task sums
        (1, 300, 600),  # more columns than a task merges, than a partial inner product sums
    ],
)
def test_kernels_are_the_reference(batch, length, size, kind, dtype):
    check(*inputs(batch, length, size, dtype, kind=kind))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_images(dtype):
    # 80 tasks' sums make the image, more than are merged at once.
    states = torch.randn(1, 5200, 9, generator=torch.Generator().manual_seed(1)).to(dtype) + 0.25
    visual = torch.arange(5200)[None] < 5111
    check(states, visual, ~visual, {})


def test_many_images_a_sequence():
    # 41 prototypes: an odd number, scored two by two.
    states, visual, completion, _ = inputs(2, 300, 35)
    images = torch.where(visual, torch.arange(300).expand(2, -1) // 2, -1)
    check(states, visual, completion, {"image_ids": images})


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_do_not_count_are_not_read(kind):
    states, visual, completion, ids = inputs(3, 60, 40, kind=kind)
    expected = check(states, visual, completion, ids)
    # The last row, or its first half, has no image: its completion does not count either.
    blind = torch.zeros_like(visual)
    blind[2, : 30 if kind.startswith("packed") else 60] = True
    garbage = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38])
    states[~(visual | completion) | blind] = garbage.repeat(10)
    assert torch.equal(
        native.visual_focus_score(states, visual, completion, *map(ids.get, ("image_ids", "seq_ids"))), expected
    )
    assert torch.equal(expected != 0, completion & ~blind)


def test_nan_zero_and_extremes():
    states = torch.randn(7, 6, 19)
    visual = (torch.arange(6) < 2).expand(7, -1)
    states[0, 3] = float("nan")
    states[1, 0, 7] = float("nan")
    states[2, 4] = 0
    states[3, 0] = -states[3, 1]
    states[4, :2] = states[4, 5] = 1.5
    states[4, 4] = -0.25
    states[5, 3, 18] = float("inf")
    states[6, 1, 0] = float("inf")
    scores = native.visual_focus_score(states, visual, ~visual, None, None)
    expected = reference.visual_focus_score(states, visual, ~visual, None, None)
    torch.testing.assert_close(scores, expected, atol=3e-7, rtol=0, equal_nan=True)
    assert scores[0].isnan().tolist() == [False, False, False, True, False, False]
    assert scores[1, 2:].isnan().all()
    assert scores[2, 4] == 0
    assert torch.equal(scores[3], torch.zeros(6))
    assert scores.nan_to_num().abs().max() <= 1
    assert scores[4, 4:].tolist() == pytest.approx([-1, 1], abs=2e-7)


def test_a_nan_of_one_image_shows_beside_others():
    states = torch.randn(1, 6, 8)
    visual = (torch.arange(6) < 3)[None]
    for image in range(3):
        broken = states.clone()
        broken[0, image] = float("nan")
        scores = native.visual_focus_score(broken, visual, ~visual, torch.arange(6)[None], None)
        assert torch.equal(scores.isnan(), ~visual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "packed images"])
@pytest.mark.parametrize(
    "layout", ["transposed", "an element off", "every second token", "every third column", "expanded"]
)
def test_strided_states(layout, kind, dtype):
    states, visual, completion, ids = inputs(2, 70, 23, dtype, kind=kind)
    if layout == "transposed":
        states = states.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "an element off":
        states = torch.nn.functional.pad(states, (1, 1))[..., 1:24]
    elif layout == "every second token":
        states = states.repeat_interleave(2, dim=1)[:, ::2]
    elif layout == "every third column":
        states = states.repeat_interleave(3, dim=2)[..., ::3]
    else:
        states = states[:1].expand(2, -1, -1)
    assert not states.is_contiguous()
    check(states, visual, completion, ids)
    constant = states[:, :, :1].expand(-1, -1, 23)  # columns 0 apart
    check(constant, visual, completion, ids)


def test_strided_masks_and_ids():
    states, visual, completion, ids = inputs(3, 62, 16, kind="packed images")
    expected = check(states, visual, completion, ids)
    transposed = [mask.t().contiguous().t() for mask in (visual, completion)]
    strided = {name: value.repeat_interleave(2, dim=1)[:, ::2] for name, value in ids.items()}
    assert torch.equal(check(states, *transposed, strided), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bit_identical_whatever_the_number_of_threads(kind):
    arguments = inputs(3, 400, 70, torch.bfloat16, kind=kind)
    before = torch.get_num_threads()
    scores = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            scores.append(check(*arguments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shapes_strides_masks_and_ids(data):
    batch, length, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    order = data.draw(st.permutations(range(3)))
    step, offset = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2))
    shape = [(batch, length, size)[axis] for axis in order]
    storage = torch.randn(*shape[:2], shape[2] * step + offset).to(data.draw(st.sampled_from(DTYPES)))
    states = storage[..., offset::step].permute([order.index(axis) for axis in range(3)])
    states = states[:, :, :size]

    def grid(values):
        row = st.lists(st.sampled_from(values), min_size=length, max_size=length)
        return torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))

    role = grid([0, 1, 2])  # neither, visual, generated
    ids = {}
    if data.draw(st.booleans()):
        ids["image_ids"] = torch.where(role == 1, grid([0, 5, 2**40]), -1)
    if data.draw(st.booleans()):
        ids["seq_ids"] = torch.where(role > 0, grid([3, 1, 2**50]), -1)
    check(states, role == 1, role == 2, ids)


def test_the_public_function_runs_the_kernels(monkeypatch):
    calls = []
    call = _native.call
    monkeypatch.setattr(_native, "call", lambda name, *arguments: (calls.append(name), call(name, *arguments)))
    states, visual, completion, ids = inputs(2, 40, 16, kind="images")
    by_default = visual_focus_score(states.requires_grad_(), visual, completion, **ids)
    chosen = visual_focus_score(states, visual, completion, **ids, impl="native")
    assert calls == ["visual_focus", "visual_focus"]
    assert torch.equal(by_default, chosen)
    assert not chosen.requires_grad


def test_float64_is_for_the_reference():
    states, visual, completion, _ = inputs(2, 40, 16, torch.float64)
    with pytest.raises(RuntimeError, match="float64: pass impl='reference'"):
        visual_focus_score(states, visual, completion, impl="native")


def integers(*values):
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("place", "wrong", "error", "message"),
    [
        (0, torch.zeros(11), ValueError, "focus: expected size 12 in dimension 0, got 11"),
        (0, torch.zeros(12).double(), TypeError, "argument 0: expected a tensor of another dtype"),
        (1, torch.zeros(2, 6, 3).double(), TypeError, "argument 1: expected a tensor of float32, bfloat16 or float16"),
        (1, torch.zeros(6, 3), TypeError, "argument 1: expected a tensor of 3 dimensions"),
        (1, torch.zeros(3, 4, 3), ValueError, "bounds: expected one more than rows of states"),
        (2, integers(0, 1, 12), ValueError, "visual: expected numbers of tokens"),
        (2, integers(0, -1, 6), ValueError, "visual: expected numbers of tokens"),
        (2, integers(0, 1), ValueError, "bounds: expected rising numbers of visual tokens"),
        (3, integers(0, 2), ValueError, "bounds: expected one more than rows of states"),
        (3, integers(2, 1, 3), ValueError, "bounds: expected rising numbers of visual tokens"),
        (3, integers(-1, 1, 3), ValueError, "bounds: expected rising numbers of visual tokens"),
        (3, torch.zeros(0, dtype=torch.int64), ValueError, "bounds: expected at least one"),
        (4, integers(12), ValueError, "completion: expected numbers of tokens"),
        (4, integers(-1), ValueError, "completion: expected numbers of tokens"),
        (5, integers(0, 1).int(), ValueError, "begin, end: expected both or none"),
        (5, integers(0).int(), ValueError, "begin: expected size 2 in dimension 0, got 1"),
        (6, integers(0).int(), ValueError, "end: expected size 2 in dimension 0, got 1"),
        (6, integers(0, 1), TypeError, "argument 6: expected a tensor of another dtype"),
    ],
)
def test_wrong_arguments_of_the_kernel(place, wrong, error, message):
    arguments = [
        torch.zeros(12),
        torch.zeros(2, 6, 3),
        integers(0, 1, 6),
        integers(0, 2, 3),
        integers(3, 8),
        None,
        None,
    ]
    _native.call("visual_focus", *arguments)
    arguments[place] = wrong
    with pytest.raises(error, match=message):
        _native.call("visual_focus", *arguments)


@pytest.mark.parametrize(("begin", "end"), [(-1, 1), (1, 0), (0, 3)])
def test_wrong_ranges_of_prototypes(begin, end):
    arguments = [torch.zeros(12), torch.zeros(2, 6, 3), integers(0, 1, 6), integers(0, 2, 3), integers(3, 8)]
    with pytest.raises(ValueError, match="begin, end: expected ranges of prototypes"):
        _native.call("visual_focus", *arguments, integers(0, begin).int(), integers(1, end).int())


def test_nothing_to_score():
    states, visual, completion, ids = inputs(2, 40, 16, kind="packed images")
    nothing = visual & False
    ids = tuple(ids.values())
    assert native.visual_focus_score(states, nothing, completion, None, None).eq(0).all()
    assert native.visual_focus_score(states, visual, nothing, None, None).eq(0).all()
    assert native.visual_focus_score(states, nothing, completion, *ids).eq(0).all()
    assert native.visual_focus_score(states, visual, nothing, *ids).eq(0).all()
