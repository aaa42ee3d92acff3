"""The kernels against the reference, within the error budget, on the inputs that break kernels."""

import pytest
import torch
from focus_cases import KINDS, inputs
from gpu_arithmetic import allowance
from hypothesis import given, settings
from hypothesis import strategies as st

from vgpo_kernels.focus import triton as kernels
from vgpo_kernels.focus import visual_focus_score
from vgpo_kernels.testing import assert_error_budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(name, device, states, visual, completion, ids):
    """Compares the kernels on `device` with the reference on the CPU, and returns the kernels' scores.

    A GPU adds 2 ulp for each of two roots and for their quotient; the prototype's mean is divided exactly.
    """
    moved = {key: value.to(device) for key, value in ids.items()}
    scores = visual_focus_score(
        states.to(device), visual.to(device), completion.to(device), impl="triton", **moved
    ).cpu()
    same_dtype = visual_focus_score(states, visual, completion, impl="reference", **ids)
    exact = visual_focus_score(states.double(), visual, completion, impl="reference", **ids)
    assert scores.dtype == torch.float32
    assert_error_budget(name, scores, same_dtype, exact, ulps=2.0 + allowance(3))
    return scores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "length", "size"),
    [
        (3, 61, 67),  # odd everything: no whole unit of columns, tiles cut on every side
        (2, 128, 64),  # exactly the tiles
        (2, 20, 1),  # one column
    ],
)
def test_kernels_are_the_reference(device, dtype, kind, batch, length, size):
    check(kind, device, *inputs(batch, length, size, dtype, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_images_longer_than_a_tile(device, kind):
    # Two tiles of tokens between the first visual one and the last, a second and nearly empty block of columns.
    check(kind, device, *inputs(2, 330, 264, kind=kind))


@pytest.mark.usefixtures("gpu_arithmetic")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 8])
def test_roots_and_divisions_of_a_gpu(kind, size):
    for dtype in DTYPES:
        check(kind, "cpu", *inputs(2, 20, size, dtype, kind=kind))


