"""Advantages of groups, and the groups that updates learn from."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_ids: Tensor, *, normalize_std: bool) -> Tensor:
    """Returns (B,) fp32 rewards less their group's mean, divided by its standard deviation with `normalize_std`.

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
