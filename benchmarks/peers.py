"""What the benchmarks measure against, at matched semantics: each peer is checked equal to ours before it is timed."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from room import Unavailable
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vgpo_kernels import attention_backend, attention_with_lse


@functools.cache
def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """Returns the function under torch.compile, one compilation for each set of shapes; too many are an error.

    Left alone, torch would run what exceeds its limit uncompiled. `torch._dynamo.reset()` begins to count anew.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False, backend=backend)


# Attention


def visible_keys(sequences: Tensor, queries: int) -> Tensor:
    """Which keys the last `queries` tokens see, (B, 1, Lq, Lk): earlier ones of their own sequence, -1 for none."""
    length = sequences.shape[1]
    earlier = torch.ones(queries, length, dtype=torch.bool, device=sequences.device).tril(length - queries)
    own = sequences[:, -queries:, None] == sequences[:, None]
    return (earlier & own & (sequences >= 0)[:, None])[:, None]


def eager_attention(q: Tensor, k: Tensor, sequences: Tensor) -> Tensor:
    """The whole map (B, Hq, Lq, Lk) as `output_attentions=True` gives it: K repeated, softmax in fp32."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ keys.mT * q.shape[-1] ** -0.5
    # Rows that see nothing would be NaN; what they hold is left out of every sum.
    return scores.masked_fill(~visible_keys(sequences, q.shape[2]), -1e30).softmax(-1, dtype=torch.float32)


def eager_mass(q: Tensor, k: Tensor, sequences: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """The map, summed over the keys of each segment."""
    seen = sequences[:, None, -q.shape[2] :, None] >= 0
    probabilities = eager_attention(q, k, sequences)
    sums = [(probabilities * (segment_ids == s)[:, None, None]).sum(-1) for s in range(num_segments)]
    return torch.stack(sums, -1) * seen


def eager_column_sum(q: Tensor, k: Tensor, sequences: Tensor, keys: Tensor) -> Tensor:
    """The map, summed over queries, at wanted keys."""
    return eager_attention(q, k, sequences).sum(2) * keys[:, None]


def eager_output(q: Tensor, k: Tensor, v: Tensor, sequences: Tensor, visual_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention through the map, with the map's sum over visual keys."""
    probabilities = eager_attention(q, k, sequences)
    out = probabilities.to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    seen = sequences[:, None, -q.shape[2] :, None] >= 0
    return out * seen, (probabilities * visual_mask[:, None, None]).sum(-1) * seen[..., 0]


def map_column_sum(q: Tensor, k: Tensor, lse: Tensor, sequences: Tensor, keys: Tensor) -> Tensor:
    """Probabilities of the wanted keys alone, from the LSE, summed over queries; all rows want the same keys."""
    wanted = keys[0].nonzero()[:, 0]
    some = k[:, :, wanted].repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ some.mT * q.shape[-1] ** -0.5
    probabilities = (scores.float() - lse[..., None]).exp()
    probabilities = probabilities.masked_fill(~visible_keys(sequences, q.shape[2])[..., wanted], 0.0)
    return probabilities.new_zeros(*k.shape[:1], q.shape[1], k.shape[2]).index_copy(2, wanted, probabilities.sum(2))


def stock_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The fastest attention at hand that is not ours, or another one, with its LSE."""
    backend = backend or stock_backend(q.device, q.dtype, q.shape[1:], k.shape[1:], causal=causal)
    if backend is None:
        raise Unavailable("no attention but ours gives its LSE here")
    return attention_with_lse(q, k, v, causal=causal, backend=backend)


@functools.cache
def stock_backend(
    device: torch.device,
    dtype: torch.dtype,
    q_shape: tuple[int, ...] = (8, 64, 128),
    k_shape: tuple[int, ...] = (2, 64, 128),
    *,
    causal: bool = True,
) -> str | None:
    """Returns the backend of the fastest attention that is not ours, for shapes (H, L, D), or None."""
    if device.type == "cpu":
        return "cpu"
    q, k = (torch.empty(1, *shape, device=device, dtype=dtype) for shape in (q_shape, k_shape))
    name, _ = attention_backend(q, k, causal=causal)
    return None if name == "vgpo" else name


def two_lse_mass(
    q: Tensor, k: Tensor, lse: Tensor, images: list[list[tuple[int, int]]], backend: str | None = None
) -> Tensor:
    """exp(LSE over an image's keys - LSE over all), the former by another stock attention, with keys for values.

    Only for images whose keys lie side by side before every query.

    Args:
        images: first key and the one after the last of each image, by row, or once where they are the same in all rows.
    """
    together = len(images) == 1
    rows = [slice(None)] if together else [slice(row, row + 1) for row in range(len(images))]
    masses = [
        torch.stack([_visual_lse(q[row], k[row, :, first:stop], backend) - lse[row] for first, stop in places], -1)
        for row, places in zip(rows, images, strict=True)
    ]
    return torch.cat(masses).exp()


def _visual_lse(q: Tensor, keys: Tensor, backend: str | None) -> Tensor:
    if not keys.shape[2]:  # all of an image may be padding
        return q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
    return stock_attention(q, keys, keys, causal=False, backend=backend)[1]


def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> tuple[Tensor, Tensor]:
    """FlexAttention's output and natural-log LSE; compiled on a GPU, where alone its compiler gives the LSE."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    run = compiled(flex_attention) if q.is_cuda else flex_attention
    out, extra = run(q, k, v, block_mask=block_mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
    return out, extra.lse


def flex_mask(sequences: Tensor, queries: int, visual_mask: Tensor | None = None) -> Any:
    """FlexAttention's mask of the keys that the last `queries` tokens see, or of the visual ones among them."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = sequences.shape
    offset = length - queries

    def sees(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        earlier = (key <= query + offset) & (sequences[b, query + offset] == sequences[b, key])
        seen = earlier & (sequences[b, key] >= 0)
        return seen if visual_mask is None else seen & visual_mask[b, key]

    return create_block_mask(sees, rows, None, queries, length, device=sequences.device)


def colreduce(q: Tensor, k: Tensor, keys: Tensor) -> Tensor:
    """flash-colreduce's causal column sums, which takes as many key heads as query heads."""
    from flash_colreduce import flash_colreduce

    whole = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return flash_colreduce(q, whole, "sum", is_causal=True).float() * keys[:, None]


# Focus and weights


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
        tail = range(count // 2, count)
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


# Policy loss


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
