"""Advantages, filters, data order and what a rollout reports."""

import math
from types import SimpleNamespace

import pytest
import torch

from vgpo_train.config import ConfigError, OptimConfig, RolloutConfig, TrainConfig
from vgpo_train.preflight import check_divisible, total_steps
from vgpo_train.rl.advantages import group_advantages, kept_rows
from vgpo_train.rl.algorithms import GRPO, ScoredRollout, Weighting
from vgpo_train.run.metrics import (
    attention_metrics,
    completion_tenths,
    correlation,
    focus_metrics,
    merge_updates,
    rollout_metrics,
    weight_metrics,
)
from vgpo_train.trainer import Trainer


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


def _rank(rank: int, world: int = 2, *, prompts: int = 6, update_prompts: int = 3, samples: int = 10):
    return SimpleNamespace(
        config=SimpleNamespace(rollout=SimpleNamespace(prompts=prompts, completions=4), seed=5),
        world=world,
        rank=rank,
        device="cpu",
        updates_per_step=prompts // update_prompts,
        train_data=list(range(samples)),
    )


def test_ranks_share_every_update_equally() -> None:
    # Three prompts of four completions over two ranks: each update's middle group is split between them.
    first, second = (Trainer._own_groups(_rank(rank)).tolist() for rank in (0, 1))
    assert first == [0, 0, 0, 0, 1, 1, 3, 3, 3, 3, 4, 4]
    assert second == [1, 1, 2, 2, 2, 2, 4, 4, 5, 5, 5, 5]


def test_data_order_is_a_function_of_seed_and_step_alone() -> None:
    # Ten samples in steps of six: the second step reaches into the next epoch.
    steps = [Trainer._prompts(_rank(0), step) for step in range(5)]
    assert steps == [Trainer._prompts(_rank(1), step) for step in range(5)]
    order = [sample for step in steps for sample in step]
    for epoch in range(3):
        assert sorted(order[epoch * 10 : epoch * 10 + 10]) == list(range(10)), "each epoch has each sample once"
    assert order[:10] != order[10:20], "epochs differ"
    other = _rank(0)
    other.config.seed = 6
    assert Trainer._prompts(other, 0) != steps[0]


def test_number_of_steps() -> None:
    config = TrainConfig(rollout=RolloutConfig(prompts=8), epochs=2.0)
    assert total_steps(config, 20) == 5
    assert total_steps(config, 1) == 1, "a run has at least one step"
    config.steps = 7
    assert total_steps(config, 20) == 7


def test_rows_that_cannot_be_shared_equally_are_refused() -> None:
    config = TrainConfig(rollout=RolloutConfig(completions=3), optim=OptimConfig(update_prompts=2))
    check_divisible(config, 3)
    with pytest.raises(ConfigError, match=r"expected a multiple of the 4 processes, got 6"):
        check_divisible(config, 4)


def _whole(**changes) -> ScoredRollout:
    fields = {
        "group_ids": torch.tensor([0, 0]),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool(),
        "advantages": torch.tensor([1.0, -1.0]),
        "old_logps": torch.zeros(2, 4),
        "rewards": torch.tensor([2.0, 1.0]),
        "accuracies": torch.tensor([1.0, 0.0]),
    }
    return ScoredRollout(**(fields | changes))


def test_rollout_metrics() -> None:
    metrics = rollout_metrics(_whole(), torch.tensor([True, False]), max_new_tokens=4)
    assert metrics == {
        "reward": 1.5,
        "reward_std": 0.5,
        "accuracy": 0.5,
        "completion_length": 3.0,
        "full_length_fraction": 0.5,
        "kept_fraction": 0.5,
    }


def test_the_entropy_of_a_rollout_is_the_mean_over_its_tokens() -> None:
    entropy = torch.where(_whole().completion_mask, 2.0, 9.0)
    entropy[0, 0] = 4.0
    metrics = rollout_metrics(_whole(entropy=entropy), torch.tensor([True, False]), max_new_tokens=4)
    assert metrics["rollout_entropy"] == pytest.approx(2.0 + 2.0 / 6)  # six tokens


def test_focus_metrics_leave_rows_without_a_picture_out() -> None:
    focus = torch.tensor([[0.4, 0.2, 0.1, 0.1], [9.0, 9.0, 9.0, 9.0]])
    whole = _whole(focus=focus, has_visual=torch.tensor([True, False]))
    metrics = rollout_metrics(whole, torch.tensor([True, True]), max_new_tokens=9)
    assert metrics["focus_mean"] == pytest.approx(0.2)
    assert metrics["focus_late_early_ratio"] == pytest.approx(0.1 / 0.3)


