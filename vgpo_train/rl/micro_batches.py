"""Micro-batches: rows of prompts and completions, trimmed to what they hold, never without a picture."""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from vgpo_train.data import PromptBatch, PromptCollator, Sample
from vgpo_train.rl.rollout import Completions

_COMPANION_PIXELS = 56  # enough for one token of every patch size in use


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward: `rows` of a rank's experience, then perhaps the companion."""

    prompts: PromptBatch
    completions: Completions  # trimmed to the longest; the companion's tokens are masked
    rows: list[int]

    def take(self, values: Tensor | None) -> Tensor | None:
        """Returns the rows of (B,) or (B, T) values, trimmed like the completions; 0 for the companion."""
        if values is None:
            return None
        taken = values[self.rows]
        if taken.dim() == 2:
            taken = taken[:, : self.completions.ids.shape[1]]
        missing = self.completions.ids.shape[0] - len(self.rows)
        return torch.cat([taken, taken.new_zeros(missing, *taken.shape[1:])])


def build_companion(collator: PromptCollator) -> PromptBatch:
    """Returns a prompt with a blank picture, for micro-batches that hold none.

    Under ZeRO-3 every rank must run the vision tower, forward and backward, or the others wait for ever.
    """
    picture = io.BytesIO()
    Image.new("RGB", (_COMPANION_PIXELS, _COMPANION_PIXELS)).save(picture, format="PNG")
    return collator([Sample(id="companion", problem="", answer="", images=(picture.getvalue(),))])


def with_picture(prompts: PromptBatch, companion: PromptBatch) -> PromptBatch:
    """Returns the prompts, followed by the companion where none of them has a picture."""
    if any(prompts.images_per_row):
        return prompts
    return prompts + companion


def micro_batches(
    prompts: PromptBatch,
    completions: Completions,
    rows: list[int],
    companion: PromptBatch,
    *,
    size: int,
    count: int | None = None,
) -> Iterator[MicroBatch]:
    """Cuts `rows` into micro-batches of at most `size`.

    Args:
        prompts: a rank's B prompts.
        completions: their completions.
        rows: which of them.
        companion: joins micro-batches without a picture.
        size: most rows in one.
        count: how many to yield; those beyond the last row hold the companion alone. None: as many as `rows` need.
    """
    for index in range(-(-len(rows) // size) if count is None else count):
        yield _build(prompts, completions, rows[index * size : (index + 1) * size], companion)


def _build(prompts: PromptBatch, completions: Completions, rows: list[int], companion: PromptBatch) -> MicroBatch:
    length = max(1, int(completions.mask[rows].sum(1).max())) if rows else 1
    ids, mask = completions.ids[rows, :length], completions.mask[rows, :length]
    chosen = with_picture(prompts.take(rows), companion)
    missing = len(chosen) - len(rows)
    ids = torch.cat([ids, ids.new_zeros(missing, length)])
    mask = torch.cat([mask, mask.new_zeros(missing, length)])
    return MicroBatch(chosen, Completions(ids, mask), rows)
