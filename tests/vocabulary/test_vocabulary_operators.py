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
from vgpo_kernels.vocabulary import native, reference
from vgpo_kernels.vocabulary import triton as kernels

IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])
SEQUENCE = PolicyLossConfig("grpo", "sequence", beta=0.1, clip_ratio_dual=3.0)


def loss_inputs(case):
    by_token = dict(case.by_token)
    first = (by_token.pop("old_logps"), by_token.pop("advantages"), case.mask)
    return *first, by_token["ref_logps"], by_token["token_weights"], by_token["trajectory_weights"], None


def loss_options(config, impl, temperature=1.0, softcap=None, needed=None):
    options = {"temperature": temperature, "softcap": softcap, "impl": impl, **config.settings()}
    if needed is not None:
        names = ("needs_hidden", "needs_weight", "needs_bias")
        options |= {"memory_budget": None, **dict(zip(names, needed, strict=True))}
    return options


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
    inputs = loss_inputs(case)
    states = (case.hidden, case.weight, case.bias, case.targets)
    linear = torch.ops.vgpo.linear_policy_loss
    opcheck(linear, (*states, *inputs), loss_options(config, impl, 0.7, 3.0, (True, True, True)))
    frozen = tuple(x.detach() for x in states)
    opcheck(linear, (*frozen, *inputs), loss_options(config, impl, needed=(False, False, False)))
    logits = torch.randn(2, 5, 50, device=device)
    options = loss_options(config, impl, 0.7, 3.0)
    opcheck(torch.ops.vgpo.logits_policy_loss, (logits, case.targets, *inputs), options)
    opcheck(torch.ops.vgpo.logits_policy_loss_, (logits.clone(), case.targets, *inputs), options)
    opcheck(torch.ops.vgpo.scale_, (logits, torch.tensor(2.0, device=device), impl))


@IMPLS
def test_opcheck_with_a_weight_of_columns(impl, device):
    """What the operators promise of strides must hold for it, too: inductor relies on it."""
    case = random_case([5, 2], 5).on(device)
    weight = case.weight.detach().t().contiguous().t().requires_grad_()
    states = (case.hidden, weight, None, case.targets)
    options = loss_options(PolicyLossConfig(), impl, needed=(True, True, False))
    opcheck(torch.ops.vgpo.linear_policy_loss, (*states, *loss_inputs(case)), options)
    opcheck(torch.ops.vgpo.linear_logprobs, (*states, case.mask, 1.0, None, True, impl))


@pytest.mark.parametrize("module", [kernels, native], ids=["triton", "native"])
def test_implementations_have_the_same_signatures(module):
    for name in set(reference.__all__) - {"fused_logprobs"}:
        ours, theirs = (
            list(inspect.signature(getattr(implementation, name)).parameters) for implementation in (reference, module)
        )
        assert ours == theirs, name
    assert set(reference.__all__) == set(module.__all__) - {"compile_cases"}


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
