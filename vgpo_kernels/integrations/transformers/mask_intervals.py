"""Turns the masks that transformers describes into one interval of visible keys for each query.

mask = evaluate(mask_function, MaskShape(batch, Lq, Lk, q_offset, kv_offset), device=device, name="Qwen2VLConfig")
mask.key_start, mask.key_end  # (B, Lq) int32
packed = encode(mask)  # one int32 tensor, handed from layer to layer as `attention_mask`
decode(packed).key_start  # in the attention function
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

# A mask function is evaluated on a block of queries at a time: 8 Mi entries take a few temporaries of 32 MB.
BLOCK_ELEMENTS = 1 << 23

# The numbers before the layers and the bounds in an encoded mask.
HEADER = ("Lq", "Lk", "kv_offset", "holes", "causal", "layers")


class MaskShape(NamedTuple):
    """The part of the attention map that a mask covers.

    Args:
        batch: B.
        q_length: Lq, queries of this forward.
        kv_length: Lk, keys that the cache hands over.
        q_offset: position of the first query, an int or a tensor of one element.
        kv_offset: position of the first key, an int or a tensor of one element.
    """

    batch: int
    q_length: int
    kv_length: int
    q_offset: Any = 0
    kv_offset: Any = 0


@dataclass(eq=False)
class KeyIntervals:
    """The keys that each query sees: `key_start <= j < key_end` and `usable[j]`.

    Args:
        key_start: (B, Lq) int32, inclusive.
        key_end: (B, Lq) int32, exclusive; no greater than key_start if a query sees nothing.
        usable: (B, Lk) bool, False for holes; None if every key between the bounds is seen.
        kv_offset: position of key 0.
        kv_length: Lk.
        causal: the intervals are those of the plain causal mask whose last query sees every key.
        layers: indices of the layers whose attention is recorded.
        sdpa_mask: makes the mask that transformers would have given its own attention.
    """

    key_start: Tensor
    key_end: Tensor
    usable: Tensor | None
    kv_offset: Any
    kv_length: int
    causal: bool
    layers: tuple[int, ...] = ()
    sdpa_mask: Callable[[], Tensor | None] | None = None
    _dense: list[Tensor | None] = field(default_factory=list, repr=False)

    def options(self) -> dict[str, Any]:
        """Returns the mask in the keywords of `vgpo_kernels.attention`: causal=True lets every kernel run."""
        if self.causal:
            return {"causal": True}
        return {"intervals": (self.key_start, self.key_end), "key_mask": self.usable}

    def last_queries(self, count: int) -> "KeyIntervals":
        """Returns the mask of the last `count` queries: some models drop the others before their last layers."""
        if count == self.key_start.shape[1]:
            return self
        start, end = self.key_start[:, -count:].contiguous(), self.key_end[:, -count:].contiguous()
        return KeyIntervals(start, end, self.usable, self.kv_offset, self.kv_length, self.causal, self.layers)

    def dense(self) -> Tensor | None:
        """Returns the mask for transformers' own attention: (B, 1, Lq, Lk) bool, or None; made once."""
        if not self._dense:
            self._dense.append(self.sdpa_mask() if self.sdpa_mask is not None else self._from_bounds())
        return self._dense[0]

    def _from_bounds(self) -> Tensor | None:
        Lq = self.key_start.shape[1]
        if self.causal and Lq in (1, self.kv_length):
            return None
        position = torch.arange(self.kv_length, device=self.key_start.device)
        visible = (position >= self.key_start[..., None]) & (position < self.key_end[..., None])
        if self.usable is not None:
            visible &= self.usable[:, None]
        return visible[:, None]


