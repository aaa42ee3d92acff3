"""What the policy loss refuses, and what it says then."""

import pytest
import torch
from policy_loss_cases import random_inputs

from vgpo_kernels.policy_loss import PolicyLossConfig, policy_loss


def call(**changes):
    options = {name: changes.pop(name) for name in ("config", "num_items_in_batch", "impl") if name in changes}
    inputs = random_inputs([3, 2], 3)
    return policy_loss(**(inputs.__dict__ | changes), **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logps": [1.0]}, TypeError, "logps: expected a tensor, got list"),
        ({"logps": torch.zeros(6)}, ValueError, r"logps: expected shape \(B, T\), got \(6,\)"),
        ({"logps": torch.zeros(2, 3).int()}, TypeError, "logps: expected dtype .*float32.* got int32"),
        ({"logps": torch.zeros(0, 3)}, ValueError, r"logps: expected at least one element, got .*\(0, 3\)"),
        ({"logps": torch.zeros(2, 0)}, ValueError, r"logps: expected at least one element, got .*\(2, 0\)"),
        ({"old_logps": torch.zeros(2, 4)}, ValueError, r"old_logps: expected shape \(2, 3\), got \(2, 4\)"),
        ({"old_logps": torch.zeros(2, 3).long()}, TypeError, "old_logps: expected dtype .* got int64"),
        (
            {"advantages": torch.zeros(3)},
            ValueError,
            r"advantages: expected shape \(2,\) or \(2, 3\), got \(3,\)",
        ),
        (
            {"advantages": torch.zeros(2, 1)},
            ValueError,
            r"advantages: expected shape \(2,\) or \(2, 3\), got \(2, 1\)",
        ),
        (
            {"advantages": torch.tensor(1.0)},
            ValueError,
            r"advantages: expected shape \(2,\) or \(2, 3\), got \(\)",
        ),
        ({"advantages": None}, TypeError, "advantages: expected a tensor, got NoneType"),
        ({"completion_mask": torch.ones(2)}, ValueError, r"completion_mask: expected shape \(2, 3\)"),
        (
            {"completion_mask": torch.ones(2, 3, dtype=torch.complex64)},
            TypeError,
            "completion_mask: expected dtype .* got complex64",
        ),
        (
            {"completion_mask": torch.full((2, 3), 0.5)},
            ValueError,
            "completion_mask: expected 0 or 1, got 0.5 at row 0, position 0",
        ),
        ({"ref_logps": torch.zeros(3, 2)}, ValueError, r"ref_logps: expected shape \(2, 3\)"),
        (
            {"ref_logps": None, "config": PolicyLossConfig(beta=0.1)},
            ValueError,
            "ref_logps: expected a tensor because config.beta is 0.1, got None",
        ),
        ({"token_weights": torch.zeros(2)}, ValueError, r"token_weights: expected shape \(2, 3\), got \(2,\)"),
        (
            {"trajectory_weights": torch.zeros(2, 1)},
            ValueError,
            r"trajectory_weights: expected shape \(2,\), got \(2, 1\)",
        ),
        ({"token_weights": torch.zeros(2, 3, device="meta")}, ValueError, "token_weights: .* on cpu, got .*meta"),
        ({"config": {"beta": 0.1}}, TypeError, "config: expected a PolicyLossConfig, got dict"),
        (
            {"config": PolicyLossConfig("grpo"), "num_items_in_batch": 5},
            ValueError,
            "num_items_in_batch: expected None with loss_type 'grpo', got 5",
        ),
        ({"num_items_in_batch": -1}, ValueError, r"num_items_in_batch: expected a number in \[0.0, .* got -1"),
        ({"num_items_in_batch": "5"}, TypeError, "num_items_in_batch: expected a number, got '5'"),
        (
            {"num_items_in_batch": torch.ones(2)},
            ValueError,
            r"num_items_in_batch: expected shape \(\), got \(2,\)",
        ),
        ({"impl": "cuda"}, ValueError, "impl: expected one of 'triton', 'native', 'reference' or None, got 'cuda'"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_kernels_take_no_float64(device):
    inputs = random_inputs([3, 2], 3).map(lambda x: x.double().to(device))
    inputs = inputs.replace(completion_mask=inputs.completion_mask.to(device))
    with pytest.raises(RuntimeError, match="take no float64: pass impl='reference'"):
        inputs.call(PolicyLossConfig(), impl="triton")


def test_kernels_check_the_mask_when_debugging(monkeypatch, device):
    inputs = random_inputs([3, 2], 3).map(lambda x: x.to(device))
    inputs = inputs.replace(completion_mask=torch.full((2, 3), 2, device=device))
    inputs.call(PolicyLossConfig(), impl="triton")
    monkeypatch.setenv("VGPO_DEBUG", "1")
    with pytest.raises(ValueError, match="completion_mask: expected 0 or 1, got 2 at row 0, position 0"):
        inputs.call(PolicyLossConfig(), impl="triton")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"loss_type": "ppo"}, ValueError, "loss_type: expected one of 'grpo', .* got 'ppo'"),
        (
            {"importance_sampling_level": "word"},
            ValueError,
            "importance_sampling_level: expected one of 'token', 'sequence', got 'word'",
        ),
        ({"epsilon_low": 1.5}, ValueError, r"epsilon_low: expected a number in \[0.0, 1.0\], got 1.5"),
        ({"epsilon_high": -0.1}, ValueError, "epsilon_high: expected a number in .* got -0.1"),
        ({"epsilon_high": "0.2"}, TypeError, "epsilon_high: expected a number, got '0.2'"),
        ({"delta": 1.0}, ValueError, "delta: expected a number in .1.0, .* got 1.0"),
        ({"clip_ratio_dual": 0.5}, ValueError, "clip_ratio_dual: expected a number in .* got 0.5"),
        ({"beta": float("nan")}, ValueError, "beta: expected a number in .* got nan"),
        ({"kl_limit": 0.0}, ValueError, "kl_limit: expected a number in .* got 0.0"),
        ({"kl_limit": 1e39}, ValueError, r"kl_limit: expected a number in \(0.0, 3.4.*e\+38\], got 1e\+39"),
        (
            {"kl_importance_weighted": 1},
            TypeError,
            "kl_importance_weighted: expected True or False, got 1",
        ),
        ({"kl_log_ratio_limit": -1.0}, ValueError, "kl_log_ratio_limit: expected a number in .* got -1.0"),
        (
            {"loss_type": "dr_grpo"},
            ValueError,
            "max_completion_length: expected an int with loss_type 'dr_grpo', got None",
        ),
        ({"max_completion_length": 0}, ValueError, "max_completion_length: expected an int of at least 1, got 0"),
        ({"max_completion_length": 2.5}, TypeError, "max_completion_length: expected an int, got 2.5"),
        (
            {"loss_type": "cispo"},
            ValueError,
            "epsilon_high: with loss_type 'cispo' it is the largest ratio itself, .* got 0.2",
        ),
        (
            {"loss_type": "cispo", "epsilon_high": 5.0, "delta": 2.0},
            ValueError,
            "delta: expected None with loss_type 'cispo', got 2.0",
        ),
        (
            {"loss_type": "cispo", "epsilon_high": 5.0, "clip_ratio_dual": 3.0},
            ValueError,
            "clip_ratio_dual: expected None with loss_type 'cispo', got 3.0",
        ),
    ],
)
def test_bad_config(fields, error, message):
    with pytest.raises(error, match=message):
        PolicyLossConfig(**fields)


def test_replace_checks_again():
    with pytest.raises(ValueError, match="beta: expected a number"):
        PolicyLossConfig.official().replace(beta=-1.0)
    with pytest.raises(ValueError, match="beta: expected a number"):
        PolicyLossConfig.official(beta=-1.0)
    assert PolicyLossConfig.official(loss_type="grpo") == PolicyLossConfig.official().replace(loss_type="grpo")


@pytest.mark.parametrize("change", [PolicyLossConfig().replace, PolicyLossConfig.official])
def test_an_unknown_field_is_refused_with_the_nearest_known_one(change):
    with pytest.raises(ValueError, match="unknown field 'epsilon': the nearest known one is 'epsilon_low'"):
        change(epsilon=1)
    with pytest.raises(ValueError, match="unknown field 'kl_limits': the nearest known one is 'kl_limit'"):
        change(kl_limits=1)


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        PolicyLossConfig().beta = 0.1
