"""Attention kernels of others that give their LSE, and which of them runs.

Each backend says what it cannot do; the first that can is taken. Ours is the last: it takes every mask.
"""

import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import _native
from vgpo_kernels.attention import reference
from vgpo_kernels.attention.backend import backend as own_backend

HALF = (torch.float16, torch.bfloat16)
RESULT_BYTES = 1 << 25  # of a call on a CPU, before it is put in its place
MASK_ELEMENTS = 1 << 21  # in the mask of a block of queries on a CPU: 8 MB in fp32


class Mask(NamedTuple):
    """A mask in the words of every backend; `causal` and `window` hold only where `plain` is True.

    Args:
        key_kinds: (B, Lk) int8.
        key_start, key_end: (B, Lq) int32, the whole mask but for hidden keys.
        cu_seqlens: (n + 1,) int or None.
        max_seqlen: of the packed sequences, or None.
        causal: as in the public function.
        window: keys a query sees on each side, its own included, or None.
    """

    key_kinds: Tensor
    key_start: Tensor
    key_end: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    causal: bool
    window: int | None


class Request(NamedTuple):
    """What a backend must know to say whether it can run; nothing that reads data.

    Args:
        device: of the tensors.
        dtype: of q, k and v.
        lengths: Lq and Lk.
        heads: Hq and Hkv.
        head_dim: D.
        plain: the mask is `causal`, `window` and `cu_seqlens` alone: no intervals given, no key mask.
        causal, packed, window, softcap: what it asks for.
    """

    device: torch.device
    dtype: torch.dtype
    lengths: tuple[int, int]
    heads: tuple[int, int]
    head_dim: int
    plain: bool
    causal: bool
    packed: bool
    window: int | None
    softcap: float | None


def choose(request: Request, backend: str | None = None) -> tuple[str, str]:
    """Returns the name of the backend that runs and why it does: what kept the faster ones from it.

    Raises:
        ValueError: `backend` is no known name.
        RuntimeError: `backend` cannot run this; the message says why.
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
        obstacle = BACKENDS[backend].obstacle(request)
        if obstacle:
            raise RuntimeError(f"backend {backend!r} cannot run this: {obstacle}")
        return backend, "asked for"
    passed_over: list[str] = []
    for name, candidate in BACKENDS.items():
        obstacle = candidate.obstacle(request) or candidate.slower(request)
        if obstacle is None:
            return name, "; ".join(passed_over) or "the fastest"
        passed_over.append(f"{name}: {obstacle}")
    raise RuntimeError(f"no attention kernel for {request.device.type} tensors ({'; '.join(passed_over)})")


def run(
    backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Returns out (B, Hq, Lq, D) and the natural-log LSE (B, Hq, Lq), -inf where a query sees nothing."""
    out, lse = BACKENDS[backend].run(q, k, v, mask, scale, softcap)
    return out, lse


