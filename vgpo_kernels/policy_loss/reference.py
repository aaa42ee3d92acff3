"""The policy loss in plain torch: the specification, on any device, in float32 or float64."""

from torch import Tensor

from vgpo_kernels._dtypes import compute_dtype
from vgpo_kernels.policy_loss import terms
from vgpo_kernels.policy_loss.backend import LossInputs, LossResults
from vgpo_kernels.policy_loss.config import PolicyLossConfig


def policy_loss(logps: Tensor, inputs: LossInputs, config: PolicyLossConfig) -> LossResults:
    """Returns the loss of log-probabilities (B, T) and its gradient."""
    valid = inputs.completion_mask != 0
    dtype = compute_dtype(logps.dtype)
    new = terms.clean(logps, valid, dtype)
    old, ref = (None if x is None else terms.clean(x, valid, dtype) for x in (inputs.old_logps, inputs.ref_logps))
    weighted = terms.effective_advantages(inputs, valid, dtype)

    loss = terms.loss_with_gradient(new, old, weighted, ref, valid, config)
    row_weights = terms.row_weights(valid, config, dtype)
    row_weights = new.new_ones(()) if row_weights is None else row_weights
    rows = terms.row_results(loss, row_weights, new, old, weighted, valid, config)
    total, metrics, normalizer = terms.reduce_rows(rows, config, inputs.num_items)
    return LossResults(total, loss.per_token, metrics, loss.gradient * row_weights, normalizer)
