"""What a step reports of its rollout, its weights and its updates."""

import math

import pytest
import torch

from vgpo_train.config import TrainConfig
from vgpo_train.rl.algorithms import GRPO
from vgpo_train.rl.types import ScoredRollout, Weighting
from vgpo_train.run.metrics import (
    attention_metrics,
    completion_tenths,
    correlation,
    focus_metrics,
    merge_updates,
    rollout_metrics,
    weight_metrics,
)


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
