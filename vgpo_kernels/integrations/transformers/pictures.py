"""Finds the pictures of each row among its visual tokens, and lays what their tokens received out on them.

pictures = find_pictures(model.config, inputs)  # for each row, its pictures in order
image_ids(model.config, inputs, counts=[2, 1])  # (B, L) int64
lay_out(values, pictures[0][1])  # (h, w)

Neighbouring tokens do not tell: pictures may touch (LLaVA), and one picture may be broken into rows (Pixtral) or tiles
(Idefics). What tells is, in this order: the grids or sizes that the model gets with the pictures, marks around each
picture that its configuration names, and what is known of the family.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels._validate import INTEGER, check_tensor
from vgpo_kernels.integrations.transformers.visual_tokens import among, find_visual_tokens

# The model's arguments that describe its pictures, beside the pixels themselves.
DESCRIPTIONS = ("image_grid_thw", "image_sizes")
# Fields of configurations: the tokens before and after each picture.
MARKS = (
    ("vision_start_token_id", "vision_end_token_id"),
    ("image_start_token_id", "image_end_token_id"),
    ("boi_token_id", "eoi_token_id"),
    ("boi_token_index", "eoi_token_index"),
    ("im_start_id", "im_end_id"),
)
# Each picture has as many tokens as any other.
FIXED = (
    "llava",
    "vipllava",
    "paligemma",
    "gemma3",
    "shieldgemma2",
    "gemma3n",
    "janus",
    "chameleon",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "fast_vlm",
    "blip-2",
    "instructblip",
)
FIXED_FIELDS = ("image_seq_length", "mm_tokens_per_image", "vision_soft_tokens_per_image", "num_image_tokens")
# Each picture, tiles and all, is one run of tokens, with other tokens between two of them.
ONE_RUN = ("internvl", "qianfan_ocr", "got_ocr2")
# The same, but for pictures without text between them.
MAY_TOUCH = ("llava_next", "llava_onevision", "granite4_vision")
# A picture may be cut into tiles, whose runs of tokens look like those of pictures.
TILED = ("idefics2", "idefics3", "smolvlm", "granite_docling", "aya_vision", "cohere2_vision", "lfm2_vl")


class Picture(NamedTuple):
    """The tokens of one picture among the image tokens of its row.

    Args:
        first: index of its first token among the image tokens of the row.
        tokens: how many it has.
        grid: times, height and width in tokens, None where only the picture's shape could tell.
        with_row_ends: each row has one more token at its end, and the whole one before and one after (HunYuan).
    """

    first: int
    tokens: int
    grid: tuple[int, int, int] | None = None
    with_row_ends: bool = False


class UnknownPictures(ValueError):
    """The inputs and the family do not tell which visual tokens belong to which picture."""


def image_ids(config: Any, inputs: Mapping[str, Any], counts: Sequence[int] | None = None) -> Tensor:
    """Returns which picture each image token belongs to, as `visual_focus_score` takes it for one prototype an image.

    Args:
        config: of a vision-language model of transformers.
        inputs: its arguments by name: `input_ids` (B, L), and what describes the pictures (`image_grid_thw`,
            `image_sizes`) where the family has it.
        counts: how many pictures each row has, where that is known. One picture needs no other knowledge.

    Returns:
        (B, L) int64: numbers from 0 in each row, -1 outside of pictures.

    Raises:
        ValueError: neither inputs nor family tell pictures apart; they come to other counts; or there are videos.

    Example:
        >>> import torch
        >>> from transformers import LlavaConfig
        >>> config = LlavaConfig(image_token_id=8)  # each of its pictures has as many tokens
        >>> image_ids(config, {"input_ids": torch.tensor([[1, 8, 8, 8, 8, 2]])}, counts=[2])
        tensor([[-1,  0,  0,  1,  1, -1]])
    """
    ids = _checked_ids(inputs)
    visual = find_visual_tokens(config)
    if bool(among(ids, visual.video - visual.image).any()):
        raise ValueError("input_ids: expected pictures alone, got tokens of videos, which are not told apart")
    found = torch.full(ids.shape, -1, dtype=torch.long, device=ids.device)
    known = None if counts is not None and max(counts, default=0) <= 1 else find_pictures(config, inputs, counts)
    for row, positions in enumerate(_positions(config, ids)):
        at = torch.tensor(positions, dtype=torch.long, device=ids.device)
        if known is None or (counts is not None and counts[row] <= 1):
            found[row, at] = 0
            continue
        for number, picture in enumerate(known[row]):
            found[row, at[picture.first : picture.first + picture.tokens]] = number
    return found


def described(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what describes the pictures among a model's arguments, of the pixels the shape alone."""
    found = {name: arguments[name] for name in DESCRIPTIONS if arguments.get(name) is not None}
    pixels = arguments.get("pixel_values")
    return found | ({"pixel_values": torch.empty_like(pixels, device="meta")} if isinstance(pixels, Tensor) else {})


