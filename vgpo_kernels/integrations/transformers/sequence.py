"""What was recorded of one batch of sequences: the tokens, and the attention of each recorded layer's queries.

record = SequenceRecord(options, Tokens(input_ids, find_visual_tokens(model.config), split=False), prompt=None)
record.begin(input_ids, attention_mask, past=0)  # before each forward
record.observe(layer, q, k, lse, mask, options)  # from each recorded layer
record.mass()  # (layers, B, [heads,] tokens, S)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import Cache

from vgpo_kernels.attention import attention_column_sum, attention_mass
from vgpo_kernels.integrations.transformers.mask_intervals import KeyIntervals
from vgpo_kernels.integrations.transformers.visual_tokens import VisualTokens, among

SEGMENTS = {"visual": ("visual",), "image/query/generated": ("image", "query", "generated")}


@dataclass(frozen=True)
class RecordingOptions:
    """The arguments of `record_visual_attention`."""

    layers: tuple[int, ...]
    segments: str
    all_heads: bool
    columns: bool
    prompt_length: int | None
    predicting: bool

    @property
    def shift(self) -> int:
        """How many positions before its token a query is."""
        return 1 if self.predicting else 0


class Tokens:
    """The tokens that a model has been given so far, one row a sequence, and the segment of each.

    Args:
        like: (B, L) token ids of the first forward; only B, dtype and device are taken.
        visual: ids that stand for pieces of images and videos.
        split: tell image, query and generated tokens apart; else only visual ones and others.
    """

    def __init__(self, like: Tensor, visual: VisualTokens, *, split: bool) -> None:
        self.visual = visual
        self.split = split
        self.ids = like[:, :0]  # (B, T)
        self.segments = self.ids.int()  # (B, T), -1 for tokens in none
        self.real = self.ids.bool()  # (B, T), False for padding

    @property
    def length(self) -> int:
        """T, tokens so far."""
        return self.ids.shape[1]

    @property
    def rows(self) -> int:
        """B."""
        return self.ids.shape[0]

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        self.ids, self.segments, self.real = (x[:, :length] for x in (self.ids, self.segments, self.real))

    def append(self, ids: Tensor, attention_mask: Tensor | None, *, prompt: int | None, sampled: bool) -> None:
        """Adds the next tokens.

        Args:
            ids: (B, L).
            attention_mask: (B, T + L), 0 for padding; None if all are real.
            prompt: length of the prompt; None if there is no completion.
            sampled: the completion is being sampled, so that no visual token in it is an image.
        """
        past, total = self.length, self.length + ids.shape[1]
        position = torch.arange(past, total, device=ids.device)
        in_completion = position >= (total if prompt is None else prompt)
        visual = self.is_visual(ids)
        if sampled:
            visual = visual & ~in_completion
        others = torch.where(in_completion, 2, 1) if self.split else torch.full_like(position, -1)
        segments = torch.where(visual, 0, others).int()
        real = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None and attention_mask.shape[1] >= total:
            real = attention_mask[:, past:total].to(ids.device) != 0
        self.ids = torch.cat([self.ids, ids], dim=1)
        self.segments = torch.cat([self.segments, segments.masked_fill(~real, -1)], dim=1)
        self.real = torch.cat([self.real, real], dim=1)

    def is_visual(self, ids: Tensor) -> Tensor:
        """Returns which ids stand for pieces of images or videos."""
        return among(ids, self.visual.all)

    def is_image(self, ids: Tensor) -> Tensor:
        """Returns which ids stand for pieces of images."""
        return among(ids, self.visual.image)

    def segments_of_keys(self, kv_offset: Any, kv_length: int, device: torch.device) -> Tensor:
        """Returns (B, Lk) int32: the segment of each key, -1 for those in none.

        Args:
            kv_offset: position of the first key, an int or a tensor of one element.
            kv_length: Lk; a cache may have space for more tokens than there are.
            device: of the keys.
        """
        position = torch.arange(kv_length, device=device) + kv_offset
        segments = self.segments.to(device)[:, position.clamp(max=self.length - 1)]
        return segments.masked_fill(position >= self.length, -1)

    def counted(self, first: int, stop: int, *, shift: int, end_tokens: tuple[int, ...], prompt: int | None) -> Tensor:
        """Returns (B, stop - first) bool: which queries stand for a real token.

        Args:
            first, stop: positions of the queries.
            shift: 0 if a query stands for its own token, 1 if for the next.
            end_tokens: ids that end a completion being sampled; queries from there on stand for nothing.
            prompt: length of the prompt; None if there is no completion.
        """
        known = self.real[:, first + shift : stop + shift]
        missing = known.new_ones((known.shape[0], stop - first - known.shape[1]))  # not sampled yet
        counted = torch.cat([known, missing], dim=1)
        if end_tokens and prompt is not None:
            ended = among(self.ids[:, prompt:stop], end_tokens).cumsum(1) > 0
            before = ended.new_zeros((ended.shape[0], max(0, min(stop, prompt) - first)))
            counted = counted & ~torch.cat([before, ended], dim=1)[:, -counted.shape[1] :]
        return counted


@dataclass
class Step:
    """One forward: the masses (B, [H,] stop - first, S) of its queries at positions `first` to `stop`, by layer."""

    first: int
    stop: int
    past: int
    masses: dict[int, Tensor] = field(default_factory=dict)


class SequenceRecord:
    """A batch of sequences from its first token on, through a forward and those that continue its KV cache.

    Args:
        options: what to record.
        tokens: none yet, or those of a cache that `generate` begins with.
        prompt: length of the prompt, if it is known from the start.
        sampled: `generate` is sampling the completion.
        prompt_ids: (B, P) the whole prompt, if forwards may bring it in pieces.
        end_tokens: ids that end a completion being sampled.
        described: the model's arguments that describe the batch's images.
        samples: how many consecutive rows are of the same prompt, whose images are described once.
    """

    def __init__(
        self,
        options: RecordingOptions,
        tokens: Tokens,
        *,
        prompt: int | None,
        sampled: bool = False,
        prompt_ids: Tensor | None = None,
        end_tokens: tuple[int, ...] = (),
        described: Mapping[str, Any] = MappingProxyType({}),
        samples: int = 1,
    ) -> None:
        self.options = options
        self.tokens = tokens
        self.prompt = prompt
        self.sampled = sampled
        self.prompt_ids = prompt_ids
        self.end_tokens = end_tokens
        self.described = described
        self.samples = samples
        self.steps: list[Step] = []
        self.heads = 0
        self.columns: dict[int, Tensor] = {}
        self.positions: Tensor | None = None  # (B, n) of the visual tokens, with columns=True
        self.caches: WeakSet[Cache] = WeakSet()

    def begin(self, ids: Tensor, attention_mask: Tensor | None, past: int) -> None:
        """Opens a forward of tokens `ids` (B, L) after the first `past` ones."""
        self._truncate(past)
        if self.steps and self.prompt is None:
            self._continue_without_prompt(past)
        self.tokens.append(ids, attention_mask, prompt=self.prompt, sampled=self.sampled)
        if self.positions is None and self.options.columns:
            self.positions = true_positions(self.tokens.is_visual(self.prompt_ids_or(ids)))
        stop = self.tokens.length
        if past == 0 and not self.sampled and self.prompt is not None and stop > self.prompt:
            stop -= self.options.shift  # the completion is whole: the token that its last query produced is unknown
        first = min(max(self._first_query(), past), stop)
        self.steps.append(Step(first, stop, past))

    def add_cache(self, cache: Any) -> None:
        """Remembers a KV cache, if it is one, that a forward of this sequence took or returned."""
        if isinstance(cache, Cache):
            self.caches.add(cache)

    def has_cache(self, cache: Any) -> bool:
        """Tells whether the KV cache is of this sequence."""
        return cache in self.caches

    def observe(
        self, layer: int, q: Tensor, k: Tensor, lse: Tensor, mask: KeyIntervals, options: dict[str, Any]
    ) -> None:
        """Adds the attention of a layer's queries in the open forward."""
        step = self.steps[-1]
        offset = self.tokens.length - q.shape[2]  # position of query 0: some models drop all queries but the last ones
        if step.first == step.stop:
            return
        if step.first < offset:
            count = self.tokens.length - step.past
            raise ValueError(f"layer {layer} ran {q.shape[2]} queries of {count}, and those dropped are to be recorded")
        options = {**options, "query_range": (step.first - offset, step.stop - offset)}
        options["reduce_heads"] = not self.options.all_heads
        segment_ids = self.tokens.segments_of_keys(mask.kv_offset, k.shape[2], k.device)
        count = len(SEGMENTS[self.options.segments])
        step.masses[layer] = attention_mass(q, k, lse, segment_ids, count, **options, **mask.options())
        if self.options.columns:
            received = self._received(q, k, lse, mask, options, offset)
            known = self.columns.get(layer)
            self.columns[layer] = received if known is None else known + received

    def mass(self) -> Tensor:
        """Returns (layers, B, [H,] tokens, S) fp32."""
        self._check_completion()
        if self.prompt is None and self.options.predicting:
            raise ValueError(
                "queries='predicting': expected a completion, whose tokens queries produce; record inside generate or "
                "give prompt_length"
            )
        return torch.stack([self._mass_of(layer) for layer in self.options.layers])

    def received(self) -> Tensor:
        """Returns (layers, B, [H,] n) fp32: what each visual token received."""
        positions = self.visual_positions()
        empty = torch.zeros((*self._rows_and_heads(), positions.shape[1]), device=positions.device)
        return torch.stack([self.columns.get(layer, empty).to(empty.device) for layer in self.options.layers])

    def visual_positions(self) -> Tensor:
        """Returns (B, n) int64: the position of each visual token, -1 where a row has fewer."""
        self._check_completion()
        if self.positions is None:
            raise ValueError("columns: expected a recorder with columns=True, got columns=False")
        return self.positions

    def prompt_ids_or(self, ids: Tensor) -> Tensor:
        """Returns the whole prompt if it is known, else `ids`."""
        return ids if self.prompt_ids is None else self.prompt_ids

    def end_at(self, length: int) -> None:
        """Forgets queries past the first `length` tokens: what was sampled and then refused."""
        self._truncate(length)

    def _first_query(self) -> int:
        return 0 if self.prompt is None else max(0, self.prompt - self.options.shift)

    def _rows_and_heads(self) -> tuple[int, ...]:
        return (self.tokens.rows, self.heads) if self.options.all_heads else (self.tokens.rows,)

    def _check_completion(self) -> None:
        """Raises if `prompt_length` leaves no completion; forwards that continue the prompt may bring it later."""
        if not self.sampled and self.prompt is not None and self.prompt >= self.tokens.length:
            raise ValueError(
                f"prompt_length: expected less than the sequence's {self.tokens.length} tokens, got {self.prompt}"
            )

    def _mass_of(self, layer: int) -> Tensor:
        device = self.tokens.ids.device
        steps = [step for step in self.steps if layer in step.masses]
        # A first forward without prompt_length recorded every query; of those only the last may be of the completion.
        found = [step.masses[layer][..., max(0, self._first_query() - step.first) :, :].to(device) for step in steps]
        empty = (*self._rows_and_heads(), 0, len(SEGMENTS[self.options.segments]))
        return torch.cat(found, dim=-2) if found else torch.zeros(empty, device=device)

    def _received(
        self, q: Tensor, k: Tensor, lse: Tensor, mask: KeyIntervals, options: dict[str, Any], offset: int
    ) -> Tensor:
        """Returns (B, [H,] n) of one layer, from the queries that count."""
        start, stop = options["query_range"]
        shift = self.options.shift if self.prompt is not None else 0
        counted = self.tokens.counted(
            start + offset, stop + offset, shift=shift, end_tokens=self.end_tokens, prompt=self.prompt
        ).to(q.device)
        key_end = mask.key_end.clone()
        key_end[:, start:stop] = torch.where(counted, key_end[:, start:stop], 0)
        positions: Tensor = self.positions.to(q.device)  # type: ignore[union-attr]
        if positions.shape[1] == 0:
            return q.new_zeros((*self._rows_and_heads(), 0), dtype=torch.float32)
        keys = positions - mask.kv_offset
        keys = keys.masked_fill((positions < 0) | (keys < 0) | (keys >= k.shape[2]), -1)
        visible: dict[str, Any] = {"intervals": (mask.key_start, key_end), "key_mask": mask.usable}
        return attention_column_sum(q, k, lse, keys, reduction="sum", **options, **visible)

    def _continue_without_prompt(self, past: int) -> None:
        """Takes the first forward for the prompt, now that others continue its cache."""
        if self.options.columns:
            raise ValueError(
                "prompt_length: expected a number where a KV cache is continued with columns=True, got None"
            )
        self.prompt = past

    def _truncate(self, length: int) -> None:
        if self.options.predicting and self.steps and self.steps[-1].stop < min(length, self.tokens.length):
            raise ValueError(
                "queries='predicting': expected a first forward of the prompt alone where others continue it, got "
                f"one of {self.tokens.length} tokens after a prompt_length of {self.prompt}"
            )
        kept = []
        for step in self.steps:
            if step.stop <= length:
                kept.append(step)
                continue
            if self.columns and step.first < step.stop:
                raise ValueError(
                    "columns: expected generation without rejected tokens, got assisted decoding: pass columns=False"
                )
            stop = max(step.first, length)
            masses = {layer: mass[..., : stop - step.first, :] for layer, mass in step.masses.items()}
            if step.past < length:
                kept.append(Step(step.first, stop, step.past, masses))
        self.steps = kept
        self.tokens.truncate(length)


def true_positions(mask: Tensor) -> Tensor:
    """Returns (B, n) int64: where (B, T) bool `mask` is True, in order, then -1; n is the most in a row."""
    count = int(mask.sum(1).max()) if mask.numel() else 0
    order = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :count]
    return order.masked_fill(~mask.gather(1, order), -1)