@pytest.mark.usefixtures("gpu_arithmetic")
@pytest.mark.parametrize("size", [1e-19, 1e-20])
def test_a_state_whose_square_is_subnormal_has_a_direction(size):
    """And the one whose square is 0 has none, as in the reference."""
    states = torch.tensor([3.0, 4.0, 0.0]) * torch.tensor([[1.0], [size], [-size], [1e-30]])
    states[1, 2] = 5 * size
    visual = torch.tensor([[True, False, False, False]])
    scores = visual_focus_score(states[None], visual, ~visual, impl="triton")
    torch.testing.assert_close(scores, torch.tensor([[0.0, 0.5**0.5, -1.0, 0.0]]), atol=0, rtol=1e-4)
    expected = visual_focus_score(states[None], visual, ~visual, impl="reference")
    torch.testing.assert_close(scores, expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_last_hidden_state_of_a_7b_model(device, dtype):
    check("D 3584", device, *inputs(2, 48, 3584, dtype))


def test_more_tokens_than_a_grid_axis_holds(device, monkeypatch):
    # No grid axis but the first holds more than 65,535 programs; 600,000 tokens need 75,000 of them.
    length = 600_000
    if device == "cpu":  # interpreted, a program takes milliseconds: fewer tokens, and more of them in each
        length = 65_600
        tiles = {"BLOCK_T": 1024, "BLOCK_D": 16, "SPREAD": 1, "num_warps": 4}
        monkeypatch.setattr(kernels, "cosine_tiles", lambda *_: tiles)
    states = torch.randn(1, length, 8).half()
    visual = torch.zeros(1, length, dtype=torch.bool)
    completion = torch.zeros_like(visual)
    visual[0, [3, length // 2]] = True
    completion[0, [2, length // 2 - 1, length - 1]] = True
    scores = check("long", device, states, visual, completion, {})
    assert torch.equal(scores != 0, completion)


def test_states_beyond_two_to_the_31_elements(device):
    # The state of token 2 starts at element 2^31: offsets in 32 bits would wrap. Pages are touched on use only.
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        storage = torch.empty(2**31 + 8, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("not enough memory for 4 GiB of addresses")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
    states = storage.as_strided((1, 3, 8), (0, 2**30, 1))
    small = torch.randn(1, 3, 8).half()
    states.copy_(small)
    visual = torch.tensor([[True, False, False]], device=device)
    completion = torch.tensor([[False, False, True]], device=device)
    far = visual_focus_score(states, visual, completion, impl="triton")
    near = visual_focus_score(small.to(device), visual, completion, impl="triton")
    assert torch.equal(far, near)
    assert near[0, 2] != 0


@pytest.mark.parametrize("kind", ["plain", "packed images"])
@pytest.mark.parametrize("layout", ["transposed", "a column off", "every second token", "one row expanded"])
def test_strided_states_are_read_in_place(device, kind, layout):
    states, visual, completion, ids = inputs(2, 70, 24, kind=kind)
    if layout == "transposed":
        states = states.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "a column off":  # rows start where 16 bytes do not
        states = torch.nn.functional.pad(states, (1, 7))[..., 1:25]
    elif layout == "every second token":
        states = states.repeat_interleave(2, dim=1)[:, ::2]
    else:
        states = states[:1].expand(2, -1, -1)
    assert not states.is_contiguous()
    check(layout, device, states, visual, completion, ids)


def test_strided_masks_and_ids(device):
    states, visual, completion, ids = inputs(3, 62, 16, kind="packed images")
    expected = check("contiguous", device, states, visual, completion, ids)
    transposed = [mask.t().contiguous().t() for mask in (visual, completion)]
    strided = {name: value.repeat_interleave(2, dim=1)[:, ::2] for name, value in ids.items()}
    assert torch.equal(check("strided", device, states, *transposed, strided), expected)


@pytest.mark.parametrize("name", ["image_ids", "seq_ids"])
def test_visual_tokens_without_an_image_or_in_padding_count_for_nothing(device, monkeypatch, name):
    # An error where values are checked; unchecked, they must not make a prototype of their own.
    monkeypatch.delenv("VGPO_DEBUG", raising=False)
    states, visual, completion, ids = inputs(2, 40, 8, kind="packed images")
    states, visual, completion = (value.to(device) for value in (states, visual, completion))
    lost = (ids["image_ids"] == 870).to(device)
    ids = {key: value.to(device) for key, value in ids.items()}
    expected = visual_focus_score(states, visual & ~lost, completion, impl="triton", **ids)
    ids[name] = torch.where(lost, -1, ids[name])
    assert lost.any()
    assert torch.equal(visual_focus_score(states, visual, completion, impl="triton", **ids), expected)


def test_a_completion_in_padding_scores_zero_unchecked(device, monkeypatch):
    monkeypatch.delenv("VGPO_DEBUG", raising=False)
    states, visual, completion, ids = inputs(1, 40, 8, kind="packed")
    padded = torch.where(completion, -1, ids["seq_ids"])
    arguments = [value.to(device) for value in (states, visual, completion)]
    scores = visual_focus_score(*arguments, seq_ids=padded.to(device), impl="triton")
    assert torch.equal(scores, torch.zeros_like(scores))


def test_runs_are_bit_identical(device):
    states, visual, completion, ids = inputs(2, 70, 72, torch.float16, kind="images")
    first = check("images", device, states, visual, completion, ids)
    assert torch.equal(check("images", device, states, visual, completion, ids), first)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_masks_and_ids(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))

    def grid(values):
        row = st.lists(st.sampled_from(values), min_size=length, max_size=length)
        return torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))

    role = grid([0, 1, 2])  # neither, visual, generated
    ids = {}
    if data.draw(st.booleans()):
        ids["image_ids"] = torch.where(role == 1, grid([0, 5, 2**40]), -1)
    if data.draw(st.booleans()):
        ids["seq_ids"] = torch.where(role > 0, grid([3, 1, 2**50]), -1)
    states = torch.randn(batch, length, 5)
    check("random", device, states, role == 1, role == 2, ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_prototype_a_row_never_waits_for_the_device(monkeypatch):
    monkeypatch.delenv("VGPO_DEBUG", raising=False)
    states, visual, completion, _ = (
        value.cuda() if isinstance(value, torch.Tensor) else value for value in inputs(2, 64, 32)
    )
    visual_focus_score(states, visual, completion)
    torch.cuda.set_sync_debug_mode("error")
    try:
        visual_focus_score(states, visual, completion)
    finally:
        torch.cuda.set_sync_debug_mode("default")
