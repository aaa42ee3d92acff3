"""Other ways to log-probabilities and policy losses, at the semantics of ours."""

from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import Tensor


def dense_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The clipped loss averaged over tokens, in plain torch under autograd; advantages (B,) or (B, T)."""
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    ratio = (logps - old_logps).exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(0.8, 1.28) * advantages
    return -(torch.min(unclipped, clipped) * mask).sum() / mask.sum()


def trl_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """TRL's own `GRPOTrainer._compute_loss` ("dapo", clip 0.2 / 0.28), given the log-probabilities its model would."""
    from trl import GRPOTrainer

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, -logps.detach(), None),
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        epsilon_high=0.28,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type="dapo",
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    prompt = mask[:, :1].long()
    batch = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": mask.long(),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old_logps,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, batch)


def dense_selective(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of whole logits by log_softmax in fp32, then a gather."""
    return logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def trl_selective(logits: Tensor, targets: Tensor) -> Tensor:
    """TRL's `selective_log_softmax`: its own kernel on a GPU, rows in a loop elsewhere."""
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, targets)


def liger_logits_loss(logits: Tensor, targets: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Liger's Triton GRPO loss ("bnpo", clip 0.2 / 0.28) of logits (B, T + 1, V), of which it leaves the last one out.

    The gradient gets a place of its own: in place, its default, it would overwrite what the next call is to read.
    """
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    options = {"temperature": 1.0, "beta": 0.0, "eps_low": 0.2, "eps_high": 0.28, "loss_type": "bnpo"}
    given = (logits, old_logps, None, targets, advantages, mask.float())
    return triton_grpo_loss(*given, inplace=False, reduce=True, **options)[0]


def dense_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from whole logits, in plain torch under autograd."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def trl_fused_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's log-probabilities and entropies in tiles of tokens, as its fused head calls them."""
    from trl.trainer import utils

    outputs = utils._ChunkedLogProbFunction.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        None,
        targets.reshape(-1),
        1.0,
        utils._CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("log_probs", "entropy"),
    )
    return outputs[0].view(targets.shape), outputs[1].view(targets.shape)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities as cut-cross-entropy's negative losses; its filter of small gradients is off, to be exact."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=None)


def liger_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities as the negative losses of Liger's fused linear cross-entropy, in Triton."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    rows = hidden.reshape(-1, hidden.shape[-1])
    return -liger_fused_linear_cross_entropy(rows, weight, targets.reshape(-1), reduction="none").view(targets.shape)


def liger_scaled_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by Liger's fused linear cross-entropy: CuTe on sm_90, else chunks in torch."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    rows = hidden.reshape(-1, hidden.shape[-1])
    losses, entropies = LigerFusedLinearScaledCrossEntropyFunction.apply(
        rows, weight, targets.reshape(-1), return_entropy=True
    )
    return -losses.view(targets.shape), entropies.view(targets.shape)


def liger_linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """Liger's fused linear GRPO ("bnpo", clip 0.2 / 0.28), advantages of rows; compiled, as by default."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    settings = {"beta": 0.0, "epsilon_high": 0.28, "loss_type": "bnpo", "use_ref_model": False}
    loss = LigerFusedLinearGRPOLoss(**settings)
    return loss(hidden, weight, targets, mask, advantages, old_per_token_logps=old_logps)[0]
