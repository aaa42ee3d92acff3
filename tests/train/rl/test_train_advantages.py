"""Advantages of groups, and the groups that updates learn from."""

import pytest
import torch

from vgpo_train.rl.advantages import group_advantages, kept_rows


def _trl(rewards: torch.Tensor, completions: int, *, scale: bool) -> torch.Tensor:
    # TRL 1.16, GRPOTrainer with scale_rewards "group" or "none"; its epsilon is 1e-4, that of VGPO's code 1e-6.
    grouped = rewards.double().view(-1, completions)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-6) if scale else centred).flatten()


@pytest.mark.parametrize("normalize_std", [True, False])
def test_advantages_are_trls(normalize_std: bool) -> None:
    rewards = torch.rand(6 * 5, generator=torch.Generator().manual_seed(0))
    expected = _trl(rewards, 5, scale=normalize_std)
    ids = torch.arange(6).repeat_interleave(5)
    advantages = group_advantages(rewards, ids, normalize_std=normalize_std)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages.double(), expected, atol=1e-6, rtol=0)
    # Neither the order of rows nor the groups' numbers matter.
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    shuffled = group_advantages(rewards[order], 7 - 100 * ids[order], normalize_std=normalize_std)
    torch.testing.assert_close(shuffled, advantages[order], atol=1e-6, rtol=0)


def test_equal_rewards_and_a_group_of_one_have_no_advantage() -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7])
    advantages = group_advantages(rewards, torch.tensor([0, 0, 0, 1]), normalize_std=True)
    assert advantages.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_filters_keep_groups_that_teach() -> None:
    ids = torch.tensor([3, 1, 3, 1, 2, 2])
    rewards = torch.tensor([1.0, 0.5, 1.0, 0.0, 0.0, 0.1])
    accuracies = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])

    def kept(**settings) -> list[bool]:
        return kept_rows(
            rewards, accuracies, ids, **({"filter_equal": True, "filter_accuracy": None} | settings)
        ).tolist()

    assert kept() == [False, True, False, True, True, True]
    assert kept(filter_equal=False) == [True] * 6
    assert kept(filter_accuracy=(0.01, 0.99)) == [False, True, False, True, False, False]
    assert kept(filter_equal=False, filter_accuracy=(-1.0, 0.5)) == [False, False, False, False, True, True]
