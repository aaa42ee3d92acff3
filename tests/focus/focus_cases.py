"""Inputs of the focus tests, and the formula written down a second time."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

KINDS = ("plain", "images", "packed", "packed images")


def inputs(
    batch: int, length: int, size: int, dtype: torch.dtype = torch.float32, *, kind: str = "plain"
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Returns states, visual mask, completion mask and ids, ragged: row b is cut b tokens away from row 0.

    Each sequence is text, two images, completion, padding. The last row has no image; packed rows hold two
    sequences, of which the first in the last row has no image.
    """
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(batch, length, size, generator=generator) + 0.5
    visual = torch.zeros(batch, length, dtype=torch.bool)
    completion = torch.zeros_like(visual)
    images = torch.full((batch, length), -1)
    sequences = torch.full((batch, length), -1)
    parts = 2 if kind.startswith("packed") else 1
    for row in range(batch):
        for part in range(parts):
            begin, span = part * (length // parts), length // parts
            sequences[row, begin : begin + span - row] = 40 - 7 * part
            if row < batch - 1 or part == 1:
                # Two images with a gap of text between them, numbered in falling order.
                for image, (low, high) in enumerate(((0.1, 0.25), (0.3, 0.45))):
                    place = slice(begin + int(low * span) + row, begin + int(high * span))
                    visual[row, place] = True
                    images[row, place] = 900 - 30 * image
            completion[row, begin + span // 2 + row : begin + span - 2 * row] = True
    ids = {}
    if "images" in kind:
        ids["image_ids"] = images
    if "packed" in kind:
        ids["seq_ids"] = sequences
    return states.to(dtype), visual, completion, ids


def transcription(
    states: Tensor,
    visual: Tensor,
    completion: Tensor,
    image_ids: Tensor | None = None,
    seq_ids: Tensor | None = None,
) -> Tensor:
    """Returns the (B, L) float64 scores, token by token: the largest cosine to a mean of visual states."""
    states = states.double()
    scores = torch.zeros(visual.shape, dtype=torch.float64)
    for row, position in completion.nonzero().tolist():
        seen = visual[row].clone()
        if seq_ids is not None:
            seen &= seq_ids[row] == seq_ids[row, position]
        images = torch.zeros_like(seen) if image_ids is None else image_ids[row]
        cosines = [
            cosine_similarity(states[row, position], states[row, seen & (images == image)].mean(0), dim=0)
            for image in set(images[seen].tolist())
        ]
        if cosines:
            scores[row, position] = max(cosines)
    return scores
