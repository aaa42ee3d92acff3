"""The tokens of one picture of a row, and what they received laid out on it.

picture = find_picture(model.config, inputs, row=0, image=1, grid=None)
lay_out(values, picture)  # (h, w)
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vgpo_kernels.integrations.transformers.pictures import (
    TILED,
    Picture,
    UnknownPictures,
    checked_ids,
    find_pictures,
    has_one_size,
    image_positions,
    runs_of,
)


def find_picture(config: Any, inputs: Mapping[str, Any], row: int, image: int, grid: tuple[int, int] | None) -> Picture:
    """Returns one picture of a row, with its grid.

    Args:
        config, inputs: as of `image_ids`.
        row: of the batch.
        image: which of its pictures.
        grid: height and width of the picture in tokens; None takes what inputs and family tell.

    Raises:
        IndexError: there is no such picture.
        ValueError: the grid is unknown, or does not fit.
    """
    if grid is not None and not (len(grid) == 2 and all(isinstance(side, int) and side > 0 for side in grid)):
        raise ValueError(f"grid: expected (height, width) of at least 1 token each, got {tuple(grid)}")
    try:
        pictures = find_pictures(config, inputs)[row]
    except UnknownPictures as error:
        if grid is None:
            raise ValueError(f"grid: expected (height, width) of image {image} in tokens, got None: {error}") from error
        pictures = _of_grid(image_positions(config, checked_ids(inputs))[row], grid, config, error)
    if not 0 <= image < len(pictures):
        raise IndexError(f"image: expected one of the sample's {len(pictures)} images, got {image}")
    picture = pictures[image]
    if grid is None:
        if picture.grid is None:
            raise ValueError(
                f"grid: expected (height, width) of the {picture.tokens} tokens of image {image}, got None"
            )
        return picture
    if picture.grid is not None and tuple(grid) == picture.grid[1:]:
        return picture
    if math.prod(grid) != picture.tokens:
        raise ValueError(f"grid: expected height x width of {picture.tokens} tokens, got {tuple(grid)}")
    return picture._replace(grid=(1, *grid), with_row_ends=False)


def lay_out(values: Tensor, picture: Picture) -> Tensor:
    """Returns (h, w): the values of one picture's tokens; frames of a picture that has several are added up.

    Args:
        values: (n,) of a row's image tokens.
        picture: with its grid.
    """
    values = values[picture.first : picture.first + picture.tokens]
    times, height, width = picture.grid  # type: ignore[misc]
    if picture.with_row_ends:
        return values[1:-1].view(height, width + 1)[:, :-1]
    return values.view(times, height, width).sum(0)


def _of_grid(positions: list[int], grid: tuple[int, int], config: Any, reason: Exception) -> list[Picture]:
    """Returns the pictures of a row that all have the given grid, whole or row by row.

    Raises:
        ValueError: they do not all have it, or may be tiles.
    """
    height, width = grid
    size, runs = height * width, runs_of(positions)
    if has_one_size(config) and len(positions) % size == 0:
        return [Picture(first, size) for first in range(0, len(positions), size)]
    found: list[Picture] = []
    used = 0
    while used < len(runs):
        first, tokens = runs[used]
        whole, by_rows = tokens == size, [run[1] for run in runs[used : used + height]] == [width] * height
        if not (whole or by_rows) or (config.model_type in TILED and len(runs) > 1):
            raise ValueError(
                f"grid: expected the height and width of each of the row's pictures, whose {len(positions)} tokens are "
                f"runs of {[run[1] for run in runs]}, got {tuple(grid)}; {reason}; what each token received is in "
                "columns, at visual_positions"
            )
        found.append(Picture(first, size))
        used += 1 if whole else height
    return found
