"""Algorithms give the trainer exactly the factors that their configuration asks for."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from vgpo_kernels import VGPOConfig, vgpo_weights
from vgpo_train.config import ConfigError, FocusConfig, TrainConfig
from vgpo_train.rl.algorithms import GRPO, VGPO, ScoredRollout, Weighting, build_algorithm, register

STEP = 1
# Fields whose effect needs the step and the signs of the advantages.
CHANGES = {"beta": 0.7, "kappa": 0.5, "warmup_steps": 4, "negative_strength": 0.25, "token_clamp": [0.2, 1.75]}
RECIPES = ("paper", "official", "balanced")


@pytest.fixture
def rollout() -> ScoredRollout:
    """Three groups, interleaved; ragged rows, one of them without a picture and one of a single token."""
    generator = torch.Generator().manual_seed(0)
    rows, tokens = 8, 11  # odd: no tile and no vector divides it
    lengths = torch.tensor([11, 4, 7, 1, 9, 6, 11, 3])
    return ScoredRollout(
        # Two neighbours share a group: what `official` counts as one.
        group_ids=torch.tensor([5, 2, 2, 5, 9, 5, 9, 2]),
        completion_mask=torch.arange(tokens) < lengths[:, None],
        advantages=torch.tensor([1.0, -0.5, 0.75, -1.0, 1.0, -0.25, -0.75, 0.0]),
        old_logps=-torch.rand(rows, tokens, generator=generator),
        rewards=torch.rand(rows, generator=generator),
        accuracies=torch.rand(rows, generator=generator).round(),
        focus=torch.rand(rows, tokens, generator=generator),  # both a cosine and a mass can be in [0, 1]
        has_visual=torch.arange(rows) != 4,
    )


def _config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"algorithm": "vgpo", "recipe": "paper", "vgpo": CHANGES} | options)


def _expected(rollout: ScoredRollout, *, recipe: str = "paper", source: str = "similarity", step: int = STEP) -> Any:
    return vgpo_weights(
        rollout.focus,
        rollout.completion_mask,
        rollout.group_ids,
        VGPOConfig.from_recipe(recipe, **CHANGES),
        source=source,
        has_visual=rollout.has_visual,
        step=step,
        advantages=rollout.advantages,
    )


@pytest.mark.parametrize("source", ["similarity", "attention"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_vgpo_gives_the_weights_of_its_recipe(rollout: ScoredRollout, recipe: str, source: str) -> None:
    weighting = build_algorithm(_config(recipe=recipe, focus=FocusConfig(source=source))).weigh(rollout, STEP)
    expected = _expected(rollout, recipe=recipe, source=source)
    assert torch.equal(weighting.token_weights, expected.token_weights)
    assert torch.equal(weighting.trajectory_weights, expected.trajectory_weights)
    for factors in (weighting.token_weights, weighting.trajectory_weights):
        assert (factors - 1).abs().max() > 0.01, "a weighting of ones is none"


def test_vgpo_tells_recipes_and_overrides_apart(rollout: ScoredRollout) -> None:
    always = {key: CHANGES[key] for key in ("warmup_steps", "negative_strength")}
    configs = [_config(recipe=recipe) for recipe in RECIPES] + [_config(vgpo=always)]
    found = [build_algorithm(config).weigh(rollout, STEP) for config in configs]
    for i, first in enumerate(found):
        for second in found[i + 1 :]:
            assert not torch.equal(first.trajectory_weights, second.trajectory_weights)


def test_vgpo_grows_with_the_step(rollout: ScoredRollout) -> None:
    algorithm = build_algorithm(_config())
    for step in (0, 3, 100):
        weighting, expected = algorithm.weigh(rollout, step), _expected(rollout, step=step)
        assert torch.equal(weighting.token_weights, expected.token_weights)
        assert torch.equal(weighting.trajectory_weights, expected.trajectory_weights)
    assert (algorithm.weigh(rollout, 0).token_weights == 1).all()


def test_vgpo_leaves_a_row_without_a_picture_as_it_is(rollout: ScoredRollout) -> None:
    algorithm = build_algorithm(_config())
    weighting = algorithm.weigh(rollout, STEP)
    assert (weighting.token_weights[4] == 1).all()
    assert weighting.trajectory_weights[4] == 1
    seen = algorithm.weigh(replace(rollout, has_visual=torch.ones_like(rollout.has_visual)), STEP)
    assert (seen.token_weights[4] != 1).any()


def test_vgpo_counts_the_gated_share_of_the_tokens(rollout: ScoredRollout) -> None:
    gate = _expected(rollout).gate
    share = float((gate & rollout.completion_mask).sum() / rollout.completion_mask.sum())
    assert 0 < share < 1
    assert build_algorithm(_config()).weigh(rollout, STEP).metrics == {"gate_fraction": pytest.approx(share)}


def test_grpo_gives_no_factors(rollout: ScoredRollout) -> None:
    algorithm = build_algorithm(_config(algorithm="grpo"))
    assert algorithm.weigh(rollout, STEP) == Weighting(token_weights=None, trajectory_weights=None)


def test_vgpo_alone_wants_focus() -> None:
    assert VGPO.wants == {"focus"}
    assert GRPO.wants == set()


def test_an_algorithm_that_wants_an_unknown_score_is_refused() -> None:
    @register("wants_entropy")
    class WantsEntropy(GRPO):
        wants = frozenset({"focus", "entropy"})

    with pytest.raises(ConfigError, match=r"wants.*entropy"):
        build_algorithm(_config(algorithm="wants_entropy"))