def evaluate(
    mask_function: Callable[..., Tensor],
    shape: MaskShape,
    *,
    name: str,
    device: torch.device | str = "cpu",
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    block_elements: int = BLOCK_ELEMENTS,
) -> KeyIntervals:
    """Returns the intervals of a mask function, evaluated on a block of queries at a time.

    Args:
        mask_function: of batch, head, query and key indices, as transformers' masking_utils combine them.
        shape: which queries and keys.
        name: of the mask's owner, for the error.
        device: where to evaluate it.
        attention_mask: (B, tokens) bool, False for padding; edges end intervals, the middle becomes holes.
        use_vmap: the function takes only scalars.
        block_elements: most entries of the attention map to evaluate at once.

    Raises:
        ValueError: a query sees other keys than one interval of those that any query of its row sees.
    """

    def blocks() -> Iterator[Tensor]:
        rows = max(1, block_elements // (shape.batch * shape.kv_length))
        for first in range(0, shape.q_length, rows):
            mask = sdpa_mask(
                batch_size=shape.batch,
                q_length=min(rows, shape.q_length - first),
                kv_length=shape.kv_length,
                q_offset=shape.q_offset + first,
                kv_offset=shape.kv_offset,
                mask_function=mask_function,
                attention_mask=attention_mask,
                allow_is_causal_skip=False,
                allow_is_bidirectional_skip=False,
                use_vmap=use_vmap,
                device=device,
            )
            yield mask[:, 0]  # type: ignore[index]

    return _intervals(blocks(), shape.kv_offset, name)


def from_dense(
    mask: Tensor, batch: int, name: str, *, kv_offset: int = 0, block_elements: int = BLOCK_ELEMENTS
) -> KeyIntervals:
    """Returns the intervals of a dense mask.

    Args:
        mask: (B or 1, heads, Lq, Lk), bool (True is seen) or additive (0 is seen, the smallest number is not).
        batch: B.
        name: of the mask's owner, for the error.
        kv_offset: position of the first key.
        block_elements: most entries to read at once.

    Raises:
        ValueError: heads have masks of their own, an additive mask holds a bias, or a row is no interval.
    """
    if mask.dim() != 4 or mask.shape[0] not in (1, batch):
        raise ValueError(f"{name}: expected a mask (B, 1, Lq, Lk) for a batch of {batch}, got {tuple(mask.shape)}")
    if mask.shape[1] > 1 and not bool((mask == mask[:, :1]).all()):
        raise ValueError(f"{name}: expected one mask for all heads, got one for each of {mask.shape[1]}")
    additive = mask.dtype != torch.bool
    lowest = torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else 0.0

    def blocks() -> Iterator[Tensor]:
        rows = max(1, block_elements // (batch * mask.shape[3]))
        for first in range(0, mask.shape[2], rows):
            block = mask[:, 0, first : first + rows].expand(batch, -1, -1)
            if not additive:
                yield block
                continue
            visible = block > lowest
            if mask.is_floating_point() and bool((visible & (block != 0)).any()):
                raise ValueError(f"{name}: expected a mask of 0 and the smallest number, got a bias on the scores")
            yield visible

    return _intervals(blocks(), kv_offset, name)


def without_mask(shape: MaskShape, *, causal: bool, device: torch.device) -> KeyIntervals:
    """Returns the mask that transformers' own attention applies if it is given none.

    Args:
        shape: which queries and keys; a single query sees everything.
        causal: query i sees the first i + 1 keys.
        device: of the result.
    """
    Lq, Lk = shape.q_length, shape.kv_length
    end = torch.full((shape.batch, Lq), Lk, dtype=torch.int32, device=device)
    if causal and Lq > 1:
        end = torch.arange(1, Lq + 1, dtype=torch.int32, device=device).clamp(max=Lk).repeat(shape.batch, 1)
    plain = Lq == 1 or (causal and Lq == Lk)
    return KeyIntervals(torch.zeros_like(end), end, None, shape.kv_offset, Lk, plain)


def only_chosen(mask: Tensor | None, chosen: Tensor, kv_length: int) -> Tensor:
    """Returns a mask for transformers' own attention under which each query sees only the keys chosen for it.

    Args:
        mask: (B, 1, Lq, Lk), bool (True is seen) or additive; None is the causal mask whose last query sees every key.
        chosen: (B, Lq, n) indices of keys.
        kv_length: Lk.
    """
    batch, Lq, _ = chosen.shape
    seen = torch.zeros(batch, Lq, kv_length, dtype=torch.bool, device=chosen.device)
    seen = seen.scatter(-1, chosen.long(), True)[:, None]
    if mask is None:
        return seen.tril(kv_length - Lq)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def encode(mask: KeyIntervals) -> Tensor:
    """Returns the mask as one (B, 1, 1, n) int32 tensor, which models pass on as they do any attention mask.

    The object itself is an attribute of the tensor: a layer that gets this tensor, and no copy, reads nothing back
    from the device.
    """
    batch, Lq = mask.key_start.shape
    device = mask.key_start.device
    numbers = [Lq, mask.kv_length, 0, mask.usable is not None, mask.causal, len(mask.layers), *mask.layers]
    header = torch.tensor(numbers, dtype=torch.int32, device=device)
    header[HEADER.index("kv_offset")] = mask.kv_offset
    parts = [header.expand(batch, -1), mask.key_start, mask.key_end]
    if mask.usable is not None:
        parts.append(mask.usable.int())
    packed = torch.cat(parts, dim=1)[:, None, None]
    packed._vgpo_intervals = mask  # type: ignore[attr-defined]
    return packed


def is_encoded(mask: Any) -> bool:
    """Tells whether `mask` came from `encode`."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[1:3] == (1, 1)


def decode(packed: Tensor) -> KeyIntervals:
    """Returns the mask that `encode` packed.

    Raises:
        ValueError: a model cut the tensor as if it were a mask (B, 1, Lq, Lk).
    """
    known = getattr(packed, "_vgpo_intervals", None)
    if known is not None:
        return known
    row = packed[:, 0, 0]
    Lq, Lk, kv_offset, holes, causal, count = row[0, : len(HEADER)].tolist()
    sizes = [count, Lq, Lq, Lk if holes else 0]
    if row.shape[1] != len(HEADER) + sum(sizes):
        raise ValueError(
            f"attention_mask: expected all {len(HEADER) + sum(sizes)} numbers of a mask of attn_implementation='vgpo', "
            f"got {row.shape[1]}: the model cuts its masks itself, so its attention cannot be recorded"
        )
    layers, start, end, usable = row[:, len(HEADER) :].split(sizes, dim=1)
    return KeyIntervals(
        start.contiguous(),
        end.contiguous(),
        usable.bool() if holes else None,
        kv_offset,
        Lk,
        bool(causal),
        tuple(layers[0].tolist()),
    )


def _intervals(blocks: Iterable[Tensor], kv_offset: Any, name: str) -> KeyIntervals:
    """Reduces blocks (B, m, Lk) bool of consecutive queries to their intervals."""
    bounds, counts, seen_by_any = [], [], None
    for visible in blocks:
        Lk = visible.shape[-1]
        position = torch.arange(Lk, dtype=torch.int32, device=visible.device)
        start = torch.where(visible, position, Lk).amin(-1)
        end = torch.where(visible, position + 1, 0).amax(-1)
        bounds.append((start, end))
        counts.append(visible.sum(-1, dtype=torch.int32))
        block_seen = visible.view(torch.uint8).amax(1).bool()  # of bytes: `any` is many times slower on CPUs
        seen_by_any = block_seen if seen_by_any is None else seen_by_any | block_seen
    if seen_by_any is None:
        raise ValueError(f"{name}: expected at least one query")
    start, end = (torch.cat(parts, dim=1) for parts in zip(*bounds, strict=True))
    count = torch.cat(counts, dim=1)  # [B, Lq]
    empty = count == 0
    start, end = start.masked_fill(empty, 0), end.masked_fill(empty, 0)
    # Keys that no query sees are holes of the row, not of a query.
    seen_before = torch.nn.functional.pad(seen_by_any.cumsum(1), (1, 0))  # [B, Lk + 1]
    between = seen_before.gather(1, end.long()) - seen_before.gather(1, start.long())
    broken = between != count
    Lq, Lk = end.shape[1], seen_by_any.shape[1]
    causal_end = torch.arange(Lk - Lq + 1, Lk + 1, device=end.device)
    facts = (broken.any(), (end - start != count).any(), ((start == 0) & (end == causal_end) & ~empty).all())
    is_broken, holes, causal = torch.stack(facts).tolist()
    if is_broken:
        row, query = broken.nonzero()[0].tolist()
        raise ValueError(
            f"the attention mask of {name} is no interval of keys: query {query} of row {row} sees "
            f"{count[row, query].item()} of the {between[row, query].item()} keys from {start[row, query].item()} "
            f"to {end[row, query].item() - 1} that other queries see; attn_implementation='vgpo' cannot take it"
        )
    usable = seen_by_any if holes else None
    return KeyIntervals(start, end, usable, kv_offset, Lk, causal and not holes)
