"""Attention kernels of other packages that give their LSE, and which of them runs.

Each backend says what it cannot do; the first that can is taken. Ours is the last: it takes every mask.
"""

import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import _native
from vgpo_kernels.attention import cpu_flash
from vgpo_kernels.attention.backend import backend as own_backend
from vgpo_kernels.attention.intervals import KeyMask, MaskRule

HALF = (torch.float16, torch.bfloat16)


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
    module: str, q: Tensor, k: Tensor, v: Tensor, mask: KeyMask, rule: MaskRule, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Runs flash-attn 2 or 3, whose tensors are (B, L, H, D), or (total, H, D) when packed."""
    library = importlib.import_module(module)
    window = -1 if rule.window is None else rule.window - 1
    options = {
        "softmax_scale": scale,
        "causal": rule.causal,
        "window_size": (window, 0 if rule.causal and rule.window is not None else window),
        "softcap": softcap or 0.0,
        "return_attn_probs": True,
    }
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if rule.cu_seqlens is None:
        out, lse, *_ = library.flash_attn_func(q, k, v, **options)
        return out.transpose(1, 2), _minus_infinity_where_empty(lse)
    bounds = rule.cu_seqlens.int()
    longest = q.shape[1] if rule.max_seqlen is None else rule.max_seqlen
    out, lse, *_ = library.flash_attn_varlen_func(q[0], k[0], v[0], bounds, bounds, longest, longest, **options)
    # What lies in no sequence is not written.
    empty = (mask.start >= mask.end)[:, None]  # [1, 1, total]
    out = out.transpose(0, 1)[None].masked_fill(empty[..., None], 0.0)
    return out, lse[None].masked_fill(empty, -math.inf)


def _minus_infinity_where_empty(lse: Tensor) -> Tensor:
    """Returns the LSE with -inf for queries that see nothing, which flash-attn marks by +inf."""
    return lse.masked_fill(lse.isposinf(), -math.inf)


def _run_torch_flash(
    q: Tensor, k: Tensor, v: Tensor, _: KeyMask, rule: MaskRule, scale: float, _softcap: float | None
) -> tuple[Tensor, Tensor]:
    out, lse, *_rest = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, rule.causal, False, scale=scale)
    return out, lse


def _run_torch_cudnn(
    q: Tensor, k: Tensor, v: Tensor, _: KeyMask, rule: MaskRule, scale: float, _softcap: float | None
) -> tuple[Tensor, Tensor]:
    out, lse, *_rest = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, rule.causal, False, scale=scale
    )
    return out, lse.view(q.shape[:3])


def _run_torch_efficient(
    q: Tensor, k: Tensor, v: Tensor, _: KeyMask, rule: MaskRule, scale: float, _softcap: float | None
) -> tuple[Tensor, Tensor]:
    out, lse, *_rest = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, rule.causal, scale=scale
    )
    return out, lse[..., : q.shape[2]]  # padded to whole tiles


def _run_ours(
    q: Tensor, k: Tensor, v: Tensor, mask: KeyMask, _: MaskRule, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    out, _mass, lse = own_backend(None, q.device, q.dtype).visual_attention(q, k, v, mask, scale, softcap)
    return out, lse


class Backend(NamedTuple):
    """A kernel.

    Args:
        obstacle: returns what keeps it from a request, or None.
        run: from q, k, v, mask, rule, scale and softcap, returns out (B, Hq, Lq, D) and the natural-log LSE
            (B, Hq, Lq), -inf where a query sees nothing. `mask` is the whole mask; the rule's `causal`, `window` and
            packed rows hold only if the request was plain.
        slower: returns why it is passed over for a later one, or None.
    """

    obstacle: Callable[[Request], str | None]
    run: Callable[[Tensor, Tensor, Tensor, KeyMask, MaskRule, float, float | None], tuple[Tensor, Tensor]]
    slower: Callable[[Request], str | None] = lambda _: None


# The fastest first, by the figures their authors give.
BACKENDS = {
    "cpu": Backend(_cpu_obstacle, cpu_flash.run, _slower_than_ours),
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