@functools.cache
def _package_obstacle(module: str) -> str | None:
    """Returns why a flash-attn package cannot be called as `_run_flash_attn` does."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    parameters = inspect.signature(importlib.import_module(module).flash_attn_func).parameters
    lacking = [name for name in ("softcap", "window_size", "return_attn_probs") if name not in parameters]
    return f"{module} is too old: its flash_attn_func has no {', '.join(lacking)}" if lacking else None


def _not_plain_half_on_cuda(request: Request) -> str | None:
    if request.device.type != "cuda":
        return f"{request.device.type} tensors"
    if request.dtype not in HALF:
        return f"no {str(request.dtype).removeprefix('torch.')}"
    if not request.plain:
        return "a key mask or intervals"
    return "a head size above 256" if request.head_dim > 256 else None


def _flash_attn_obstacle(module: str, request: Request) -> str | None:
    obstacle = _not_plain_half_on_cuda(request) or _package_obstacle(module)
    if obstacle is not None:
        return obstacle
    capability = torch.cuda.get_device_capability(request.device)[0]
    if module == "flash_attn_interface":
        return None if capability == 9 else "needs an sm_90 GPU"
    return None if capability >= 8 else "needs compute capability 8.0"


def _torch_obstacle(request: Request, *, min_capability: int) -> str | None:
    obstacle = _not_plain_half_on_cuda(request)
    if obstacle is None and (request.softcap is not None or request.window is not None or request.packed):
        return "a soft-cap, a window or packed rows"
    # Its causal mask starts at the first key, ours ends at the last.
    if obstacle is None and request.causal and request.lengths[0] != request.lengths[1]:
        return "a causal mask with Lq != Lk"
    if obstacle is None and request.head_dim % 8:
        return "a head size that is no multiple of 8"
    if obstacle is None and torch.version.hip:
        return "ROCm"
    if obstacle is None and torch.cuda.get_device_capability(request.device)[0] < min_capability:
        return f"needs compute capability {min_capability}.0"
    return obstacle


def _cudnn_obstacle(request: Request) -> str | None:
    """Returns what keeps cuDNN from a request: torch's own checks before it calls cuDNN, which a direct call passes by.

    They take one query and odd lengths (cuDNN 9 on), but not one key.
    """
    obstacle = _torch_obstacle(request, min_capability=9)
    if obstacle is None and request.lengths[1] == 1:
        return "one key"
    return "a head size above 128" if obstacle is None and request.head_dim > 128 else obstacle


def _efficient_obstacle(request: Request) -> str | None:
    obstacle = _torch_obstacle(request._replace(dtype=torch.float16), min_capability=5)
    if obstacle is None and request.dtype == torch.float64:
        return "no float64"
    if obstacle is None and request.heads[0] != request.heads[1]:
        return "no grouped heads"
    return obstacle


def _cpu_obstacle(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"{request.device.type} tensors"
    return "a soft-cap" if request.softcap is not None else None


def _slower_than_ours(request: Request) -> str | None:
    """Returns why torch's kernel for CPUs is passed over, or None: ours is faster where vectors are wide."""
    return "our own CPU kernel is faster" if request.dtype != torch.float64 and _has_wide_vectors() else None


def _has_wide_vectors() -> bool:
    return _native.missing() is None and _native.capability() != "portable"


# What `torch.compiler.assume_constant_result` does, which would import the compiler with this package.
_has_wide_vectors._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _ours_obstacle(request: Request) -> str | None:
    return None if request.device.type in ("cpu", "cuda") else f"{request.device.type} tensors"


