"""Which tokens make which prototype, if rows hold several images or sequences."""

from typing import NamedTuple

import torch
from torch import Tensor


class Prototypes(NamedTuple):
    """Which tokens make each of P prototypes, ordered by sequence, and which prototypes a token is compared with.

    Args:
        tokens: (n,) int64, the visual tokens by prototype, in each counted through the batch: row * L + position.
        member: (n,) int64, the prototype of each of them.
        bounds: (P + 1,) int64, prototype p is made of tokens[bounds[p] : bounds[p + 1]].
        begin: (B, L) int32, the first prototype of the token's sequence.
        end: (B, L) int32, the one after the last; `begin` if the sequence has none.
    """

    tokens: Tensor
    member: Tensor
    bounds: Tensor
    begin: Tensor
    end: Tensor


def index_prototypes(visual_mask: Tensor, image_ids: Tensor | None, seq_ids: Tensor | None) -> Prototypes:
    """Numbers the prototypes of images and packed sequences; waits for the device, to count them.

    Args:
        visual_mask: (B, L) bool, contiguous like the ids.
        image_ids: (B, L) integers or None for one prototype a sequence.
        seq_ids: (B, L) integers or None for one sequence a row.
    """
    rows = torch.arange(len(visual_mask), device=visual_mask.device)[:, None].expand_as(visual_mask)
    sequence, image = rows.contiguous(), torch.zeros_like(rows)
    used = visual_mask
    if seq_ids is not None:
        sequence = _number(rows, _number(seq_ids))
        used = used & (seq_ids >= 0)
    if image_ids is not None:
        image = _number(image_ids)
        used = used & (image_ids >= 0)
    tokens = used.flatten().nonzero().squeeze(1)
    images = image.max() + 1
    keys, member, sizes = torch.unique(
        (sequence * images + image).flatten()[tokens], return_inverse=True, return_counts=True
    )
    order = member.argsort(stable=True)
    bounds = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    sequences = torch.div(keys, images, rounding_mode="floor")
    begin = torch.searchsorted(sequences, sequence, out_int32=True)
    end = torch.searchsorted(sequences, sequence, out_int32=True, right=True)
    return Prototypes(tokens[order], member[order], bounds, begin, end)


def _number(ids: Tensor, within: Tensor | None = None) -> Tensor:
    """Returns (B, L) int64 numbers from 0 for the distinct ids, or for the distinct pairs of two of them."""
    numbers = torch.unique(ids, return_inverse=True)[1]
    if within is None:
        return numbers
    return torch.unique(numbers * (within.max() + 1) + within, return_inverse=True)[1]
