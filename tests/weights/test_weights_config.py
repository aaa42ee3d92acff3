"""The config: recipes, one check per field, and errors that name what is wrong."""

import dataclasses

import pytest

from vgpo_kernels import VGPOConfig


def test_the_recipes_are_those_of_the_design():
    paper, official, balanced = VGPOConfig.paper(), VGPOConfig.official(), VGPOConfig.balanced()
    assert paper == VGPOConfig()
    for config in (paper, official, balanced):
        assert (config.beta, config.gamma, config.kappa, config.schedule) == (0.3, 0.5, 0.2, "linear")
        assert config.compensation
        assert config.gate
        assert config.intra
        assert config.inter
    assert (paper.token_clamp, paper.trajectory_clamp) == (None, None)
    assert (official.token_clamp, official.trajectory_clamp) == ((0.1, 2.0), (0.9, 2.0))
    assert (balanced.token_clamp, balanced.trajectory_clamp) == ((0.1, 2.0), (0.5, 2.0))
    assert [c.trajectory_score for c in (paper, official, balanced)] == ["sum", "normalized_sum", "mean"]
    assert [c.preserve_mean for c in (paper, official, balanced)] == [False, False, True]
    assert [c.position for c in (paper, official, balanced)] == ["one_based", "zero_based", "one_based"]


def test_a_config_is_frozen_and_replaced():
    config = VGPOConfig.balanced()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 1.0
    changed = config.replace(beta=0.7, token_clamp=[0.5, 1.5])
    assert (changed.beta, changed.token_clamp, config.beta) == (0.7, (0.5, 1.5), 0.3)
    assert VGPOConfig.from_recipe("balanced", beta=0.7, token_clamp=(0.5, 1.5)) == changed
    assert VGPOConfig.balanced(beta=0.7, token_clamp=(0.5, 1.5)) == changed


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"beta": -0.1}, ValueError, r"beta: expected a number in \[0, inf\), got -0.1"),
        ({"beta": float("nan")}, ValueError, "beta: .*got nan"),
        ({"gamma": 1.5}, ValueError, r"gamma: expected a number in \[0, 1\], got 1.5"),
        ({"kappa": -0.2}, ValueError, r"kappa: expected a number in \[0, 1\], got -0.2"),
        ({"kappa": 1.2}, ValueError, r"kappa: expected a number in \[0, 1\], got 1.2"),
        ({"kappa": "0.2"}, TypeError, "kappa: expected a number, got '0.2'"),
        ({"schedule": "cosine"}, ValueError, "schedule: expected one of 'linear', .*got 'cosine'"),
        ({"exponent": 0}, ValueError, r"exponent: expected a number in \(0, inf\), got 0"),
        ({"step_position": 2}, ValueError, "step_position: .*got 2"),
        ({"negative_strength": -1}, ValueError, "negative_strength: .*got -1"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps: .*got -1"),
        ({"warmup_steps": 2.5}, TypeError, "warmup_steps: expected an int, got 2.5"),
        ({"trajectory_score": "max"}, ValueError, "trajectory_score: expected one of .*got 'max'"),
        ({"focus_scale": "rank"}, ValueError, "focus_scale: expected one of .*got 'rank'"),
        ({"position": "two_based"}, ValueError, "position: expected one of .*got 'two_based'"),
        ({"tail_rounding": "up"}, ValueError, "tail_rounding: expected one of .*got 'up'"),
        ({"grouping": "none"}, ValueError, "grouping: expected one of .*got 'none'"),
        ({"corners": "round"}, ValueError, "corners: expected one of .*got 'round'"),
        ({"gate": 1}, TypeError, "gate: expected True or False, got 1"),
        ({"token_clamp": (1.1, 2.0)}, ValueError, r"token_clamp: expected low <= 1 <= high, got \(1.1, 2.0\)"),
        ({"trajectory_clamp": (0.5, 0.9)}, ValueError, "trajectory_clamp: expected low <= 1 <= high"),
        ({"token_clamp": 0.5}, TypeError, r"token_clamp: expected \(low, high\) or None, got 0.5"),
        ({"token_clamp": (0.1, float("inf"))}, ValueError, "token_clamp: expected a number"),
    ],
)
def test_every_field_is_checked(fields, error, message):
    with pytest.raises(error, match=message):
        VGPOConfig(**fields)


def test_unknown_names_are_refused_with_the_nearest_known_one():
    with pytest.raises(ValueError, match="unknown recipe 'balancd': the nearest known one is 'balanced'"):
        VGPOConfig.from_recipe("balancd")
    with pytest.raises(ValueError, match="unknown recipe 'xyz': known ones are paper, official, balanced"):
        VGPOConfig.from_recipe("xyz")
    with pytest.raises(ValueError, match="unknown field 'kapa': the nearest known one is 'kappa'"):
        VGPOConfig.from_recipe("paper", kapa=0.1)
    for change in (VGPOConfig.paper, VGPOConfig.official, VGPOConfig.balanced, VGPOConfig.paper().replace):
        with pytest.raises(ValueError, match="unknown field 'kapa': the nearest known one is 'kappa'"):
            change(kapa=1)
    with pytest.raises(ValueError, match="unknown field 'token_clip': the nearest known one is 'token_clamp'"):
        VGPOConfig.paper().replace(token_clip=None)


@pytest.mark.parametrize(
    ("gamma", "count", "exact", "float64"),
    [
        (0.5, 5, 2, 2),  # 2.5 tokens before the tail: an odd row has the longer half in it
        (0.71, 100, 29, 28),  # 100 * 0.29 is below 29 in float64
        (0.9, 10, 1, 1),  # 1 - 0.9 is below 0.1 in float64
        (0.0, 7, 7, 7),  # no tail
        (1.0, 7, 0, 0),  # all of it
    ],
)
def test_the_tail_starts_where_decimals_say(gamma, count, exact, float64):
    assert int(count * VGPOConfig(gamma=gamma).tail_start) == exact
    assert int(count * VGPOConfig(gamma=gamma, tail_rounding="float64").tail_start) == float64
