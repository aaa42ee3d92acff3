"""Processed prompts by row, which can be joined as their processor joins a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_train.data.samples import Sample


class Join(NamedTuple):
    """How the parts of an input that does not run along the tokens become one."""

    dim: int = 0  # along which parts are put one after the other
    fill: int = 0  # pads the end of the other dimensions if parts differ
    per_row: bool = False  # a part is a row of the batch: a prompt without a picture has one, too, of zeros


@dataclass
class PromptBatch:
    """Processed prompts, kept apart by row so that any rows can be taken, repeated and joined again.

    Args:
        samples: what each row was made from.
        rows: processed inputs of each row, batch dimension of 1 kept, without padding.
        pad_values: what fills the left of a row, by the name of an input that runs along the tokens.
        joins: how the other inputs are joined, by name; those not named are put one after the other along dimension 0.
    """

    samples: list[Sample]
    rows: list[dict[str, Tensor]]
    pad_values: Mapping[str, int]
    joins: Mapping[str, Join] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images_per_row(self) -> list[int]:
        """Number of pictures of each row."""
        return [len(sample.images) for sample in self.samples]

    @property
    def prompt_lengths(self) -> list[int]:
        """Number of tokens of each row, padding left out."""
        return [row["input_ids"].shape[1] for row in self.rows]

    def __add__(self, other: PromptBatch) -> PromptBatch:
        return PromptBatch(self.samples + other.samples, self.rows + other.rows, self.pad_values, self.joins)

    def take(self, indices: Sequence[int]) -> PromptBatch:
        """Return the rows at `indices`, in their order, repeated if an index repeats."""
        samples, rows = [self.samples[i] for i in indices], [self.rows[i] for i in indices]
        return PromptBatch(samples, rows, self.pad_values, self.joins)

    def repeat(self, times: int) -> PromptBatch:
        """Return each row `times` times, copies side by side."""
        return self.take([i for i in range(len(self)) for _ in range(times)])

    def with_picture(self, dummy: PromptBatch) -> PromptBatch:
        """Return the rows, followed by the dummy, a prompt with a picture, if none of them has one.

        Under ZeRO-3 every rank must run the vision tower, forward and backward, or the others hang in its collectives.
        """
        return self if any(self.images_per_row) else self + dummy

    def tensors(self, *, length: int | None = None, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Join the rows into the arguments of a model's forward, as the processor joins a batch padded on the left.

        Args:
            length: tokens that each row is padded to, on the left; None takes the longest row.
            device: of the tensors; None leaves them on the CPU.

        Returns:
            Inputs along the tokens as (B, length); vision inputs joined over the pictures of all rows, those of unlike
            pictures padded at the end of each dimension in which they differ.

        Raises:
            ValueError: a row is longer than `length`.
        """
        lengths = self.prompt_lengths
        length = max(lengths) if length is None else length
        if max(lengths) > length:
            raise ValueError(f"length {length} is shorter than the longest prompt, {max(lengths)} tokens")
        joined = {}
        for name in dict.fromkeys(name for row in self.rows for name in row):
            parts = [row.get(name) for row in self.rows]
            if name in self.pad_values:
                whole = _join_tokens(parts, lengths, length, self.pad_values[name])
            else:
                whole = join(parts, self.joins.get(name, Join()))
            joined[name] = whole.to(device)
        return joined


def learn_joins(
    rows: Sequence[Mapping[str, Tensor]], batch: Mapping[str, Tensor]
) -> tuple[dict[str, int], dict[str, Join]]:
    """Read off how a processor joins its inputs, from prompts that it processed one by one and together.

    Args:
        rows: inputs of two prompts of unlike lengths, the first with one picture, the second with two unlike ones.
        batch: inputs of both, padded on the left.

    Returns:
        `pad_values` and `joins` of a `PromptBatch` whose `tensors` are those of `batch`.

    Raises:
        ValueError: an input that neither padding nor concatenation gives; names it with its shapes.
    """
    pad_values: dict[str, int] = {}
    joins: dict[str, Join] = {}
    lengths = [row["input_ids"].shape[1] for row in rows]
    for name, whole in batch.items():
        parts = [row.get(name) for row in rows]
        if not isinstance(whole, Tensor):
            raise ValueError(f"{name} is a {type(whole).__name__}, expected a tensor")
        if [part is not None and part.shape[:2] == (1, n) for part, n in zip(parts, lengths, strict=True)] == [
            True,
            True,
        ]:
            pad_values[name] = int(whole[lengths.index(min(lengths)), 0].reshape(-1)[0])
            found = _join_tokens(parts, lengths, max(lengths), pad_values[name])
        else:
            joins[name] = _learn_join(parts, whole)
            found = _try_join(parts, joins[name])
        if not _equal(found, whole):
            shapes = " and ".join("nothing" if part is None else str(tuple(part.shape)) for part in parts)
            raise ValueError(f"{name} of {shapes} is {tuple(whole.shape)} in a batch, which no padding gives")
    return pad_values, joins


def join(parts: Sequence[Tensor | None], way: Join) -> Tensor:
    """Return the parts of an input as one; None stands for a prompt that has none."""
    given = [part for part in parts if part is not None]
    sizes = [max(part.shape[dim] for part in given) for dim in range(given[0].dim())]

    def filled(part: Tensor) -> Tensor:
        missing = [0 if dim == way.dim else size - part.shape[dim] for dim, size in enumerate(sizes)]
        return torch.nn.functional.pad(part, [n for size in reversed(missing) for n in (0, size)], value=way.fill)

    if way.per_row:
        given = [given[0].new_zeros(1, *sizes[1:]) if part is None else part for part in parts]
    return torch.cat([filled(part) for part in given], dim=way.dim)


def _join_tokens(parts: Sequence[Tensor | None], lengths: Sequence[int], length: int, value: int) -> Tensor:
    given = next(part for part in parts if part is not None)

    def padded(part: Tensor | None, own: int) -> Tensor:
        part = given.new_full((1, own, *given.shape[2:]), value) if part is None else part
        sides = [0, 0] * (part.dim() - 2) + [length - part.shape[1], 0]
        return torch.nn.functional.pad(part, sides, value=value)

    return join([padded(*pair) for pair in zip(parts, lengths, strict=True)], Join())


def _learn_join(parts: Sequence[Tensor | None], whole: Tensor) -> Join:
    """Return the first way in which the parts give the whole, or the first of all if none does."""
    last = parts[-1]
    # Two pictures in one row of several dimensions; a flat input counts or measures them.
    per_row = last is not None and last.dim() > 1 and last.shape[0] == 1
    ways = [Join(dim, fill, per_row=dim == 0 and per_row) for dim in range(whole.dim()) for fill in (0, 1)]
    return next((way for way in ways if _equal(_try_join(parts, way), whole)), Join())


def _try_join(parts: Sequence[Tensor | None], way: Join) -> Tensor | None:
    ranks = {part.dim() for part in parts if part is not None}
    return join(parts, way) if len(ranks) == 1 and ranks != {0} else None


def _equal(found: Tensor | None, whole: Tensor) -> bool:
    if found is None or found.shape != whole.shape:
        return False
    return torch.allclose(found.double(), whole.double(), atol=1e-4, equal_nan=True)
