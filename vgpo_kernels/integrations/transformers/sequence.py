"""What was recorded of one batch of sequences: the tokens, and what each chosen layer's queries looked at.

sequence = Sequence(wishes, Tokens(find_visual_tokens(model.config), split=False), prompt=None)
sequence.begin(input_ids, attention_mask, past=0)  # before each forward
sequence.observe(layer, q, k, lse, mask, options)  # from each recorded layer
sequence.mass()  # (layers, B, [heads,] tokens, S)
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
from vgpo_kernels.integrations.transformers.segments import SEGMENTS, Tokens, visual_positions


@dataclass(frozen=True)
class Wishes:
    """What a recorder was asked for; see `record_visual_attention`."""

    layers: tuple[int, ...]
    segments: str
    all_heads: bool
    columns: bool
    prompt_length: int | None
    predicting: bool

    @property
    def shift(self) -> int:
        """How far before a token its query stands."""
        return 1 if self.predicting else 0


@dataclass
class Step:
    """One forward: what its queries `first` to `stop` (tokens of the sequence) looked at, (B, [H,] stop - first, S)."""

    first: int
    stop: int
    past: int
    masses: dict[int, Tensor] = field(default_factory=dict)


class Sequence:
    """A batch of sequences from its first token on, through a forward and those that continue its KV cache.

    Args:
        wishes: what to record.
        tokens: none yet.
        prompt: length of the prompt, where it is known from the start.
        sampled: `generate` is sampling the completion.
        prompt_ids: (B, P) the whole prompt, where forwards may bring it in pieces.
        end_tokens: ids that end a completion being sampled.
        described: the model's arguments that describe the batch's pictures.
        samples: how many rows in a row are of the same prompt, whose pictures are described once.
    """

    def __init__(
        self,
        wishes: Wishes,
        tokens: Tokens,
        *,
        prompt: int | None,
        sampled: bool = False,
        prompt_ids: Tensor | None = None,
        end_tokens: tuple[int, ...] = (),
        described: Mapping[str, Any] = MappingProxyType({}),
        samples: int = 1,
    ) -> None:
        self.wishes = wishes
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
        self.visual_positions: Tensor | None = None
        self.caches: WeakSet[Cache] = WeakSet()

    def begin(self, ids: Tensor, attention_mask: Tensor | None, past: int) -> None:
        """Opens a forward of tokens `ids` (B, L) after the first `past` ones."""
        self._truncate(past)
        if self.steps and self.prompt is None:
            self._continue_without_prompt(past)
        self.tokens.append(ids, attention_mask, prompt=self.prompt, sampled=self.sampled)
        total = self.tokens.length
        if self.visual_positions is None and self.wishes.columns:
            self.visual_positions = visual_positions(self.tokens.is_visual(self.prompt_ids_or(ids)))
        first = 0 if self.prompt is None else max(0, self.prompt - self.wishes.shift)
        stop = total
        if self._ends_with_completion(past, total):
            stop -= self.wishes.shift  # the last token produced nothing that is known
        first = min(max(first, past), stop)
        self.steps.append(Step(first, stop, past))

    def holds(self, cache: Any) -> None:
        """Remembers a KV cache, if it is one, that a forward of this sequence took or returned."""
        if isinstance(cache, Cache):
            self.caches.add(cache)

    def held(self, cache: Any) -> bool:
        """Tells whether the KV cache is of this sequence."""
        return cache in self.caches

    def observe(
        self, layer: int, q: Tensor, k: Tensor, lse: Tensor, mask: KeyIntervals, options: dict[str, Any]
    ) -> None:
        """Adds what a layer's queries looked at in the forward that is open."""
        step, total = self.steps[-1], self.tokens.length
        stands_at = total - q.shape[2]  # some models drop all queries but the last ones
        if step.first == step.stop:
            return
        if step.first < stands_at:
            raise ValueError(
                f"layer {layer} ran {q.shape[2]} queries of {total - step.past}, and those dropped are to be recorded"
            )
        asked = {**options, "query_range": (step.first - stands_at, step.stop - stands_at)}
        asked["reduce_heads"] = not self.wishes.all_heads
        segment_ids = self.tokens.segments_of_keys(mask.kv_offset, k.shape[2], k.device)
        count = len(SEGMENTS[self.wishes.segments])
        step.masses[layer] = attention_mass(q, k, lse, segment_ids, count, **asked, **mask.options())
        if self.wishes.columns:
            received = self._received(q, k, lse, mask, asked, stands_at)
            known = self.columns.get(layer)
            self.columns[layer] = received if known is None else known + received

    def mass(self) -> Tensor:
        """Returns (layers, B, [H,] tokens, S) fp32."""
        self._check_completion()
        if self.prompt is None and self.wishes.predicting:
            raise ValueError(
                "queries='predicting': expected a completion, whose tokens queries produce; record inside generate or "
                "give prompt_length"
            )
        return torch.stack([self._mass_of(layer) for layer in self.wishes.layers])

    def received(self) -> Tensor:
        """Returns (layers, B, [H,] n) fp32: what each visual token received."""
        self._check_completion()
        positions = self._visual_positions()
        heads = (self.heads,) if self.wishes.all_heads else ()
        empty = torch.zeros((positions.shape[0], *heads, positions.shape[1]), device=positions.device)
        return torch.stack([self.columns.get(layer, empty).to(empty.device) for layer in self.wishes.layers])

    def prompt_ids_or(self, ids: Tensor) -> Tensor:
        """Returns the whole prompt where it is known, else the tokens of the first forward."""
        return ids if self.prompt_ids is None else self.prompt_ids

    def end_at(self, length: int) -> None:
        """Forgets queries past the first `length` tokens: what was sampled and then refused."""
        self._truncate(length)

    def _check_completion(self) -> None:
        """Raises where `prompt_length` leaves no completion; forwards that continue the prompt may bring it later."""
        if not self.sampled and self.prompt is not None and self.prompt >= self.tokens.length:
            raise ValueError(
                f"prompt_length: expected less than the sequence's {self.tokens.length} tokens, got {self.prompt}"
            )

    def _mass_of(self, layer: int) -> Tensor:
        ids = self.tokens.ids
        if ids is None:
            raise RuntimeError("no token has been seen")
        first = 0 if self.prompt is None else max(0, self.prompt - self.wishes.shift)
        found = []
        for step in self.steps:
            mass = step.masses.get(layer)
            if mass is not None:
                found.append(mass[..., max(0, first - step.first) :, :].to(ids.device))
        if found:
            return torch.cat(found, dim=-2)
        heads = (self.heads,) if self.wishes.all_heads else ()
        return torch.zeros((ids.shape[0], *heads, 0, len(SEGMENTS[self.wishes.segments])), device=ids.device)

    def _received(
        self, q: Tensor, k: Tensor, lse: Tensor, mask: KeyIntervals, asked: dict[str, Any], stands_at: int
    ) -> Tensor:
        """Returns (B, [H,] n) of one layer, from the queries that count."""
        start, stop = asked["query_range"]
        counted = self.tokens.counted(
            start + stands_at,
            stop + stands_at,
            shift=self.wishes.shift if self.prompt is not None else 0,
            end_tokens=self.end_tokens,
            prompt=self.prompt,
        ).to(q.device)
        key_end = mask.key_end.clone()
        key_end[:, start:stop] = torch.where(counted, key_end[:, start:stop], 0)
        at = self._visual_positions().to(q.device)
        if at.shape[1] == 0:
            return q.new_zeros((*(q.shape[:2] if self.wishes.all_heads else q.shape[:1]), 0), dtype=torch.float32)
        keys = at - mask.kv_offset
        keys = keys.masked_fill((at < 0) | (keys < 0) | (keys >= k.shape[2]), -1)
        seen: dict[str, Any] = {"intervals": (mask.key_start, key_end), "key_mask": mask.usable}
        return attention_column_sum(q, k, lse, keys, reduction="sum", **asked, **seen)

    def _visual_positions(self) -> Tensor:
        if self.visual_positions is None:
            raise ValueError("columns: expected a recorder with columns=True, got columns=False")
        return self.visual_positions

    def _ends_with_completion(self, past: int, total: int) -> bool:
        """Tells whether the last token of this forward closes a completion that was sampled before."""
        return past == 0 and not self.sampled and self.prompt is not None and total > self.prompt

    def _continue_without_prompt(self, past: int) -> None:
        """Takes the first forward for the prompt, now that others continue its cache."""
        if self.wishes.columns:
            raise ValueError(
                "prompt_length: expected a number where a KV cache is continued with columns=True, got None"
            )
        self.prompt = past

    def _truncate(self, length: int) -> None:
        if self.wishes.predicting and self.steps and self.steps[-1].stop < min(length, self.tokens.length):
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
                raise ValueError("columns: expected tokens that stay, but some were refused (assisted decoding)")
            stop = max(step.first, length)
            masses = {layer: mass[..., : stop - step.first, :] for layer, mass in step.masses.items()}
            if step.past < length:
                kept.append(Step(step.first, stop, step.past, masses))
        self.steps = kept
        self.tokens.truncate(length)
