"""The operators of the vocabulary side: opcheck, compilation without graph breaks, no recompile a length."""

import inspect

import pytest
import torch
from torch.library import opcheck
from vocabulary_cases import random_case

from vgpo_kernels import (
    PolicyLossConfig,
    linear_logprobs,
    linear_policy_loss,
    linear_visual_dependency,
    logits_policy_loss,
    selective_logprobs,
)
from vgpo_kernels.policy_loss import kernels, reference

IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])
SEQUENCE = PolicyLossConfig("grpo", "sequence", beta=0.1, clip_ratio_dual=3.0)


def loss_arguments(case, config, impl):
    by_token = dict(case.by_token)
    return (
        (by_token.pop("old_logps"), by_token.pop("advantages"), case.mask),
        (by_token["ref_logps"], by_token["token_weights"], by_token["trajectory_weights"], None),
        (*config.values(), impl),
    )


@IMPLS
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck_logprobs(impl, entropy, device):
    case = random_case([5, 2], 5, bias=True).on(device)
    states = (case.hidden, case.weight, case.bias)
    opcheck(torch.ops.vgpo.linear_logprobs, (*states, case.targets, case.mask, 0.7, 3.0, entropy, impl))
    opcheck(
        torch.ops.vgpo.linear_logprobs, (*states[:2], None, case.targets.clamp(min=0), None, 1.0, None, entropy, impl)
    )
    logits = torch.randn(2, 5, 50, device=device).requires_grad_()
    opcheck(torch.ops.vgpo.selective_logprobs, (logits, case.targets, case.mask, 0.7, 3.0, entropy, impl))


@IMPLS
@pytest.mark.parametrize("config", [PolicyLossConfig("dapo"), SEQUENCE], ids=["token", "sequence"])
def test_opcheck_losses(impl, config, device):
    case = random_case([5, 2], 5, bias=True).on(device)
    first, second, last = loss_arguments(case, config, impl)
    states = (case.hidden, case.weight, case.bias, case.targets)
    opcheck(torch.ops.vgpo.linear_policy_loss, (*states, *first, *second, 0.7, 3.0, None, True, True, True, *last))
    frozen = tuple(x.detach() for x in states)
    opcheck(torch.ops.vgpo.linear_policy_loss, (*frozen, *first, *second, 1.0, None, None, False, False, False, *last))
    logits = torch.randn(2, 5, 50, device=device)
    of_logits = (case.targets, *first, *second, 0.7, 3.0, *last)
    opcheck(torch.ops.vgpo.logits_policy_loss, (logits, *of_logits))
    opcheck(torch.ops.vgpo.logits_policy_loss_, (logits.clone(), *of_logits))
    opcheck(torch.ops.vgpo.scale_, (logits, torch.tensor(2.0, device=device), impl))


@IMPLS
def test_opcheck_with_a_weight_of_columns(impl, device):
    """What the operators promise of strides must hold for it, too: inductor relies on it."""
    case = random_case([5, 2], 5).on(device)
    weight = case.weight.detach().t().contiguous().t().requires_grad_()
    first, second, last = loss_arguments(case, PolicyLossConfig(), impl)
    states = (case.hidden, weight, None, case.targets)
    opcheck(torch.ops.vgpo.linear_policy_loss, (*states, *first, *second, 1.0, None, None, True, True, False, *last))
    opcheck(torch.ops.vgpo.linear_logprobs, (*states, case.mask, 1.0, None, True, impl))


def test_implementations_have_the_same_signatures():
    for name in reference.__all__:
        ours, theirs = (list(inspect.signature(getattr(room, name)).parameters) for room in (reference, kernels))
        assert ours == theirs, name
    assert set(reference.__all__) == set(kernels.__all__) - {"compile_cases"}


@IMPLS
@pytest.mark.parametrize("kind", ["k3", "kl"])
def test_opcheck_dependency(impl, kind, device):
    case = random_case([5, 2], 5, bias=True).on(device)
    states = [x.detach() for x in (case.hidden, 0.5 * case.hidden, case.weight, case.weight, case.bias)]
    opcheck(torch.ops.vgpo.linear_visual_dependency, (*states, case.targets, case.mask, 0.7, 3.0, kind, impl))


def every_function(case, impl):
    """One call of each public function; the sum of what has a gradient, and of what has none."""
    by_token = dict(case.by_token, completion_mask=case.mask, impl=impl)
    head = (case.hidden, case.weight, case.targets)
    masked = {"mask": case.mask, "impl": impl}
    logps = linear_logprobs(*head, temperature=0.7, entropy=True, **masked)
    fused = linear_policy_loss(*head, config=SEQUENCE, bias=case.bias, **by_token)
    token = linear_policy_loss(*head, softcap=3.0, **by_token)
    logits = case.hidden @ case.weight.T
    selected = selective_logprobs(logits, case.targets, **masked)
    on_logits = logits_policy_loss(logits * 1.0, case.targets, **by_token)
    in_place = logits_policy_loss(logits * 1.0, case.targets, inplace=True, **by_token)
    dependency = linear_visual_dependency(case.hidden, 0.5 * case.hidden, *head[1:], **masked)
    loss = fused.loss + token.loss + on_logits.loss + in_place.loss
    loss = loss + sum(x.sum() for x in (logps.logps, logps.entropy, logps.lse, selected.logps))
    return loss, dependency.sum() + fused.metrics["entropy"] + fused.logps.sum()


@IMPLS
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_once_for_all_lengths(impl, device):
    torch._dynamo.reset()
    compiled = torch.compile(every_function, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, length in (([3, 5], 5), ([8, 2], 11), ([4, 4, 6], 7)):
        case = random_case(lengths, length, bias=True).on(device)
        results = []
        for function in (every_function, compiled):
            loss, constant = function(case, impl)
            results.append((loss.detach(), constant, *torch.autograd.grad(loss, case.parameters())))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(eager, other)
