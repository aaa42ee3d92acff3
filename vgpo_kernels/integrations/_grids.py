"""Lays what each visual token received out on the grid of its picture.

spans = image_spans(positions_by_row(is_image), sample, image_grid_thw, model.config)
lay_out(values, spans, image=0, grid=None, config=model.config)  # (h, w)
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """The tokens of one picture among the image tokens of its row, and its grid where that is known."""

    first: int
    tokens: int
    grid: tuple[int, int, int] | None


def image_spans(rows: list[list[int]], sample: int, patches: Tensor | None, config: Any) -> list[Span]:
    """Returns the pictures of a sample, in order.

    Args:
        rows: positions of each row's image tokens.
        sample: the row that is asked for.
        patches: (images, 3), the pictures of all rows in order, in patches of time, height and width.
        config: of the model, for how many patches make a token.

    Raises:
        ValueError: the grids do not add up to the tokens.
    """
    if patches is None:
        return _runs(rows[sample])
    merge = _merge(config) or 1
    grids = [(t, h // merge, w // merge) for t, h, w in patches.tolist()]
    taken = 0
    for row, positions in enumerate(rows):
        spans, used = [], 0
        while used < len(positions) and taken < len(grids):
            span = Span(used, math.prod(grids[taken]), grids[taken])
            spans.append(span)
            used += span.tokens
            taken += 1
        if used != len(positions):
            raise ValueError(f"image_grid_thw: expected grids of {len(positions)} tokens in row {row}, got {used}")
        if row == sample:
            return spans
    return []


def repeat_rows(patches: Tensor, rows: list[list[int]], samples: int, config: Any) -> Tensor:
    """Returns the grids of a batch whose rows are each repeated, those of a row one after the other.

    Args:
        patches: (images, 3), the pictures of all rows in order.
        rows: positions of each row's image tokens.
        samples: how often each row is repeated.
        config: of the model.
    """
    counts = [len(image_spans(rows, sample, patches, config)) for sample in range(len(rows))]
    return torch.cat([own.repeat(samples, 1) for own in patches.split(counts)])


def lay_out(values: Tensor, spans: list[Span], image: int, grid: tuple[int, int] | None, config: Any) -> Tensor:
    """Returns (h, w): the values of one picture's tokens; frames of a picture that has several are added up.

    Args:
        values: (n,) of a row's image tokens.
        spans: its pictures.
        image: which of them.
        grid: its height and width in tokens, where the model does not say.
        config: of the model, for how many tokens one tile makes.

    Raises:
        IndexError: there is no such picture.
        ValueError: the grid is unknown, or does not fit.
    """
    if not 0 <= image < len(spans):
        raise IndexError(f"image: expected one of the sample's {len(spans)} images, got {image}")
    span = spans[image]
    values = values[span.first : span.first + span.tokens]
    if grid is not None:
        if math.prod(grid) != span.tokens:
            raise ValueError(f"grid: expected height x width of {span.tokens} tokens, got {tuple(grid)}")
        return values.view(*grid)
    if span.grid is not None:
        return values.view(span.grid).sum(0)
    side = math.isqrt(span.tokens)
    tile = next((n for n in (_field(config, "image_seq_length"), _field(config, "mm_tokens_per_image")) if n), None)
    # Several tiles one after the other may make a square number, too, and so may a picture of any shape.
    any_shape = _merge(config) is not None or (tile is not None and span.tokens > tile)
    if side * side != span.tokens or any_shape:
        raise ValueError(f"grid: expected (height, width) of the {span.tokens} tokens of image {image}, got None")
    return values.view(side, side)


def positions_by_row(visual: Tensor) -> list[list[int]]:
    """Returns where each row of (B, T) bool is True."""
    return [torch.nonzero(row).squeeze(1).tolist() for row in visual]


def _runs(positions: list[int]) -> list[Span]:
    """Returns runs of neighbouring positions, each one picture."""
    spans: list[Span] = []
    for index, position in enumerate(positions):
        if spans and position == positions[index - 1] + 1:
            spans[-1] = spans[-1]._replace(tokens=spans[-1].tokens + 1)
        else:
            spans.append(Span(index, 1, None))
    return spans


def _merge(config: Any) -> int | None:
    """Returns how many patches a side become one token, in families whose pictures keep their shape."""
    return _field(getattr(config, "vision_config", None), "spatial_merge_size")


def _field(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None
