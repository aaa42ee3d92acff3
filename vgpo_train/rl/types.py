"""What passes between the phases of a step. Shapes: B rows, one a completion, padded to T tokens."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_train.data import PromptBatch

SEGMENTS = ("image", "query", "generated")  # what attention goes to: pictures, the rest of the prompt, the completion


class Completions(NamedTuple):
    """Sampled tokens, right-padded; the mask includes the end-of-sequence token."""

    ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool


@dataclass(frozen=True)
class Batch:
    """Rows of this rank, those of a step or of one forward, with what the loss takes of them; a factor of None is 1."""

    prompts: PromptBatch
    completions: Completions
    advantages: Tensor | None = None  # (B,) fp32
    old_logps: Tensor | None = None  # (B, T) fp32
    ref_logps: Tensor | None = None  # (B, T) fp32
    token_weights: Tensor | None = None  # (B, T) fp32
    trajectory_weights: Tensor | None = None  # (B,) fp32

    def take(self, rows: list[int], dummy: PromptBatch) -> "Batch":
        """Returns the rows of one forward: trimmed to their longest completion, and never without a picture.

        Args:
            rows: which; may be empty.
            dummy: a prompt with a picture, appended if none of the rows has one; its tokens are masked, its values 0.
        """
        length = max(1, int(self.completions.mask[rows].sum(1).max())) if rows else 1
        prompts = self.prompts.take(rows).with_picture(dummy)
        appended = len(prompts) - len(rows)

        def part(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            taken = values[rows] if values.dim() == 1 else values[rows, :length]
            return torch.cat([taken, taken.new_zeros(appended, *taken.shape[1:])])

        return Batch(
            prompts,
            Completions(part(self.completions.ids), part(self.completions.mask)),
            part(self.advantages),
            part(self.old_logps),
            part(self.ref_logps),
            part(self.token_weights),
            part(self.trajectory_weights),
        )


@dataclass
class Scores:
    """What the scoring pass found for rows of this rank."""

    old_logps: Tensor  # (B, T) fp32
    entropy: Tensor  # (B, T) fp32, of the distributions that the tokens were drawn from
    ref_logps: Tensor | None  # (B, T) fp32
    focus_similarity: Tensor | None  # (B, T) fp32
    attention: Tensor | None  # (B, T, 3) fp32: mass on the tokens of SEGMENTS
    has_visual: Tensor  # (B,) bool

    def put(self, rows: list[int], part: "Scores") -> None:
        """Writes the scores of one forward, whose first rows are `rows`, to their places."""
        for name in ("old_logps", "entropy", "ref_logps", "focus_similarity", "attention"):
            whole, values = getattr(self, name), getattr(part, name)
            if whole is not None and values is not None:
                whole[rows, : values.shape[1]] = values[: len(rows)]
        self.has_visual[rows] = part.has_visual[: len(rows)]


@dataclass(frozen=True)
class ScoredRollout:
    """The rows of all ranks, groups side by side, in the same order on every rank.

    What was not scored is None; `attention` also if the policy's attention cannot be recorded.
    """

    group_ids: Tensor  # (B,) int64: which prompt a row answers
    completion_mask: Tensor  # (B, T) bool
    advantages: Tensor  # (B,) fp32
    old_logps: Tensor  # (B, T) fp32
    rewards: Tensor  # (B,) fp32
    accuracies: Tensor  # (B,) fp32: the reward that counts as being right
    focus: Tensor | None = None  # (B, T) fp32: the one that focus.source names
    focus_similarity: Tensor | None = None  # (B, T) fp32: cosine to the mean visual state
    attention: Tensor | None = None  # (B, T, 3) fp32: mass on each of SEGMENTS; the first is a focus
    has_visual: Tensor | None = None  # (B,) bool
    entropy: Tensor | None = None  # (B, T) fp32: of the distributions that the tokens were drawn from


@dataclass(frozen=True)
class Weighting:
    """Factors on the advantages of a `ScoredRollout`; None means 1."""

    token_weights: Tensor | None = None  # (B, T) fp32
    trajectory_weights: Tensor | None = None  # (B,) fp32
    metrics: dict[str, float] = field(default_factory=dict)