def _run_flash_attn(
    module: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Runs flash-attn 2 or 3, whose tensors are (B, L, H, D), or (total, H, D) when packed."""
    library = importlib.import_module(module)
    window = -1 if mask.window is None else mask.window - 1
    options = {
        "softmax_scale": scale,
        "causal": mask.causal,
        "window_size": (window, 0 if mask.causal and mask.window is not None else window),
        "softcap": softcap or 0.0,
        "return_attn_probs": True,
    }
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask.cu_seqlens is None:
        out, lse, *_ = library.flash_attn_func(q, k, v, **options)
        return out.transpose(1, 2), _minus_infinity_where_empty(lse)
    bounds = mask.cu_seqlens.int()
    longest = q.shape[1] if mask.max_seqlen is None else mask.max_seqlen
    out, lse, *_ = library.flash_attn_varlen_func(q[0], k[0], v[0], bounds, bounds, longest, longest, **options)
    # What lies in no sequence is not written.
    empty = (mask.key_start >= mask.key_end)[:, None]  # [1, 1, total]
    out = out.transpose(0, 1)[None].masked_fill(empty[..., None], 0.0)
    return out, lse[None].masked_fill(empty, -math.inf)


def _minus_infinity_where_empty(lse: Tensor) -> Tensor:
    """Returns the LSE with -inf for queries that see nothing, which flash-attn marks by +inf."""
    return lse.masked_fill(lse.isposinf(), -math.inf)


def _run_torch_flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, _: float | None
) -> tuple[Tensor, Tensor]:
    out, lse, *_rest = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, mask.causal, False, scale=scale)
    return out, lse


def _run_torch_cudnn(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, _: float | None
) -> tuple[Tensor, Tensor]:
    out, lse, *_rest = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, mask.causal, False, scale=scale
    )
    return out, lse.view(q.shape[:3])


def _run_torch_efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, _: float | None
) -> tuple[Tensor, Tensor]:
    out, lse, *_rest = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, mask.causal, scale=scale
    )
    return out, lse[..., : q.shape[2]]  # padded to whole tiles


def _run_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, _: float | None) -> tuple[Tensor, Tensor]:
    """Runs torch's flash attention for CPUs on blocks of queries and the keys they see.

    A row that is causal, or in which every query sees every key, takes no mask, and a call for some of its heads. Other
    blocks are long because each call lays K and V out anew; the mask of a block is all that is made of one.
    """
    Lq = q.shape[2]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    size = max(1, MASK_ELEMENTS // k.shape[2])
    for row in range(len(q)):
        causal = _causality(mask, row)
        if causal is not None:
            for heads, kv_heads in _head_groups(q, k):
                out[row, heads], lse[row, heads] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q[row, None, heads], k[row, None, kv_heads], v[row, None, kv_heads], 0.0, causal, scale=scale
                )
            continue
        for first in range(0, Lq, size):
            queries = slice(first, min(first + size, Lq))
            start, end = mask.key_start[row, queries], mask.key_end[row, queries]
            keys = reference.union(start, end)
            if keys is None:
                continue
            visible = reference.visible_keys(keys, start, end, mask.key_kinds[row, keys])  # [m, n]
            b_k, b_v, bias = k[row : row + 1, :, keys], v[row : row + 1, :, keys], None
            if not visible.all():
                unseen = ~visible.any(0)[:, None]
                if unseen.any():
                    b_k, b_v = b_k.masked_fill(unseen, 0.0), b_v.masked_fill(unseen, 0.0)
                bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -math.inf)[None, None]
            b_out, b_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[row : row + 1, :, queries], b_k, b_v, 0.0, False, attn_mask=bias, scale=scale
            )
            empty = ~visible.any(1)
            out[row, :, queries] = b_out[0].masked_fill(empty[:, None], 0.0)
            lse[row, :, queries] = b_lse[0].masked_fill(empty, -math.inf)
    return out, lse


def _head_groups(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields query heads with their key heads, as many as their output of one row takes little memory."""
    count, group = k.shape[1], q.shape[1] // k.shape[1]
    step = max(1, count * RESULT_BYTES // max(1, q[:1].nbytes))
    for first in range(0, count, step):
        last = min(first + step, count)
        yield slice(first * group, last * group), slice(first, last)


def _causality(mask: Mask, row: int) -> bool | None:
    """Returns True where each query of a row sees the keys up to its own, False where it sees all, None otherwise."""
    start, end, kinds = mask.key_start[row], mask.key_end[row], mask.key_kinds[row]
    if not len(kinds) or start.any() or not kinds.all():
        return None
    if (end == len(kinds)).all():
        return False
    up_to_own = torch.arange(1, len(end) + 1, dtype=end.dtype, device=end.device)
    return True if len(end) == len(kinds) and torch.equal(end, up_to_own) else None


def _run_ours(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    out, _, lse = own_backend(None, q.device, q.dtype).visual_attention(
        q, k, v, mask.key_kinds, mask.key_start, mask.key_end, scale, softcap
    )
    return out, lse


class Backend(NamedTuple):
    """A kernel: what keeps it from a request (None: nothing), the call, and why it is passed over for a later one."""

    obstacle: Callable[[Request], str | None]
    run: Callable[[Tensor, Tensor, Tensor, Mask, float, float | None], tuple[Tensor, Tensor]]
    slower: Callable[[Request], str | None] = lambda _: None


# The fastest first, by the figures their authors give.
BACKENDS = {
    "cpu": Backend(_cpu_obstacle, _run_cpu, _slower_than_ours),
    "flash_attn_3": Backend(
        functools.partial(_flash_attn_obstacle, "flash_attn_interface"),
        functools.partial(_run_flash_attn, "flash_attn_interface"),
    ),
    "torch_cudnn": Backend(_cudnn_obstacle, _run_torch_cudnn),
    "flash_attn_2": Backend(
        functools.partial(_flash_attn_obstacle, "flash_attn"), functools.partial(_run_flash_attn, "flash_attn")
    ),
    "torch_flash": Backend(functools.partial(_torch_obstacle, min_capability=8), _run_torch_flash),
    "torch_efficient": Backend(_efficient_obstacle, _run_torch_efficient),
    "vgpo": Backend(_ours_obstacle, _run_ours),
}