def check_separable(config: Any, inputs: Mapping[str, Any]) -> None:
    """Checks that the pictures of a family's prompts can be told apart, as `image_ids` does.

    Args:
        config, inputs: as of `image_ids`, with any picture.

    Raises:
        ValueError: they cannot, with the reason.
    """
    by_inputs = inputs.get("image_grid_thw") is not None or _row_sizes(config, inputs) is not None
    by_family = _has_one_size(config) or config.model_type in (*ONE_RUN, *MAY_TOUCH)
    if not (by_inputs or _marks(config) or by_family):
        raise UnknownPictures(_unknown(config))


def find_pictures(config: Any, inputs: Mapping[str, Any], counts: Sequence[int] | None = None) -> list[list[Picture]]:
    """Returns the pictures of each row, in order; see `image_ids`.

    Raises:
        UnknownPictures: with the reason.
    """
    ids = _checked_ids(inputs)
    rows = _positions(config, ids)
    grids, sizes = inputs.get("image_grid_thw"), _row_sizes(config, inputs)
    marks = _marks(config)
    if isinstance(grids, Tensor):
        found = _of_grids(grids.tolist(), rows, config)
    elif sizes is not None:
        found = _dealt([Picture(0, h * w, (1, h, w)) for h, w in sizes], rows, "image_sizes")
    elif _has_one_size(config):
        size = _common_size(config, sum(map(len, rows)), inputs.get("pixel_values"))
        found = [_of_one_size(len(row), counts[i] if counts else None, size, config) for i, row in enumerate(rows)]
    elif marks is not None:
        found = [_between_marks(ids[i], row, marks, config) for i, row in enumerate(rows)]
    elif config.model_type in (*ONE_RUN, *MAY_TOUCH):
        found = [_one_run_each(row, config) for row in rows]
    else:
        raise UnknownPictures(_unknown(config))
    for row, pictures in enumerate(found):
        if counts is not None and len(pictures) != counts[row]:
            raise UnknownPictures(
                f"input_ids: expected the tokens of {counts[row]} pictures in row {row}, got what {config.model_type} "
                f"takes for {len(pictures)}; put text between pictures"
            )
    return found


def find_picture(config: Any, inputs: Mapping[str, Any], row: int, image: int, grid: tuple[int, int] | None) -> Picture:
    """Returns one picture of a row, with its grid.

    Args:
        config, inputs: as of `image_ids`.
        row: of the batch.
        image: which of its pictures.
        grid: height and width of the picture in tokens; None takes what inputs and family say.

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
        pictures = _of_grid(_positions(config, _checked_ids(inputs))[row], grid, config, error)
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


def _checked_ids(inputs: Mapping[str, Any]) -> Tensor:
    ids = inputs.get("input_ids")
    check_tensor("input_ids", ids, shape=("B", "L"), dtypes=INTEGER)
    return ids  # type: ignore[return-value]


def _positions(config: Any, ids: Tensor) -> list[list[int]]:
    """Returns where each row's image tokens are."""
    return [torch.nonzero(row).squeeze(1).tolist() for row in among(ids, find_visual_tokens(config).image)]


def _unknown(config: Any) -> str:
    return (
        f"where a picture of {type(config).__name__} ends is said neither by the model's inputs "
        f"({', '.join(DESCRIPTIONS)}) nor by marks that its configuration names"
    )


