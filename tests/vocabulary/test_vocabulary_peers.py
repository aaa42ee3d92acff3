"""The vocabulary side against the functions of TRL 1.16 and Liger 0.8, called as they are on the same tensors."""

import pytest
import torch
from vocabulary_cases import random_case

from vgpo_kernels import PolicyLossConfig, linear_logprobs, linear_policy_loss, selective_logprobs
from vgpo_kernels.testing import assert_error_budget

LENGTHS = [11, 7, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trl_selective_log_softmax_and_entropy(dtype):
    utils = pytest.importorskip("trl.trainer.utils")
    logits = 3 * torch.randn(4, 9, 321, dtype=dtype)
    targets = torch.randint(0, 321, (4, 9))
    found = selective_logprobs(logits, targets, temperature=0.9, entropy=True)
    exact = selective_logprobs(logits.double(), targets, temperature=0.9, entropy=True)
    assert_error_budget("logps", found.logps, utils.selective_log_softmax(logits, targets, 0.9), exact.logps)
    assert_error_budget("entropy", found.entropy, utils.entropy_from_logits(logits / 0.9), exact.entropy)


def test_trl_fused_head():
    """TRL's own head without whole logits, on a small model: log-probabilities and the head's gradient."""
    utils = pytest.importorskip("trl.trainer.utils")
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, **size)).double()
    utils.add_fused_lm_head(model, temperature=0.8)
    ids = torch.randint(0, 97, (2, 9))
    theirs = model(input_ids=ids, labels=ids, fused_lm_head=True)
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    ours = linear_logprobs(hidden, model.lm_head.weight, ids[:, 1:], temperature=0.8, entropy=True)
    # TRL computes them in float32 whatever the dtype of the states.
    torch.testing.assert_close(theirs.log_probs.double(), ours.logps, rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(theirs.log_probs.sum(), model.lm_head.weight)
    (found,) = torch.autograd.grad(ours.logps.sum(), model.lm_head.weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_liger_fused_linear_grpo(loss_type, level, beta):
    """What Liger can do, advantages of rows and no weights, agrees in loss and gradients of states, weight and bias."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    if loss_type == "cispo" and level == "sequence":
        pytest.skip("Liger refuses cispo at sequence level")
    case = random_case(LENGTHS, 11, bias=True, dtype=torch.float64)
    high = 1.3 if loss_type == "cispo" else 0.28
    advantages, mask, targets = torch.randn(4, dtype=torch.float64), case.mask, case.targets.clamp(min=0)
    old, ref = (case.by_token[name].double() for name in ("old_logps", "ref_logps"))
    theirs = liger.LigerFusedLinearGRPOLoss(
        beta=beta,
        compiled=False,
        use_ref_model=beta > 0,
        epsilon_high=high,
        loss_type=loss_type,
        max_completion_length=16,
        importance_sampling_level=level,
        temperature=0.8,
    )
    loss, _ = theirs(
        case.hidden,
        case.weight,
        targets,
        mask,
        advantages,
        bias=case.bias,
        ref_per_token_logps=ref if beta else None,
        old_per_token_logps=old,
    )
    expected = torch.autograd.grad(loss, case.parameters())
    config = PolicyLossConfig(loss_type, level, epsilon_high=high, beta=beta, max_completion_length=16)
    output = linear_policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        old,
        advantages,
        mask,
        bias=case.bias,
        ref_logps=ref if beta else None,
        temperature=0.8,
        config=config,
    )
    # Liger computes log-probabilities in float32 whatever the dtype of the states.
    torch.testing.assert_close(output.loss, loss.double(), rtol=1e-5, atol=1e-6)
    for one, other in zip(torch.autograd.grad(output.loss, case.parameters()), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
