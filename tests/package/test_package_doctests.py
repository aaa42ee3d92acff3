"""The examples in the docstrings of the public functions and configs give what they say."""

import doctest
import importlib

import pytest

MODULES = (
    "vgpo_kernels.attention.api",
    "vgpo_kernels.attention.with_lse",
    "vgpo_kernels.integrations.transformers.api",
    "vgpo_kernels.integrations.transformers.pictures",
    "vgpo_kernels.integrations.transformers.visual_tokens",
    "vgpo_kernels.focus.api",
    "vgpo_kernels.weights.api",
    "vgpo_kernels.weights.config",
    "vgpo_kernels.policy_loss.api",
    "vgpo_kernels.policy_loss.config",
    "vgpo_kernels.vocabulary.hidden_api",
    "vgpo_kernels.vocabulary.logits_api",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0
