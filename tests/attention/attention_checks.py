"""What the tests of attention with its mass share: cases, and how results are judged."""

import torch
from dense_attention import dense_attention, inputs, intervals, visible_keys
from torch import Tensor

from vgpo_kernels.attention.intervals import KeyMask
from vgpo_kernels.testing import assert_error_budget

DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if torch.cuda.is_available() else ()))
MASKS = ("full", "causal", "left", "right", "packed", "window", "blocks", "empty", "blind", "arbitrary")
HOLES = (17, 33)


def kinds(name: str, batch: int, Lk: int) -> Tensor:
    """Returns (B, Lk) int8 key kinds; rows differ.

    Args:
        name: "image" (with keys before and after), "none" visual, "all" visual, "scattered", or "holes": an image and
            keys in the middle of the first row that are hidden from all queries.
    """
    kind = torch.ones(batch, Lk, dtype=torch.int8)
    if name == "all":
        kind[:] = 2
    elif name == "scattered":
        kind += torch.randint(0, 2, (batch, Lk), generator=torch.Generator().manual_seed(5)).to(torch.int8)
    elif name in ("image", "holes"):
        for row in range(batch):
            kind[row, 5 + row : Lk * 3 // 4 + row] = 2
        if name == "holes":
            kind[0, HOLES[0] : HOLES[1]] = 0
            kind[0, Lk - 2] = 0
    elif name != "none":
        raise ValueError(f"kinds: got {name!r}")
    return kind


def case(mask: str, kind: str, heads: tuple[int, int], lengths: tuple[int, int], D: int, dtype: torch.dtype) -> dict:
    """Returns q, k, v, key_kinds, key_start and key_end, with NaN wherever nothing may be read."""
    q, k, v = inputs(2, heads, lengths, D, dtype)
    key_start, key_end = intervals(mask, 2, *lengths)
    key_kinds = kinds(kind, 2, lengths[1])
    visible = visible_keys(key_start, key_end, lengths[1], key_kinds)
    q = q.masked_fill(~visible.any(2)[:, None, :, None], float("nan"))
    unseen = ~visible.any(1)[:, None, :, None]
    k, v = k.masked_fill(unseen, float("nan")), v.masked_fill(unseen, float("nan"))
    return {"q": q, "k": k, "v": v, "key_kinds": key_kinds, "key_start": key_start, "key_end": key_end}


def bundled(tensors: dict[str, Tensor]) -> dict[str, Tensor | KeyMask]:
    """Returns the arguments of an implementation: those of a case with its mask as one."""
    rest = {name: x for name, x in tensors.items() if not name.startswith("key_")}
    return rest | {"mask": KeyMask(tensors["key_start"], tensors["key_end"], tensors["key_kinds"])}


def without_finite_scores(seen: int, dtype: torch.dtype, D: int = 16) -> tuple[dict, Tensor]:
    """Returns a case of 64 queries that see the first `seen` keys and 6 that see the rest of 256, and the rows (every
    fifth of the former) whose scores are all -inf.
    """
    tensors = case("full", "image", (1, 1), (70, 256), D, dtype)
    rows = torch.arange(0, 64, 5)
    tensors["key_end"][:, :64] = seen
    tensors["key_start"][:, 64:] = seen
    tensors["k"][..., 0] = tensors["k"][..., 0].abs() + 1
    tensors["q"][:, :, rows, 0] = -torch.inf
    return tensors, rows


def on(device: str, tensors: dict) -> dict:
    """Returns the tensors on the device, with their strides."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def dense(tensors: dict, dtype: torch.dtype, **options: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out, mass and LSE as dense attention in `dtype` has them."""
    q, k, v = (tensors[name].to(dtype) for name in "qkv")
    key_kinds = tensors["key_kinds"]
    known = dense_attention(q, k, v, tensors["key_start"], tensors["key_end"], key_kinds=key_kinds, **options)
    visual = (key_kinds == 2)[:, None, None]
    return known.out, (known.probabilities * visual).sum(-1), known.lse


def check_forward(results: tuple[Tensor, Tensor, Tensor], tensors: dict, **options: float | None) -> None:
    """Compares out, mass and LSE with dense attention in the same dtype and in float64."""
    dtype = tensors["q"].dtype
    same, exact = dense(tensors, dtype, **options), dense(tensors, torch.float64, **options)
    assert results[0].dtype == dtype
    assert results[1].dtype == results[2].dtype == torch.float32
    for name, actual, expected, truth in zip(("out", "mass", "lse"), results, same, exact, strict=True):
        assert_error_budget(name, actual.cpu(), expected, truth)
