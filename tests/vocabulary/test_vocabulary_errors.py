"""Bad input to the vocabulary side: each error names the argument, what was expected and what came."""

import pytest
import torch

from vgpo_kernels import (
    PolicyLossConfig,
    linear_logprobs,
    linear_policy_loss,
    linear_visual_dependency,
    logits_policy_loss,
    selective_logprobs,
)

B, T, D, V = 2, 3, 4, 5


def states(**changes):
    given = {
        "hidden": torch.randn(B, T, D),
        "weight": torch.randn(V, D),
        "targets": torch.zeros(B, T, dtype=torch.int64),
    }
    return given | changes


def logits(**changes):
    return {"logits": torch.randn(B, T, V), "targets": torch.zeros(B, T, dtype=torch.int64)} | changes


def by_token(**changes):
    return {
        "old_logps": torch.zeros(B, T),
        "advantages": torch.zeros(B),
        "completion_mask": torch.ones(B, T, dtype=torch.bool),
    } | changes


HEAD = [
    ({"hidden": [1.0]}, TypeError, r"hidden: expected a tensor, got list"),
    ({"hidden": torch.randn(4)}, ValueError, r"hidden: expected shape \(\.\.\., D\) with at least two.*got \(4,\)"),
    ({"hidden": torch.zeros(B, T, D, dtype=torch.int32)}, TypeError, r"hidden: expected dtype float16 or .*got int32"),
    ({"hidden": torch.randn(B, 0, D)}, ValueError, r"hidden: expected at least one element, got shape \(2, 0, 4\)"),
    ({"weight": torch.randn(V, 3)}, ValueError, r"weight: expected shape \(V, 4\), got \(5, 3\)"),
    ({"weight": torch.randn(V, D).half()}, TypeError, r"weight: expected dtype float32, got float16"),
    ({"weight": torch.randn(0, D)}, ValueError, r"weight: expected at least one element"),
    ({"bias": torch.randn(4)}, ValueError, r"bias: expected shape \(5,\), got \(4,\)"),
    ({"bias": torch.randn(V).double()}, TypeError, r"bias: expected dtype float32, got float64"),
    ({"targets": torch.zeros(B, 2, dtype=torch.int64)}, ValueError, r"targets: expected shape \(2, 3\), got \(2, 2\)"),
    ({"targets": torch.zeros(B, T, dtype=torch.int32)}, TypeError, r"targets: expected dtype int64, got int32"),
    ({"temperature": 0.0}, ValueError, r"temperature: expected a number in \(0.0, inf\), got 0.0"),
    ({"temperature": float("nan")}, ValueError, r"temperature: expected a number"),
    ({"temperature": "1"}, TypeError, r"temperature: expected a number, got '1'"),
    ({"softcap": -1.0}, ValueError, r"softcap: expected a number in \(0.0, inf\), got -1.0"),
    ({"impl": "cuda"}, ValueError, r"impl: expected one of .*got 'cuda'"),
]
ids = [next(iter(changes)) for changes, *_ in HEAD]


@pytest.mark.parametrize(("changes", "error", "message"), HEAD, ids=ids)
def test_head(changes, error, message):
    with pytest.raises(error, match=message):
        linear_logprobs(**states(**changes))
    with pytest.raises(error, match=message):
        linear_policy_loss(**states(**changes), **by_token())
    with pytest.raises(error, match=message):
        linear_visual_dependency(**states(**changes), hidden_corrupted=torch.randn(B, T, D))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": 1.0}, TypeError, r"logits: expected a tensor, got float"),
        ({"logits": torch.randn(4)}, ValueError, r"logits: expected shape \(\.\.\., V\)"),
        ({"logits": torch.zeros(B, T, V, dtype=torch.int64)}, TypeError, r"logits: expected dtype .*got int64"),
        ({"logits": torch.randn(B, T, 0)}, ValueError, r"logits: expected at least one element"),
        ({"targets": torch.zeros(B, dtype=torch.int64)}, ValueError, r"targets: expected shape \(2, 3\), got \(2,\)"),
        ({"temperature": -1}, ValueError, r"temperature: expected a number"),
        ({"softcap": 0}, ValueError, r"softcap: expected a number"),
    ],
)
def test_logits(changes, error, message):
    with pytest.raises(error, match=message):
        selective_logprobs(**logits(**changes))
    with pytest.raises(error, match=message):
        logits_policy_loss(**logits(**changes), **by_token())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"completion_mask": torch.ones(B, 2)}, ValueError, r"completion_mask: expected shape \(2, 3\), got \(2, 2\)"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages: expected shape \(2,\) or \(2, \d\), got \(3,\)"),
        ({"old_logps": torch.zeros(B)}, ValueError, r"old_logps: expected shape \(2, 3\), got \(2,\)"),
        ({"token_weights": torch.zeros(B)}, ValueError, r"token_weights: expected shape \(2, 3\), got \(2,\)"),
        (
            {"trajectory_weights": torch.zeros(B, T)},
            ValueError,
            r"trajectory_weights: expected shape \(2,\), got \(2, 3\)",
        ),
        ({"config": "dapo"}, TypeError, r"config: expected a PolicyLossConfig, got str"),
        ({"num_items_in_batch": -1}, ValueError, r"num_items_in_batch: expected a number in \[0.0, inf\), got -1"),
        ({"completion_mask": torch.full((B, T), 2)}, ValueError, r"completion_mask: expected 0 or 1, got 2 at row 0"),
    ],
)
def test_what_the_losses_take(changes, error, message):
    for function, given in ((linear_policy_loss, states()), (logits_policy_loss, logits())):
        with pytest.raises(error, match=message):
            function(**given, **by_token(**changes))