def test_the_later_half_of_an_odd_completion_is_the_longer_one() -> None:
    # Three tokens: the first is early, the other two are late; no NaN for a completion of one token.
    metrics = focus_metrics(torch.tensor([[0.5, 1.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool))
    assert metrics["focus_late_early_ratio"] == pytest.approx(3.0)
    single = focus_metrics(torch.tensor([[0.5]]), torch.ones(1, 1, dtype=torch.bool))
    assert single["focus_mean"] == 0.5
    assert math.isnan(single["focus_late_early_ratio"])


def test_tenths_of_a_completion_are_those_of_its_own_length() -> None:
    # Ten tokens and more fall in every tenth, fewer leave some out; the place counts valid tokens alone.
    lengths = (1, 3, 10, 13)
    mask = torch.arange(13) < torch.tensor(lengths)[:, None]
    expected = [[10 * token // length for token in range(length)] + [-1] * (13 - length) for length in lengths]
    assert completion_tenths(mask).tolist() == expected
    late = torch.tensor([[0, 0, 1, 1, 0, 1]]).bool()
    assert completion_tenths(late).tolist() == [[-1, -1, 0, 3, -1, 6]]
    assert completion_tenths(torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[-1, -1]]


def test_attention_metrics() -> None:
    # Two right rows, a wrong one, and a right one without a picture, of which nothing counts.
    image = torch.tensor([[0.4, 0.2, 0.1, 0.1], [0.6, 0.3, 0.0, 0.0], [0.1, 0.3, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]])
    attention = torch.stack([image, 1 - image, torch.full_like(image, 0.25)], dim=-1)
    whole = _whole(
        group_ids=torch.zeros(4, dtype=torch.long),
        completion_mask=torch.arange(4) < torch.tensor([[4], [2], [2], [4]]),
        rewards=torch.zeros(4),
        accuracies=torch.tensor([1.0, 0.6, 0.5, 1.0]),
        attention=attention,
        has_visual=torch.tensor([True, True, True, False]),
    )
    metrics = rollout_metrics(whole, torch.ones(4).bool(), max_new_tokens=9)
    # The tokens of the first row fall in tenths 0, 2, 5 and 7, those of the others in 0 and 5.
    expected = [1.1 / 3, None, 0.2, None, None, 0.7 / 3, None, 0.1, None, None]
    for name, values in (
        ("attention_image", expected),
        ("attention_query", [value and 1 - value for value in expected]),
        ("attention_generated", [value and 0.25 for value in expected]),
    ):
        found = [None if math.isnan(value) else value for value in metrics[name]]
        assert [value is None for value in found] == [value is None for value in values]
        assert [value or 0 for value in found] == pytest.approx([value or 0 for value in values])
    assert metrics["visual_late_early_ratio"] == pytest.approx((0.8 / 4) / (1.3 / 4))
    assert metrics["visual_late_early_ratio_correct"] == pytest.approx((0.5 / 3) / (1.2 / 3))
    assert metrics["visual_late_early_ratio_incorrect"] == pytest.approx(3.0)


def test_attention_metrics_without_wrong_completions() -> None:
    attention = torch.full((2, 4, 3), 0.5)
    metrics = attention_metrics(attention, torch.ones(2, 4).bool(), torch.tensor([True, True]))
    assert metrics["visual_late_early_ratio_correct"] == metrics["visual_late_early_ratio"] == pytest.approx(1.0)
    assert math.isnan(metrics["visual_late_early_ratio_incorrect"])


def test_focus_metrics_of_text_alone_are_not_a_number() -> None:
    metrics = focus_metrics(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert all(math.isnan(value) for value in metrics.values())


def test_weight_metrics_exist_for_every_algorithm() -> None:
    mask = _whole().completion_mask
    grpo = weight_metrics(GRPO(TrainConfig()).weigh(_whole(), 0), mask)
    assert grpo == {"token_weight_std": 0.0, "trajectory_weight_std": 0.0, "corr_trajectory_weight_length": 0.0}
    tokens = torch.tensor([[1.0, 3.0, 1.0, 3.0], [1.0, 3.0, 99.0, 99.0]])
    weighed = weight_metrics(Weighting(tokens, torch.tensor([0.5, 1.5]), {"own": 4.0}), mask)
    assert weighed == pytest.approx(
        {"token_weight_std": 1.0, "trajectory_weight_std": 0.5, "corr_trajectory_weight_length": -1.0, "own": 4.0}
    )


def test_correlation_is_pearsons() -> None:
    x, y = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    assert correlation(x, y) == pytest.approx(float(torch.corrcoef(torch.stack([x, y]).double())[0, 1]))
    assert correlation(torch.full((50,), 0.1), y) == 0.0


def test_a_steps_updates_are_averaged() -> None:
    merged = merge_updates(
        [
            {"loss": 1.0, "kl": 0.2, "clip_fraction_low": 0.1, "clip_fraction_high": 0.2, "skipped_updates": 1.0},
            {"loss": 3.0, "kl": 0.4, "clip_fraction_low": 0.3, "clip_fraction_high": 0.0, "skipped_updates": 0.0},
        ]
    )
    assert merged == pytest.approx(
        {
            "loss": 2.0,
            "kl": 0.3,
            "clip_fraction": 0.3,
            "clip_fraction_low": 0.2,
            "clip_fraction_high": 0.1,
            "updates": 2,
        }
    )


def test_a_step_without_an_update_says_so() -> None:
    assert merge_updates([]) == {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0, "updates": 0}
