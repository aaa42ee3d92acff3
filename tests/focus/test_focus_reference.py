"""The reference against the formula written down a second time, and its memory."""

import pytest
import torch
from focus_cases import KINDS, inputs, transcription
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vgpo_kernels.focus import reference, visual_focus_score


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "length", "size"),
    [
        (3, 61, 7),  # nothing is a power of two
        (2, 40, 1),  # one column: every cosine is -1 or 1
        (4, 90, 33),
    ],
)
def test_reference_is_the_formula(kind, batch, length, size):
    states, visual, completion, ids = inputs(batch, length, size, torch.float64, kind=kind)
    scores = visual_focus_score(states, visual, completion, impl="reference", **ids)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, transcription(states, visual, completion, **ids), atol=1e-13, rtol=0)


def test_two_images_score_differently_from_one():
    states, visual, completion, ids = inputs(2, 64, 8, kind="images")
    together = visual_focus_score(states, visual, completion)
    assert (visual_focus_score(states, visual, completion, **ids) - together).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["plain", "packed images"])
@pytest.mark.parametrize("block", [1, 7])
def test_blocks_do_not_change_the_scores(monkeypatch, kind, block):
    states, visual, completion, ids = inputs(2, 64, 9, torch.float64, kind=kind)
    whole = visual_focus_score(states, visual, completion, **ids)
    monkeypatch.setattr(reference, "BLOCK", block)
    blocked = visual_focus_score(states, visual, completion, **ids)
    torch.testing.assert_close(blocked, whole, atol=1e-14, rtol=0)


def test_reference_promotes_a_block_of_states_at_once(monkeypatch):
    class LargestFloat(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.dtype == torch.float32]
            self.numel = max([self.numel, *made])
            return out

    states, visual, completion, _ = inputs(2, 200, 16, torch.bfloat16)
    monkeypatch.setattr(reference, "BLOCK", 8)
    with LargestFloat() as largest:
        reference.visual_focus_score(states, visual, completion, None, None)
    # The scores themselves are the largest, at (2, 200); a block of states is 8 x 16.
    assert 0 < largest.numel <= 2 * 200
