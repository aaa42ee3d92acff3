"""Says of every token of a sequence, as it grows, which segment it is in and whether it counts.

tokens = Tokens(find_visual_tokens(model.config), split=True)
tokens.append(input_ids, attention_mask, prompt=prompt_length)
tokens.segments_of_keys(kv_offset, Lk)  # (B, Lk) int32
tokens.visual_positions()  # (B, n) int64, -1 padded
"""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels.integrations.transformers.visual_tokens import VisualTokens, among

SEGMENTS = {"visual": ("visual",), "image/query/generated": ("image", "query", "generated")}


class Tokens:
    """The token ids that a model has been given so far, one row a sequence.

    Args:
        visual: ids that stand for pieces of pictures and videos.
        split: tell image, query and generated tokens apart; else only visual ones and others.
    """

    def __init__(self, visual: VisualTokens, *, split: bool) -> None:
        self.visual = visual
        self.split = split
        self.ids: Tensor | None = None  # (B, T)
        self.segments: Tensor | None = None  # (B, T) int32
        self.real: Tensor | None = None  # (B, T) bool, False for padding

    @property
    def length(self) -> int:
        """T, tokens so far."""
        return 0 if self.ids is None else self.ids.shape[1]

    @property
    def rows(self) -> int:
        """B, or 0 before the first token."""
        return 0 if self.ids is None else self.ids.shape[0]

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        if self.ids is not None and self.segments is not None and self.real is not None and length < self.length:
            self.ids, self.segments, self.real = (x[:, :length] for x in (self.ids, self.segments, self.real))

    def append(self, ids: Tensor, attention_mask: Tensor | None, *, prompt: int | None, sampled: bool) -> None:
        """Takes the next tokens.

        Args:
            ids: (B, L).
            attention_mask: (B, T + L), 0 for padding; None where all are real.
            prompt: how many tokens come before the completion; None where there is none.
            sampled: the completion was sampled in this very process, so that no picture stands in it.
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
        new = (ids, segments.masked_fill(~real, -1), real)
        if self.ids is None or self.segments is None or self.real is None:
            self.ids, self.segments, self.real = new
        else:
            known = (self.ids, self.segments, self.real)
            self.ids, self.segments, self.real = (torch.cat(pair, dim=1) for pair in zip(known, new, strict=True))

    def is_visual(self, ids: Tensor) -> Tensor:
        """Returns which ids stand for pieces of pictures or videos."""
        return among(ids, self.visual.all)

    def is_image(self, ids: Tensor) -> Tensor:
        """Returns which ids stand for pieces of pictures."""
        return among(ids, self.visual.image)

    def segments_of_keys(self, kv_offset: Any, kv_length: int, device: torch.device) -> Tensor:
        """Returns (B, Lk) int32: the segment of each key, -1 for those in none.

        Args:
            kv_offset: token that the first key stands at, an int or a tensor of one element.
            kv_length: Lk; a cache may have room for more tokens than there are.
            device: where the keys are.
        """
        if self.segments is None:
            raise RuntimeError("no token has been seen")
        position = torch.arange(kv_length, device=device) + kv_offset
        segments = self.segments.to(device)[:, position.clamp(max=self.length - 1)]
        return segments.masked_fill(position >= self.length, -1)

    def counted(self, first: int, stop: int, *, shift: int, end_tokens: tuple[int, ...], prompt: int | None) -> Tensor:
        """Returns (B, stop - first) bool: which queries stand for a real token.

        Args:
            first, stop: tokens that the queries stand at.
            shift: 0 where a query stands for its own token, 1 where for the next.
            end_tokens: ids that end a completion being sampled; queries from there on stand for nothing.
            prompt: how many tokens come before the completion.
        """
        if self.real is None or self.ids is None:
            raise RuntimeError("no token has been seen")
        known = self.real[:, first + shift : stop + shift]
        missing = known.new_ones((known.shape[0], stop - first - known.shape[1]))  # not sampled yet
        counted = torch.cat([known, missing], dim=1)
        if end_tokens and prompt is not None:
            ended = among(self.ids[:, prompt:stop], frozenset(end_tokens)).cumsum(1) > 0
            before = ended.new_zeros((ended.shape[0], max(0, min(stop, prompt) - first)))
            counted = counted & ~torch.cat([before, ended], dim=1)[:, -counted.shape[1] :]
        return counted


def visual_positions(visual: Tensor) -> Tensor:
    """Returns (B, n) int64: where (B, T) bool `visual` is True, in order, then -1; n is the most in a row."""
    count = int(visual.sum(1).max()) if visual.numel() else 0
    order = visual.byte().argsort(dim=1, descending=True, stable=True)[:, :count]
    return order.masked_fill(~visual.gather(1, order), -1)
