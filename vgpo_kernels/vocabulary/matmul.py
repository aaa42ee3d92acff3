"""The three matrix products of the vocabulary: logits, the gradient of the hidden states, that of the weight.

Logits come out in float32 (float64 for float64), never rounded to half precision. On a GPU the vendor's product does
that for half precision; on a CPU, where it rounds, the weight is cast a few rows at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vgpo_kernels._dtypes import compute_dtype

_HALF = (torch.float16, torch.bfloat16)
_TILE_BYTES = 8 << 20  # of a cast piece of the weight
# Tokens from which on a CPU's product sums in blocks by itself. With fewer it adds one term after the other, and of
# 150,000 terms loses a digit that sums of pieces keep.
_MANY = 16
_TERMS = {True: 4096, False: 512}


def tile_bytes(dtype: torch.dtype, device: torch.device) -> int:
    """Returns what the cast pieces of a weight of that dtype take at a time."""
    return _TILE_BYTES if dtype in _HALF and device.type != "cuda" else 0


def gradient_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype that gradients of logits take as operands of products with weights of `dtype`."""
    return dtype if dtype in _HALF and device.type == "cuda" else compute_dtype(dtype)


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Returns hidden (n, D) @ weight (V, D)^T + bias (V,), written to `out` (n, V) in its dtype."""
    if hidden.is_cuda and hidden.dtype in _HALF:
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), out.dtype, out=out)
    else:
        states = hidden.to(out.dtype)
        for tile, piece in _tiles(weight, out.dtype):
            torch.mm(states, piece.t(), out=out[:, tile])
    return out if bias is None else out.add_(bias)


def states_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Returns gradient (n, V) @ weight (V, D), (n, D) in the gradient's dtype."""
    if gradient.is_cuda:
        return gradient @ weight
    total = gradient.new_zeros(gradient.shape[0], weight.shape[1])
    for tile, piece in _tiles(weight, gradient.dtype, _TERMS[gradient.shape[0] >= _MANY]):
        total += gradient[:, tile] @ piece
    return total


def add_weight_gradient(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Adds gradient (n, V)^T @ hidden (n, D) to `total` (V, D), which is float32 or float64."""
    if gradient.dtype == total.dtype:
        torch.addmm(total, gradient.t(), hidden.to(total.dtype), out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, gradient.t(), hidden, total.dtype, out=total)


def _tiles(weight: Tensor, dtype: torch.dtype, most: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yields pieces of the vocabulary with the weight's rows in `dtype`, `most` of them: fewer where they are cast."""
    rows = weight.shape[0] if most is None else most
    if weight.dtype != dtype:
        rows = max(1, min(rows, _TILE_BYTES // (weight.shape[1] * dtype.itemsize)))
    for start in range(0, weight.shape[0], rows):
        tile = slice(start, start + rows)
        yield tile, weight[tile].to(dtype)