def _of_grids(grids: list[list[int]], rows: list[list[int]], config: Any) -> list[list[Picture]]:
    """Returns pictures of so many patches (time, height, width), of which m x m make a token."""
    name = "image_grid_thw"
    tokens, patches = sum(map(len, rows)), sum(map(math.prod, grids))
    if config.model_type == "hunyuan_vl":
        merge = config.vision_config.spatial_merge_size
        merged = [(t, h // merge, w // merge) for t, h, w in grids]
        return _dealt([Picture(0, h * (w + 1) + 2, (t, h, w), with_row_ends=True) for t, h, w in merged], rows, name)
    merge = max(1, math.isqrt(patches // max(1, tokens)))
    if patches == tokens * merge**2 and all(h % merge == w % merge == 0 for _, h, w in grids):
        merged = [(t, h // merge, w // merge) for t, h, w in grids]
        return _dealt([Picture(0, math.prod(grid), grid) for grid in merged], rows, name)
    raise UnknownPictures(f"{name}: expected grids that come to the {tokens} image tokens, got {grids}")


def _dealt(pictures: list[Picture], rows: list[list[int]], name: str) -> list[list[Picture]]:
    """Returns the pictures of a batch dealt out to its rows."""
    found, taken = [], 0
    for row, positions in enumerate(rows):
        own: list[Picture] = []
        used = 0
        while used < len(positions) and taken < len(pictures):
            own.append(pictures[taken]._replace(first=used))
            used += pictures[taken].tokens
            taken += 1
        if used != len(positions):
            raise UnknownPictures(f"{name}: expected grids of {len(positions)} tokens in row {row}, got {used}")
        found.append(own)
    return found


def _row_sizes(config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    """Returns heights and widths in tokens where a Pixtral tower reads the pictures, whose rows are broken."""
    sizes, vision = inputs.get("image_sizes"), getattr(config, "vision_config", None)
    if sizes is None or getattr(vision, "model_type", None) != "pixtral":
        return None
    side = vision.patch_size * (getattr(config, "spatial_merge_size", None) or 1)  # type: ignore[union-attr]
    return [(int(height) // side, int(width) // side) for height, width in torch.as_tensor(sizes).tolist()]


def _marks(config: Any) -> tuple[int, int] | None:
    """Returns the tokens before and after each picture, where the configuration names them."""
    # Molmo marks the small and the large version of a picture.
    if getattr(config, "low_res_image_start_token_id", None) is not None:
        return None
    pairs = ((getattr(config, first, None), getattr(config, last, None)) for first, last in MARKS)
    return next(((a, b) for a, b in pairs if isinstance(a, int) and isinstance(b, int)), None)


def _between_marks(ids: Tensor, positions: list[int], marks: tuple[int, int], config: Any) -> list[Picture]:
    begins = (ids == marks[0]).cumsum(0)[positions].tolist() if positions else []
    ends = (ids == marks[1]).cumsum(0)[positions].tolist() if positions else []
    if any(begun != ended + 1 for begun, ended in zip(begins, ends, strict=True)):
        raise UnknownPictures(
            f"input_ids: expected the marks of {config.model_type}, {marks[0]} and {marks[1]}, around each picture"
        )
    return [Picture(begins.index(mark), begins.count(mark)) for mark in sorted(set(begins))]


def _has_one_size(config: Any) -> bool:
    vision = getattr(config, "vision_config", None)
    return config.model_type in FIXED and getattr(vision, "model_type", None) != "pixtral"


def _common_size(config: Any, tokens: int, pixels: Any) -> int | None:
    """Returns how many tokens each picture of a batch has: as its pictures are counted, or its configuration says."""
    if isinstance(pixels, Tensor) and pixels.dim() == 4 and pixels.shape[0] and tokens % pixels.shape[0] == 0:
        return tokens // pixels.shape[0] or None
    return _fixed_number(config)


def _of_one_size(total: int, count: int | None, size: int | None, config: Any) -> list[Picture]:
    """Returns pictures that all have the number of tokens that the family fixes."""
    if count and total % count == 0:
        size = total // count
    if size is None or total % size:
        raise UnknownPictures(
            f"input_ids: expected pictures of as many tokens as the configuration of {config.model_type} fixes "
            f"({size or 'it names no number that fits its vision tower'}), got {total} tokens in a row"
        )
    side, patches = math.isqrt(size), _patches_a_side(config)
    is_map = side * side == size and (patches is None or patches % side == 0)
    grid = (1, side, side) if is_map and not hasattr(config, "num_query_tokens") else None
    return [Picture(first, size, grid) for first in range(0, total, size)]


def _fixed_number(config: Any) -> int | None:
    """Returns the number of tokens that each picture has, where the configuration names one that fits its tower."""
    parts = (config, getattr(config, "vision_config", None), getattr(config, "text_config", None))
    values = [getattr(part, field, None) for field in (*FIXED_FIELDS, "num_query_tokens") for part in parts]
    number, patches = next((value for value in values if isinstance(value, int)), None), _patches_a_side(config)
    if number is None:
        return None if patches is None else patches**2
    if hasattr(config, "num_query_tokens"):
        return number
    side = math.isqrt(number)
    # A tower with a token for the whole picture may hand that on, too.
    one_more = patches is not None and number == patches**2 + 1
    return number if patches is None or one_more or (side * side == number and patches % side == 0) else None


def _patches_a_side(config: Any) -> int | None:
    """Returns how many patches a side the vision tower cuts a picture into, where it takes one size alone."""
    vision = getattr(config, "vision_config", None)
    sizes = [getattr(vision, name, None) for name in ("image_size", "patch_size")]
    image, patch = (size[0] if isinstance(size, list | tuple) and size else size for size in sizes)
    return image // patch if isinstance(image, int) and isinstance(patch, int) and patch else None


def _one_run_each(positions: list[int], config: Any) -> list[Picture]:
    tile = _fixed_number(config) if config.model_type in ONE_RUN else None
    side = math.isqrt(tile or 0)
    return [Picture(first, tokens, (1, side, side) if tokens == tile else None) for first, tokens in _runs(positions)]


def _runs(positions: list[int]) -> list[tuple[int, int]]:
    """Returns index and length of each run of neighbouring positions."""
    runs: list[tuple[int, int]] = []
    for index, position in enumerate(positions):
        if runs and position == positions[index - 1] + 1:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


def _of_grid(positions: list[int], grid: tuple[int, int], config: Any, reason: Exception) -> list[Picture]:
    """Returns the pictures of a row that all have the grid asked for, whole or row by row.

    Raises:
        ValueError: they do not all have it, or may be tiles.
    """
    height, width = grid
    size, runs = height * width, _runs(positions)
    if _has_one_size(config) and len(positions) % size == 0:
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