def test_losses_take_three_dimensions():
    with pytest.raises(ValueError, match=r"hidden: expected shape \(B, T, D\), got \(3, 4\)"):
        linear_policy_loss(**states(hidden=torch.randn(T, D), targets=torch.zeros(T, dtype=torch.int64)), **by_token())
    with pytest.raises(ValueError, match=r"logits: expected shape \(B, T, V\), got \(3, 5\)"):
        logits_policy_loss(**logits(logits=torch.randn(T, V)), **by_token())


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("target", [-100, -1, V, 10**12])
def test_a_target_outside_the_vocabulary_is_named_with_its_place(impl, target, device):
    """Also where the kernels run: a stray read would be silent."""
    targets = torch.zeros(B, T, dtype=torch.int64)
    targets[1, 2] = target
    message = rf"targets: expected tokens in \[0, 5\), got {target} at position \(1, 2\)"
    given = [{k: v.to(device) for k, v in x(targets=targets).items()} for x in (states, logits)]
    for function, inputs in ((linear_logprobs, given[0]), (selective_logprobs, given[1])):
        with pytest.raises(ValueError, match=message):
            function(**inputs, impl=impl)
    with pytest.raises(ValueError, match=message):
        linear_visual_dependency(**given[0], hidden_corrupted=given[0]["hidden"], impl=impl)
    beside = {k: v.to(device) for k, v in by_token().items()}
    for function, inputs in ((linear_policy_loss, given[0]), (logits_policy_loss, given[1])):
        with pytest.raises(ValueError, match=message):
            function(**inputs, **beside, impl=impl)
        beside_masked = beside | {"completion_mask": (targets != target).to(device)}
        assert function(**inputs, **beside_masked, impl=impl).loss.isfinite()


def test_masks_of_log_probs():
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 3\), got \(2,\)"):
        linear_logprobs(**states(), mask=torch.ones(2))
    with pytest.raises(ValueError, match=r"mask: expected 0 or 1, got 3 at row 1, position 0"):
        linear_logprobs(**states(), mask=torch.tensor([[1, 1, 1], [3, 1, 1]]))
    with pytest.raises(TypeError, match=r"mask: expected a tensor, got list"):
        selective_logprobs(**logits(), mask=[1])


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (1.5, TypeError, r"memory_budget: expected a number of bytes, an int, got 1.5"),
        (True, TypeError, r"memory_budget: expected a number of bytes, an int, got True"),
        (0, ValueError, r"memory_budget: expected at least 1 byte, got 0"),
        (1000, ValueError, r"memory_budget: expected at least \d+ bytes, for one token, got 1000"),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_memory_budget(budget, error, message, level):
    options = {"memory_budget": budget, "config": PolicyLossConfig("bnpo", level)}
    with pytest.raises(error, match=message):
        linear_policy_loss(**states(), **by_token(), **options)


def test_in_place_needs_logits_that_a_model_made():
    leaf = torch.randn(B, T, V, requires_grad=True)
    with pytest.raises(ValueError, match=r"inplace: expected logits that a model has made, got a leaf tensor"):
        logits_policy_loss(**logits(logits=leaf), **by_token(), inplace=True)
    with pytest.raises(ValueError, match=r"inplace: expected logits with a last stride of 1, got strides"):
        logits_policy_loss(**logits(logits=torch.randn(B, V, T).mT), **by_token(), inplace=True)


def test_dependency():
    with pytest.raises(ValueError, match=r"kind: expected one of 'k3', 'kl', 'logratio', got 'js'"):
        linear_visual_dependency(**states(), hidden_corrupted=torch.randn(B, T, D), kind="js")
    with pytest.raises(ValueError, match=r"hidden_corrupted: expected shape \(2, 3, 4\), got \(2, 3, 5\)"):
        linear_visual_dependency(**states(), hidden_corrupted=torch.randn(B, T, 5))
    with pytest.raises(ValueError, match=r"weight_corrupted: expected shape \(5, 4\), got \(6, 4\)"):
        linear_visual_dependency(**states(), hidden_corrupted=torch.randn(B, T, D), weight_corrupted=torch.randn(6, D))
