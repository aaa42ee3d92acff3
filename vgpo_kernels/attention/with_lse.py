"""Attention with its LSE by the fastest kernel at hand, of another package or ours, and which kernel that is.

Masks are as in `vgpo_kernels.attention.api`.
"""

import torch
from torch import Tensor

from vgpo_kernels._operator import as_autocast
from vgpo_kernels.attention import ops, stock_kernels
from vgpo_kernels.attention.checks import check_qk, checked


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    intervals: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends with the fastest kernel present that takes the mask, and returns its LSE.

    The backends, fastest first: "cpu" (torch's flash attention for CPUs), "flash_attn_3", "torch_cudnn",
    "flash_attn_2", "torch_flash", "torch_efficient", and "vgpo", ours, which takes every mask and on CPUs with AVX2 or
    AVX-512 is the fastest. `attention_backend` says which one runs and why. Differentiable (once) through out and LSE,
    by our own backward.

    Args:
        q, k, v: as in `visual_attention`.
        max_seqlen: the longest packed sequence, so that flash-attn need not assume the whole row.
        causal, scale, key_mask, cu_seqlens, window, softcap, intervals: as in `attention_mass`.
        backend: the name of the only backend to take.

    Returns:
        out (B, Hq, Lq, D) of q's dtype and lse (B, Hq, Lq) fp32 (fp64 for fp64), natural log.

    Raises:
        TypeError, ValueError: as in `attention_mass`.
        RuntimeError: `backend` cannot run this; the message says why.

    Example:
        >>> import torch
        >>> q = k = v = torch.zeros(1, 1, 4, 8)
        >>> out, lse = attention_with_lse(q, k, v)
        >>> lse.exp()
        tensor([[[1., 2., 3., 4.]]])
    """
    q, k, v, scale, rule = checked(
        q, k, v, causal=causal, scale=scale, key_mask=key_mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
        window=window, softcap=softcap, intervals=intervals,
    )  # fmt: skip
    name, _ = attention_backend(
        q, k, causal=causal, key_mask=key_mask, cu_seqlens=cu_seqlens, window=window, softcap=softcap,
        intervals=intervals, backend=backend,
    )  # fmt: skip
    nothing = torch.zeros((q.shape[0], k.shape[2]), dtype=torch.bool, device=q.device)
    start, end, kinds = ops.key_mask(rule, nothing, False, q, None)
    out, lse = ops.attention_with_lse(
        q, k, v, kinds, start, end, cu_seqlens, max_seqlen, causal, window, scale, softcap, name
    )
    return out, lse


def attention_backend(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    intervals: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[str, str]:
    """Says which backend `attention_with_lse` takes for these arguments, and why.

    Args:
        q, k, causal, key_mask, cu_seqlens, window, softcap, intervals, backend: as there.

    Returns:
        The backend's name, and what kept the faster ones from running.

    Raises:
        ValueError: `backend` is no known name.
        RuntimeError: no backend, or not this one, takes the arguments.

    Example:
        >>> import torch
        >>> q = k = torch.zeros(1, 1, 4, 8, dtype=torch.float64)
        >>> attention_backend(q, k)
        ('cpu', 'the fastest')
    """
    q, k = as_autocast(q, k)
    check_qk(q, k, softcap)
    request = stock_kernels.Request(
        device=q.device,
        dtype=q.dtype,
        lengths=(q.shape[2], k.shape[2]),
        heads=(q.shape[1], k.shape[1]),
        head_dim=q.shape[3],
        plain=intervals is None and key_mask is None,
        causal=causal,
        packed=cu_seqlens is not None,
        window=window,
        softcap=softcap,
    )
    return stock_kernels.choose(request, backend)
