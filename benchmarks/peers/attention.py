"""Other ways to attention, its mass on visual tokens and its column sums, at the semantics of ours."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.cases import Unavailable, compiled
from vgpo_kernels import attention_backend, attention_with_lse


def visible_keys(sequences: Tensor, queries: int) -> Tensor:
    """Which keys the last `queries` tokens see, (B, 1, Lq, Lk): earlier ones of their own sequence, -1 for none."""
    length = sequences.shape[1]
    earlier = torch.ones(queries, length, dtype=torch.bool, device=sequences.device).tril(length - queries)
    own = sequences[:, -queries:, None] == sequences[:, None]
    return (earlier & own & (sequences >= 0)[:, None])[:, None]


def eager_attention(q: Tensor, k: Tensor, sequences: Tensor) -> Tensor:
    """The whole map (B, Hq, Lq, Lk) as `output_attentions=True` gives it: K repeated, softmax in fp32."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ keys.mT * q.shape[-1] ** -0.5
    # Rows that see nothing would be NaN; what they hold is left out of every sum.
    return scores.masked_fill(~visible_keys(sequences, q.shape[2]), -1e30).softmax(-1, dtype=torch.float32)


def eager_mass(q: Tensor, k: Tensor, sequences: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """The map, summed over the keys of each segment."""
    seen = sequences[:, None, -q.shape[2] :, None] >= 0
    probabilities = eager_attention(q, k, sequences)
    sums = [(probabilities * (segment_ids == s)[:, None, None]).sum(-1) for s in range(num_segments)]
    return torch.stack(sums, -1) * seen


def eager_column_sum(q: Tensor, k: Tensor, sequences: Tensor, keys: Tensor) -> Tensor:
    """The map, summed over queries, at wanted keys."""
    return eager_attention(q, k, sequences).sum(2) * keys[:, None]


def eager_output(q: Tensor, k: Tensor, v: Tensor, sequences: Tensor, visual_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention through the map, with the map's sum over visual keys."""
    probabilities = eager_attention(q, k, sequences)
    out = probabilities.to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    seen = sequences[:, None, -q.shape[2] :, None] >= 0
    return out * seen, (probabilities * visual_mask[:, None, None]).sum(-1) * seen[..., 0]


def map_column_sum(q: Tensor, k: Tensor, lse: Tensor, sequences: Tensor, keys: Tensor) -> Tensor:
    """Probabilities of the wanted keys alone, from the LSE, summed over queries; all rows want the same keys."""
    wanted = keys[0].nonzero()[:, 0]
    some = k[:, :, wanted].repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ some.mT * q.shape[-1] ** -0.5
    probabilities = (scores.float() - lse[..., None]).exp()
    probabilities = probabilities.masked_fill(~visible_keys(sequences, q.shape[2])[..., wanted], 0.0)
    return probabilities.new_zeros(*k.shape[:1], q.shape[1], k.shape[2]).index_copy(2, wanted, probabilities.sum(2))


def stock_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The fastest attention at hand that is not ours, or another one, with its LSE."""
    backend = backend or stock_backend(q.device, q.dtype, q.shape[1:], k.shape[1:], causal=causal)
    if backend is None:
        raise Unavailable("no attention but ours gives its LSE here")
    return attention_with_lse(q, k, v, causal=causal, backend=backend)


@functools.cache
def stock_backend(
    device: torch.device,
    dtype: torch.dtype,
    q_shape: tuple[int, ...] = (8, 64, 128),
    k_shape: tuple[int, ...] = (2, 64, 128),
    *,
    causal: bool = True,
) -> str | None:
    """Returns the backend of the fastest attention that is not ours, for shapes (H, L, D), or None."""
    if device.type == "cpu":
        return "cpu"
    q, k = (torch.empty(1, *shape, device=device, dtype=dtype) for shape in (q_shape, k_shape))
    name, _ = attention_backend(q, k, causal=causal)
    return None if name == "vgpo" else name


def two_lse_mass(
    q: Tensor, k: Tensor, lse: Tensor, images: list[list[tuple[int, int]]], backend: str | None = None
) -> Tensor:
    """exp(LSE over an image's keys - LSE over all), the former by another stock attention, with keys for values.

    Only for images whose keys lie side by side before every query.

    Args:
        images: first key and the one after the last of each image, by row, or once where they are the same in all rows.
    """
    together = len(images) == 1
    rows = [slice(None)] if together else [slice(row, row + 1) for row in range(len(images))]
    masses = [
        torch.stack([_visual_lse(q[row], k[row, :, first:stop], backend) - lse[row] for first, stop in places], -1)
        for row, places in zip(rows, images, strict=True)
    ]
    return torch.cat(masses).exp()


def _visual_lse(q: Tensor, keys: Tensor, backend: str | None) -> Tensor:
    if not keys.shape[2]:  # all of an image may be padding
        return q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    return stock_attention(q, keys, keys, causal=False, backend=backend)[1]


def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> tuple[Tensor, Tensor]:
    """FlexAttention's output and natural-log LSE; compiled on a GPU, where alone its compiler gives the LSE."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    run = compiled(flex_attention) if q.is_cuda else flex_attention
    out, extra = run(q, k, v, block_mask=block_mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
    return out, extra.lse


def flex_mask(sequences: Tensor, queries: int, visual_mask: Tensor | None = None) -> Any:
    """FlexAttention's mask of the keys that the last `queries` tokens see, or of the visual ones among them."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = sequences.shape
    offset = length - queries

    def sees(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        earlier = (key <= query + offset) & (sequences[b, query + offset] == sequences[b, key])
        seen = earlier & (sequences[b, key] >= 0)
        return seen if visual_mask is None else seen & visual_mask[b, key]

    return create_block_mask(sees, rows, None, queries, length, device=sequences.device)


def colreduce(q: Tensor, k: Tensor, keys: Tensor) -> Tensor:
    """flash-colreduce's causal column sums, which takes as many key heads as query heads."""
    from flash_colreduce import flash_colreduce

    whole = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return flash_colreduce(q, whole, "sum", is_causal=True).float() * keys[:, None]
