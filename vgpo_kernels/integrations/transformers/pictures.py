"""The pictures of each row among its visual tokens.

find_pictures(model.config, inputs)  # for each row, its pictures in order
image_ids(model.config, inputs, counts=[2, 1])  # (B, L) int64

Neighbouring tokens do not tell pictures apart: two pictures may touch (LLaVA), and one may be broken into rows
(Pixtral) or tiles (Idefics). `_source` lists what does.
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
# The same, except that pictures without text between them are one run.
MAY_TOUCH = ("llava_next", "llava_onevision", "granite4_vision")
# A picture may be cut into tiles, whose runs of tokens look like those of pictures.
TILED = ("idefics2", "idefics3", "smolvlm", "granite_docling", "aya_vision", "cohere2_vision", "lfm2_vl")


class Picture(NamedTuple):
    """The tokens of one picture among the image tokens of its row.

    Args:
        first: index of its first token among the image tokens of the row.
        tokens: how many it has.
        grid: times, height and width in tokens, None if only the picture's shape could tell.
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
            `image_sizes`) if the family has it.
        counts: how many pictures each row has, if that is known. One picture needs no other knowledge.

    Returns:
        (B, L) int64: numbers from 0 in each row, -1 outside of pictures.

    Raises:
        ValueError: pictures cannot be told apart, or are not as many as `counts` says, or there are videos.

    Example:
        >>> import torch
        >>> from transformers import LlavaConfig
        >>> config = LlavaConfig(image_token_id=8)  # each of its pictures has as many tokens
        >>> image_ids(config, {"input_ids": torch.tensor([[1, 8, 8, 8, 8, 2]])}, counts=[2])
        tensor([[-1,  0,  0,  1,  1, -1]])
    """
    ids = checked_ids(inputs)
    visual = find_visual_tokens(config)
    if bool(among(ids, visual.video - visual.image).any()):
        raise ValueError("input_ids: expected pictures alone, got tokens of videos, which are not told apart")
    found = torch.full(ids.shape, -1, dtype=torch.long, device=ids.device)
    known = None if counts is not None and max(counts, default=0) <= 1 else find_pictures(config, inputs, counts)
    for row, positions in enumerate(image_positions(config, ids)):
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
    _source(config, inputs)


def find_pictures(config: Any, inputs: Mapping[str, Any], counts: Sequence[int] | None = None) -> list[list[Picture]]:
    """Returns the pictures of each row, in order; see `image_ids`.

    Raises:
        UnknownPictures: with the reason.
    """
    ids = checked_ids(inputs)
    rows = image_positions(config, ids)
    source = _source(config, inputs)
    if source == "grids":
        found = _of_grids(torch.as_tensor(inputs["image_grid_thw"]).tolist(), rows, config)
    elif source == "sizes":
        found = _dealt([Picture(0, h * w, (1, h, w)) for h, w in _row_sizes(config, inputs)], rows, "image_sizes")
    elif source == "one size":
        size = _common_size(config, sum(map(len, rows)), inputs.get("pixel_values"))
        found = [_of_one_size(len(row), counts[i] if counts else None, size, config) for i, row in enumerate(rows)]
    elif source == "marks":
        found = [_between_marks(ids[i], row, _marks(config), config) for i, row in enumerate(rows)]
    else:
        found = [_one_run_each(row, config) for row in rows]
    for row, pictures in enumerate(found):
        if counts is not None and len(pictures) != counts[row]:
            raise UnknownPictures(
                f"input_ids: expected the tokens of {counts[row]} pictures in row {row}, got what {config.model_type} "
                f"takes for {len(pictures)}; put text between pictures"
            )
    return found


def checked_ids(inputs: Mapping[str, Any]) -> Tensor:
    """Returns the input_ids of a model's arguments."""
    ids = inputs.get("input_ids")
    check_tensor("input_ids", ids, shape=("B", "L"), dtypes=INTEGER)
    return ids  # type: ignore[return-value]


def image_positions(config: Any, ids: Tensor) -> list[list[int]]:
    """Returns where each row's image tokens are."""
    return [torch.nonzero(row).squeeze(1).tolist() for row in among(ids, find_visual_tokens(config).image)]


def _source(config: Any, inputs: Mapping[str, Any]) -> str:
    """Returns what tells the pictures apart, the first that applies.

    Raises:
        UnknownPictures: nothing does.
    """
    if inputs.get("image_grid_thw") is not None:
        return "grids"
    if inputs.get("image_sizes") is not None and _has_pixtral_tower(config):
        return "sizes"
    if has_one_size(config):
        return "one size"
    if _marks(config) is not None:
        return "marks"
    if config.model_type in (*ONE_RUN, *MAY_TOUCH):
        return "runs"
    raise UnknownPictures(
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


def _has_pixtral_tower(config: Any) -> bool:
    return getattr(getattr(config, "vision_config", None), "model_type", None) == "pixtral"


def _row_sizes(config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Returns heights and widths in tokens of the pictures of a Pixtral tower, whose rows are broken."""
    side = config.vision_config.patch_size * (getattr(config, "spatial_merge_size", None) or 1)
    sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
    return [(int(height) // side, int(width) // side) for height, width in sizes]


def _marks(config: Any) -> tuple[int, int] | None:
    """Returns the tokens before and after each picture, None if the configuration does not name them."""
    # Molmo marks the small and the large version of a picture.
    if getattr(config, "low_res_image_start_token_id", None) is not None:
        return None
    pairs = ((getattr(config, first, None), getattr(config, last, None)) for first, last in MARKS)
    return next(((a, b) for a, b in pairs if isinstance(a, int) and isinstance(b, int)), None)


def _between_marks(ids: Tensor, positions: list[int], marks: Any, config: Any) -> list[Picture]:
    begins = (ids == marks[0]).cumsum(0)[positions].tolist() if positions else []
    ends = (ids == marks[1]).cumsum(0)[positions].tolist() if positions else []
    if any(begun != ended + 1 for begun, ended in zip(begins, ends, strict=True)):
        raise UnknownPictures(
            f"input_ids: expected the marks of {config.model_type}, {marks[0]} and {marks[1]}, around each picture"
        )
    return [Picture(begins.index(mark), begins.count(mark)) for mark in sorted(set(begins))]


def has_one_size(config: Any) -> bool:
    """Tells whether each picture of the family has as many tokens as any other."""
    return config.model_type in FIXED and not _has_pixtral_tower(config)


def _common_size(config: Any, tokens: int, pixels: Any) -> int | None:
    """Returns how many tokens each picture of a batch has: by the number of its pictures, or by its configuration."""
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
    """Returns the number of tokens that each picture has, None if the configuration names none that fits its tower."""
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
    """Returns how many patches a side the vision tower cuts a picture into, None if it takes several sizes."""
    vision = getattr(config, "vision_config", None)
    sizes = [getattr(vision, name, None) for name in ("image_size", "patch_size")]
    image, patch = (size[0] if isinstance(size, list | tuple) and size else size for size in sizes)
    return image // patch if isinstance(image, int) and isinstance(patch, int) and patch else None


def _one_run_each(positions: list[int], config: Any) -> list[Picture]:
    tile = _fixed_number(config) if config.model_type in ONE_RUN else None
    side = math.isqrt(tile or 0)
    return [Picture(first, tokens, (1, side, side) if tokens == tile else None) for first, tokens in runs_of(positions)]


def runs_of(positions: list[int]) -> list[tuple[int, int]]:
    """Returns index and length of each run of neighbouring positions."""
    runs: list[tuple[int, int]] = []
    for index, position in enumerate(positions):
        if runs and position == positions[index - 1] + 1:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs
