"""The focus score in plain torch: the specification, streamed over blocks of tokens."""

import torch
from torch import Tensor

BLOCK = 512  # tokens whose states are promoted at once


def visual_focus_score(
    hidden_states: Tensor,
    visual_mask: Tensor,
    completion_mask: Tensor,
    image_ids: Tensor | None,
    seq_ids: Tensor | None,
) -> Tensor:
    """Returns the (B, L) largest cosine of each completion token's state to its sequence's prototypes.

    Args:
        hidden_states: (B, L, D) floating.
        visual_mask: (B, L) bool.
        completion_mask: (B, L) bool.
        image_ids: (B, L) integers or None for one prototype a sequence.
        seq_ids: (B, L) integers or None for one sequence a row.
    """
    focus = hidden_states.new_zeros(hidden_states.shape[:2], dtype=_accumulator(hidden_states.dtype))
    for row, states in enumerate(hidden_states):
        visual, completion = visual_mask[row], completion_mask[row]
        for sequence in _sequences(visual, None if seq_ids is None else seq_ids[row]):
            images = _images(visual & sequence, None if image_ids is None else image_ids[row])
            prototypes = [_mean_state(states, image.nonzero().squeeze(1), focus.dtype) for image in images]
            for tokens in (completion & sequence).nonzero().squeeze(1).split(BLOCK):
                focus[row, tokens] = _largest_cosine(states[tokens].to(focus.dtype), prototypes)
    return focus


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sequences(visual: Tensor, seq_ids: Tensor | None) -> list[Tensor]:
    """Returns an (L,) mask of the tokens of each sequence that has a visual token."""
    if not visual.any():
        return []
    if seq_ids is None:
        return [torch.ones_like(visual)]
    return [seq_ids == sequence for sequence in seq_ids[visual & (seq_ids >= 0)].unique()]


def _images(visual: Tensor, image_ids: Tensor | None) -> list[Tensor]:
    """Returns an (L,) mask of the tokens of each image among the visual tokens."""
    if image_ids is None:
        return [visual]
    return [visual & (image_ids == image) for image in image_ids[visual & (image_ids >= 0)].unique()]


def _mean_state(states: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the (D,) mean over `tokens` (n,) of the states (L, D)."""
    total = states.new_zeros(states.shape[1], dtype=dtype)
    for block in tokens.split(BLOCK):
        total += states[block].sum(0, dtype=dtype)
    return total / len(tokens)


def _largest_cosine(states: Tensor, prototypes: list[Tensor]) -> Tensor:
    """Returns the (n,) largest cosine of the states (n, D) to the prototypes, each (D,)."""
    largest = states.new_full(states.shape[:1], -1.0)
    for prototype in prototypes:
        largest = torch.maximum(largest, _cosine(states, prototype))
    return largest


def _cosine(states: Tensor, prototype: Tensor) -> Tensor:
    """Returns the (n,) cosines of the states (n, D) to a prototype (D,), 0 where either is zero."""
    # A product and a sum, as a matrix product may be rounded to TF32 or, under autocast, to bf16.
    inner = (states * prototype).sum(1)
    norms = states.norm(dim=1) * prototype.norm()
    cosine = torch.where(norms == 0, 0.0, inner / norms)
    return cosine.clamp(-1, 1)
