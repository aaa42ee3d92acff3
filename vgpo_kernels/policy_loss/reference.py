"""The policy loss in plain torch: the specification, on any device, in float32 or float64."""

import torch
from torch import Tensor

from vgpo_kernels.policy_loss import terms
from vgpo_kernels.policy_loss.config import PolicyLossConfig


# The gradient is made by autograd, which an outer inference mode must not stop.
@torch.inference_mode(False)
def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    trajectory_weights: Tensor | None,
    num_items: Tensor | None,
    config: PolicyLossConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss (), per-token loss (B, T), metrics, unnormalised gradient (B, T) and its normaliser ()."""
    valid = completion_mask != 0
    dtype = terms.compute_dtype(logps)
    new = terms.clean(logps, valid, dtype)
    old = None if old_logps is None else terms.clean(old_logps, valid, dtype)
    ref = None if ref_logps is None else terms.clean(ref_logps, valid, dtype)
    weighted = terms.effective_advantages(advantages, valid, token_weights, trajectory_weights, dtype)

    loss = terms.loss_with_gradient(new, old, weighted, ref, valid, config)
    row_weight = terms.inverse_lengths(valid, dtype) if config.loss_type == "grpo" else new.new_ones(())
    rows = terms.row_results(loss.per_token * row_weight, new, old, loss.log_ratio, weighted, ref, valid, config)
    total, metrics, scale = terms.reduce_rows(rows, config, num_items)
    return total, loss.per_token, metrics, loss.gradient * row_weight, scale
