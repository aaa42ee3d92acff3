"""From sampled completions to what an update needs: advantages, scores, weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import visual_focus_score
from vgpo_train import policy
from vgpo_train.model import image_token_mask
from vgpo_train.rollout import Completions


@dataclass
class Scores:
    """What the scoring pass found for a rank's B rows of T completion tokens."""

    old_logps: Tensor  # (B, T) fp32
    ref_logps: Tensor | None  # (B, T) fp32
    focus: Tensor | None  # (B, T) fp32
    has_visual: Tensor  # (B,) bool

    def put(self, rows: list[int], part: "Scores") -> None:
        """Writes the scores of a micro-batch, whose first rows are `rows`, to their places."""
        for whole, values in (
            (self.old_logps, part.old_logps),
            (self.ref_logps, part.ref_logps),
            (self.focus, part.focus),
        ):
            if whole is not None and values is not None:
                whole[rows, : values.shape[1]] = values[: len(rows)]
        self.has_visual[rows] = part.has_visual[: len(rows)]


def group_advantages(rewards: Tensor, group_ids: Tensor, *, normalize_std: bool) -> Tensor:
    """Returns (B,) fp32 rewards less their group's mean, divided by its standard deviation where asked.

    Args:
        rewards: (B,) of whole groups.
        group_ids: (B,) int, which prompt a row answers.
        normalize_std: divide by the group's (unbiased) standard deviation + 1e-6; a group of equal rewards gives 0.
    """
    _, groups, counts = group_ids.unique(return_inverse=True, return_counts=True)
    centred = rewards.double() - group_means(rewards, groups, counts)[groups]
    if normalize_std:
        squares = torch.zeros(len(counts), dtype=torch.float64, device=rewards.device)
        squares.index_add_(0, groups, centred.square())
        std = (squares / (counts - 1).clamp(min=1)).sqrt()
        centred = centred / (std[groups] + 1e-6)
    return centred.float()


def kept_rows(
    rewards: Tensor,
    accuracies: Tensor,
    group_ids: Tensor,
    *,
    filter_equal: bool,
    filter_accuracy: tuple[float, float] | None,
) -> Tensor:
    """Returns (B,) bool: rows of the groups that an update can learn from.

    Args:
        rewards: (B,) total rewards.
        accuracies: (B,) rewards that count as being right.
        group_ids: (B,) int.
        filter_equal: drop groups whose rewards are all equal.
        filter_accuracy: keep groups whose mean accuracy lies strictly between the two.
    """
    _, groups, counts = group_ids.unique(return_inverse=True, return_counts=True)
    kept = torch.ones(len(counts), dtype=torch.bool, device=rewards.device)
    if filter_equal:
        low = rewards.new_full((len(counts),), float("inf")).scatter_reduce(0, groups, rewards, "amin")
        high = rewards.new_full((len(counts),), float("-inf")).scatter_reduce(0, groups, rewards, "amax")
        kept &= low < high
    if filter_accuracy is not None:
        mean = group_means(accuracies, groups, counts)
        kept &= (mean > filter_accuracy[0]) & (mean < filter_accuracy[1])
    return kept[groups]


def group_means(values: Tensor, groups: Tensor, counts: Tensor) -> Tensor:
    """Returns the float64 mean of `values` (B,) in each of the groups 0..len(counts)-1."""
    sums = torch.zeros(len(counts), dtype=torch.float64, device=values.device)
    return sums.index_add_(0, groups, values.double()) / counts


@torch.no_grad()
def score(
    engine: Any,
    reference: Any | None,
    prompts: Mapping[str, Tensor],
    completions: Completions,
    *,
    temperature: float,
    wants_focus: bool,
    per_image: bool,
) -> Scores:
    """Runs the scoring pass over a rank's rows: the log-probabilities that updates start from, and focus.

    Args:
        engine: the policy.
        reference: the frozen model of the KL term, or None without one.
        prompts: left-padded model inputs.
        completions: what was sampled.
        temperature: the rollout's.
        wants_focus: compute the visual focus score.
        per_image: score against each image on its own and take the maximum.
    """
    output = policy.forward(engine, prompts, completions, temperature=temperature, with_hidden_states=wants_focus)
    ref_logps = None
    if reference is not None:
        ref_logps = policy.forward(reference, prompts, completions, temperature=temperature).logps
    prompt_mask = image_token_mask(prompts["input_ids"], engine.module.config)
    focus = None
    if wants_focus:
        focus = _focus(output.hidden_states, prompt_mask, completions.mask, per_image)
    return Scores(output.logps, ref_logps, focus, prompt_mask.any(1))


def _focus(hidden_states: Tensor, prompt_visual: Tensor, mask: Tensor, per_image: bool) -> Tensor:
    visual = torch.cat([prompt_visual, torch.zeros_like(mask)], dim=1)
    completion = torch.cat([torch.zeros_like(prompt_visual), mask], dim=1)
    images = image_ids(visual) if per_image else None
    return visual_focus_score(hidden_states, visual, completion, image_ids=images)[:, prompt_visual.shape[1] :]


def image_ids(visual_mask: Tensor) -> Tensor:
    """Returns (B, L) int64: the number of the run of visual tokens a position is in, -1 outside."""
    before = torch.nn.functional.pad(visual_mask[:, :-1], (1, 0))
    starts = visual_mask & ~before
    return torch.where(visual_mask, starts.long().cumsum(1) - 1, -1)
