"""What the benchmarks measure against, at matched semantics: each peer is checked equal to ours before it is timed."""

from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def eager_attention(q: Tensor, k: Tensor) -> Tensor:
    """The whole causal map (B, Hq, Lq, Lk) as `output_attentions=True` gives it: K repeated, softmax in fp32."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ keys.mT * q.shape[-1] ** -0.5
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[2])
    return scores.masked_fill(later, float("-inf")).softmax(-1, dtype=torch.float32)


def eager_mass(q: Tensor, k: Tensor, visual_mask: Tensor) -> Tensor:
    """The map, summed over visual keys."""
    return (eager_attention(q, k) * visual_mask[:, None, None]).sum(-1)


def eager_column_sum(q: Tensor, k: Tensor, visual_mask: Tensor) -> Tensor:
    """The map, summed over queries, at visual keys."""
    return eager_attention(q, k).sum(2) * visual_mask[:, None]


def two_lse_mass(q: Tensor, k: Tensor, lse: Tensor, visual: slice) -> Tensor:
    """exp(LSE over visual keys - LSE over all), the former by a second stock attention, with keys for values.

    Only for visual keys that lie side by side before every query.
    """
    from vgpo_kernels import attention_with_lse

    keys = k[:, :, visual]
    _, visual_lse = attention_with_lse(q, keys, keys, causal=False)
    return (visual_lse - lse).exp()


def token_loop_focus(hidden_states: Tensor, visual_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """The cosine of one token after the other, each read back to the host, as trainers do without a kernel."""
    focus = torch.zeros(visual_mask.shape)
    for row in range(hidden_states.shape[0]):
        prototype = hidden_states[row, visual_mask[row]].mean(0)
        for position in completion_mask[row].nonzero().flatten().tolist():
            focus[row, position] = cosine_similarity(hidden_states[row, position], prototype, dim=0).item()
    return focus.to(hidden_states.device)


def dense_focus(hidden_states: Tensor, visual_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """Whole-tensor torch: prototypes by a masked sum, cosines of every position, then the mask."""
    states = hidden_states.float()
    visual = visual_mask.unsqueeze(-1)
    prototype = (states * visual).sum(1) / visual.sum(1)
    return cosine_similarity(states, prototype[:, None], dim=-1) * completion_mask


def token_loop_weights(focus: Tensor, completion_mask: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The `paper` recipe token by token and group by group in Python."""
    rows, length = focus.shape
    token_weights, scores = torch.ones(rows, length), []
    for row in range(rows):
        places = completion_mask[row].nonzero().flatten().tolist()
        count = len(places)
        rho = [(focus[row, place].item() + 1) / 2 for place in places]
        tail = list(range(count // 2, count))
        opened = sorted((rho[t] for t in tail), reverse=True)[max(1, int(len(tail) * 0.2)) - 1]
        weights = [
            value * (1 + 0.3 * (t + 1) / count) if t in tail and value >= opened else value
            for t, value in enumerate(rho)
        ]
        low, high = min(weights), max(weights)
        scaled = [(value - low) / (high - low) for value in weights]
        mean = sum(scaled) / count
        for place, value in zip(places, scaled, strict=True):
            token_weights[row, place] = 1 + value - mean
        scores.append(sum(weights))
    trajectory_weights = torch.ones(rows)
    for group in set(group_ids.tolist()):
        members = [row for row in range(rows) if group_ids[row].item() == group]
        values = [scores[row] for row in members]
        low, high = min(values), max(values)
        scaled = [(value - low) / (high - low) for value in values]
        for row, value in zip(members, scaled, strict=True):
            trajectory_weights[row] = 1 + value - sum(scaled) / len(scaled)
    return token_weights.to(focus.device), trajectory_weights.to(focus.device)


def dense_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The clipped loss averaged over tokens, in plain torch under autograd."""
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


def liger_linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """Liger's fused linear GRPO ("bnpo", clip 0.2 / 0.28), advantages of rows; compiled where there is a GPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    settings = {"beta": 0.0, "epsilon_high": 0.28, "loss_type": "bnpo", "use_ref_model": False}
    loss = LigerFusedLinearGRPOLoss(compiled=hidden.is_cuda, **settings)
    return loss(hidden, weight, targets, mask, advantages, old_per_token_logps=old_logps)[0]
