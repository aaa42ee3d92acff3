"""What the CPU kernels of logits are given: by public functions, by compiled code, and wrongly."""

import pytest
import torch
from torch.library import opcheck
from vocabulary_cases import random_case

from vgpo_kernels import PolicyLossConfig, _native, linear_policy_loss, logits_policy_loss, selective_logprobs
from vgpo_kernels.policy_loss.native import settings

pytestmark = pytest.mark.usefixtures("capability")  # every test on every instruction set
SOME_CONFIG = PolicyLossConfig.official(beta=0.1)


def losses(case, logits, **options):
    selected = selective_logprobs(logits, case.targets, mask=case.mask, entropy=True, **options)
    fused = logits_policy_loss(logits, case.targets, completion_mask=case.mask, **case.by_token, **options)
    linear = linear_policy_loss(
        case.hidden, case.weight, case.targets, completion_mask=case.mask, **case.by_token, **options
    )
    return fused.loss + linear.loss + selected.logps.sum() + selected.entropy.sum() + selected.lse.sum()


def test_through_the_public_functions_with_and_without_compilation():
    torch._dynamo.reset()
    case = random_case([5, 2], 5)
    logits = torch.randn(2, 5, 50, requires_grad=True)
    leaves = (logits, case.hidden, case.weight)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    results = []
    for function, impl in ((losses, "reference"), (losses, "native"), (losses, None), (compiled, "native")):
        loss = function(case, logits, impl=impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            torch.testing.assert_close(one, other)
    for one, chosen in zip(*results[1:3], strict=True):  # what None chooses on a CPU
        assert torch.equal(one, chosen)


def test_operators():
    case = random_case([5, 2], 5, bias=True)
    logits = torch.randn(2, 5, 50).requires_grad_()
    opcheck(torch.ops.vgpo.selective_logprobs, (logits, case.targets, case.mask, 0.7, 3.0, True, "native"))
    by_token = dict(case.by_token)
    first = (case.targets, by_token.pop("old_logps"), by_token.pop("advantages"), case.mask)
    options = {"temperature": 0.7, "softcap": 3.0, "impl": "native", **SOME_CONFIG.settings()}
    opcheck(torch.ops.vgpo.logits_policy_loss, (logits.detach(), *first, *by_token.values(), None), options)


def test_sizes_and_types_are_checked():
    logits, targets, by_token = torch.randn(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64), torch.empty(2, 3)
    valid = torch.ones(2, 3, dtype=torch.bool)
    scaling = (1.0, 0.0)
    short = torch.empty(2, 2)
    for wrong in ((short, by_token, None), (by_token, short, None), (by_token, by_token, short)):
        with pytest.raises(ValueError, match="expected size 3 in dimension 1, got 2"):
            _native.call("logits_logprobs", *wrong, logits, targets, None, *scaling)
    results = (by_token, by_token, None)
    with pytest.raises(ValueError, match="targets: expected size 3 in dimension 1, got 2"):
        _native.call("logits_logprobs", *results, logits, targets[:, :2], None, *scaling)
    with pytest.raises(ValueError, match="valid: expected size 2 in dimension 0, got 1"):
        _native.call("logits_logprobs", *results, logits, targets, valid[:1], *scaling)
    with pytest.raises(TypeError, match="argument 4: expected a tensor of another dtype"):
        _native.call("logits_logprobs", *results, logits, targets.int(), None, *scaling)
    with pytest.raises(TypeError, match="argument 3: expected a tensor of float32, bfloat16 or float16"):
        _native.call("logits_logprobs", *results, logits.double(), targets, None, *scaling)

    of_logits = (logits, targets, None)
    with pytest.raises(ValueError, match="out: expected size 9 in dimension 2, got 8"):
        _native.call("logits_gradient", logits[..., :8], *of_logits, *[by_token] * 5, *scaling)
    for i in range(5):
        wrong = [short if i == j else by_token for j in range(5)]
        with pytest.raises(ValueError, match="expected size 3 in dimension 1, got 2"):
            _native.call("logits_gradient", logits, *of_logits, *wrong, *scaling)

    config = settings(SOME_CONFIG)
    for i in range(6):
        logps, entropy, *wrong = (short if i == j else by_token for j in range(6))
        with pytest.raises(ValueError, match="expected size 3 in dimension 1, got 2"):
            _native.call("logits_loss", logits, logps, entropy, *of_logits, *wrong, *scaling, config)
    with pytest.raises(ValueError, match="out: expected size 2 in dimension 0, got 1"):
        _native.call("logits_loss", logits[:1], *[by_token] * 2, *of_logits, *[by_token] * 4, *scaling, config)
    with pytest.raises(ValueError, match="settings: expected size 8 in dimension 0, got 7"):
        _native.call("logits_loss", logits, *[by_token] * 2, *of_logits, *[by_token] * 4, *scaling, config[:7])

    with pytest.raises(ValueError, match="logits_q: expected size 9 in dimension 1, got 8"):
        _native.call("logits_kl", by_token[0], logits[0], logits[0, :, :8], *scaling)
    with pytest.raises(ValueError, match="out: expected size 3 in dimension 0, got 2"):
        _native.call("logits_kl", short[0], logits[0], logits[0], *scaling)
