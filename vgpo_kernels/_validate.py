"""Checks of arguments: every error names the argument, what was expected and what came."""

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int8, torch.int16, torch.int32, torch.int64)
BOOL = (torch.bool,)
MASK = BOOL + INTEGER + (torch.uint8,) + FLOATING


def check_tensor(
    name: str,
    value: Any,
    *,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Raises unless `value` is a tensor of this shape (a str stands for any length), dtype and device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dim() != len(shape) or any(
        not isinstance(size, str) and actual != size for actual, size in zip(value.shape, shape, strict=True)
    ):
        # Written only here: torch.compile cannot make text of a dynamic length.
        wanted = "(" + ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {names}, got {str(value.dtype).removeprefix('torch.')}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")


def check_not_empty(name: str, value: Tensor) -> None:
    """Raises where a dimension of `value` has length 0."""
    if 0 in value.shape:
        raise ValueError(f"{name}: expected at least one element, got shape {tuple(value.shape)}")


def check_number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    low_open: bool = False,
) -> None:
    """Raises unless `value` is a finite real number in [low, high] ((low, high] when `low_open`)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    below = low is not None and (value <= low if low_open else value < low)
    above = high is not None and value > high
    if value != value or value in (float("inf"), float("-inf")) or below or above:
        left = "(" if low_open or low is None else "["
        right = "]" if high is not None else ")"
        bounds = f"{left}{'-inf' if low is None else low}, {'inf' if high is None else high}{right}"
        raise ValueError(f"{name}: expected a number in {bounds}, got {value!r}")


def check_mask_values(name: str, mask: Tensor) -> None:
    """Raises unless `mask` (B, T) holds only 0 and 1; reads the data, so that on a GPU it waits for the device."""
    if mask.dtype != torch.bool:
        forbid((mask != 0) & (mask != 1), name, "0 or 1", mask)


def forbid(wrong: Tensor, name: str, expected: str, value: Tensor) -> None:
    """Raises, with the first place, where `wrong` holds anywhere; both tensors are (B,) or (B, T)."""
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        where = ", ".join(f"{axis} {index}" for axis, index in zip(("row", "position"), place, strict=False))
        raise ValueError(f"{name}: expected {expected}, got {value[place].item()} at {where}")


def check_fields(fields: Iterable[str], known: Collection[str]) -> None:
    """Raises where a name in `fields` is none of `known`."""
    for name in fields:
        if name not in known:
            raise ValueError(unknown("field", name, known))


def unknown(kind: str, name: Any, known: Iterable[str]) -> str:
    """Says that `name` is none of `known`, and which of them is nearest."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.4)
    hint = f"the nearest known one is {near[0]!r}" if near else f"known ones are {', '.join(known)}"
    return f"unknown {kind} {name!r}: {hint}"


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
