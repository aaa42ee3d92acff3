"""The budgets of the kernels with a GPU's exponentials, logarithms and divisions."""

import pytest
import torch
from logits_cases import MIXES, LossInputs, assert_gradient, assert_loss, assert_statistics, random_case
from policy_loss_cases import config_id, every_config
from test_linear_logprobs_kernels import case, check
from test_logits_divergence import assert_kl

pytestmark = pytest.mark.usefixtures("gpu_arithmetic")
TOKEN_CONFIGS = [config for config in every_config() if config.importance_sampling_level == "token"]


@pytest.mark.parametrize("config", TOKEN_CONFIGS[::9], ids=config_id)
def test_logits_loss(config):
    logits = random_case((2, 3, 9), torch.float32, "cpu", spread=1.0)
    assert_loss(logits, LossInputs.random(logits), config, torch.empty_like(logits.logits))


@pytest.mark.parametrize(("dtype", "scaling"), MIXES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 23, 64])
def test_statistics_and_gradient_of_logits(vocabulary, dtype, scaling):
    logits = random_case((2, 1, vocabulary), dtype, "cpu")
    assert_statistics(logits, scaling)
    assert_gradient(logits, scaling, torch.empty_like(logits.logits))


@pytest.mark.parametrize(("dtype", "scaling"), MIXES, ids=str)
def test_divergence(dtype, scaling):
    p, q = ((4 * torch.randn(3, 77)).to(dtype) for _ in range(2))
    assert_kl(p, q, scaling)


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.float16, 2.0)])
def test_logprobs_of_hidden_states(dtype, softcap):
    check(case(5, 40, 300, dtype, "cpu", bias=True, temperature=0.7, softcap=softcap))
