"""The public function of the room."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels._validate import FLOATING, INTEGER, MASK, check_not_empty, check_number, check_tensor
from vgpo_kernels.policy_loss import ops, terms
from vgpo_kernels.policy_loss.config import PolicyLossConfig


class PolicyLossOutput(NamedTuple):
    """What `policy_loss` returns.

    Args:
        loss: (), differentiable with respect to `logps`.
        per_token_loss: (B, T), detached: each token's loss before any average, 0 where masked.
        metrics: detached () tensors, means over the valid tokens unless said otherwise (all 0 without any):
            clip_fraction_low, clip_fraction_high: tokens whose ratio is below its lower bound (negative
            advantage) or above its upper one (positive advantage); clip_fraction_dual: tokens with a negative
            advantage whose ratio is above its upper bound (`clip_ratio_dual`, `delta`, or "cispo"'s
            epsilon_high); approx_kl: k3 estimate of KL(old policy || policy), always per token; kl: the KL
            to the reference as it enters the loss, 0 without `ref_logps`; ratio_mean and ratio_max (a
            maximum): of the importance ratio before clipping, at sequence level a row's ratio counted once
            for each of its tokens; entropy_proxy: -logps.
    """

    loss: Tensor
    per_token_loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    trajectory_weights: Tensor | None = None,
    config: PolicyLossConfig | None = None,
    num_items_in_batch: int | float | Tensor | None = None,
    impl: str | None = None,
) -> PolicyLossOutput:
    """Returns the clipped policy-gradient loss with weighted advantages, and its metrics.

    The advantage of a token is advantages x token_weights x trajectory_weights. Only `logps` gets a gradient
    (first derivatives); every other tensor is a constant. Masked positions may hold anything, NaN included:
    they change nothing and their gradient is exactly 0. A row without a valid token has a mean of 0, which
    still counts among the rows that "grpo" and "dr_grpo" average.

    Args:
        logps: (B, T) floating, log-probability of each completion token under the policy. Computed in
            float32; float64 stays float64 (reference only).
        old_logps: (B, T) floating, under the policy that sampled. None: `logps` without gradient (ratio 1).
        advantages: (B,) or (B, T) floating; told apart by the number of dimensions.
        completion_mask: (B, T) bool or 0/1, which tokens were generated.
        ref_logps: (B, T) floating, under the reference policy; needed where config.beta is not 0.
        token_weights: (B, T) floating, 1 + psi.
        trajectory_weights: (B,) floating, 1 + phi.
        config: settings; None: `PolicyLossConfig()`.
        num_items_in_batch: for "dapo" and "cispo" only, the number of tokens the sum is divided by (at least
            1 is used): loss = sum over this batch's tokens / num_items_in_batch. To accumulate gradients over
            micro-batches pass the tokens of the whole window to each; where gradients are averaged over
            processes, the tokens of all of them / number of processes. A () tensor on the device of `logps`,
            or a number (a float that changes recompiles under torch.compile). None: this batch's own tokens.
            The other loss types average over the batch itself; over equally weighted micro-batches divide
            their loss by the number of micro-batches.
        impl: "triton", "reference", or None to choose by device.

    Returns:
        PolicyLossOutput(loss, per_token_loss, metrics).

    Raises:
        TypeError: an argument is no tensor, or has a dtype it must not have.
        ValueError: a shape or device does not fit, the batch is empty, `ref_logps` is missing,
            `num_items_in_batch` does not go with the loss type; on the reference and under VGPO_DEBUG=1 also
            a mask with values other than 0 and 1.
        RuntimeError: `impl` cannot run here.

    Example:
        >>> import torch
        >>> logps = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
        >>> mask = torch.tensor([[True, True, False]])
        >>> out = policy_loss(logps, None, torch.tensor([0.5]), mask)
        >>> out.loss.backward()
        >>> logps.grad
        tensor([[-0.2500, -0.2500,  0.0000]])

    Source: VGPO, arXiv 2604.09349; terms and averages as in TRL 1.16, `GRPOTrainer._compute_loss`.
    """
    config = PolicyLossConfig() if config is None else config
    if not isinstance(config, PolicyLossConfig):
        raise TypeError(f"config: expected a PolicyLossConfig, got {type(config).__name__}")
    _check_tensors(logps, old_logps, advantages, completion_mask, ref_logps, token_weights, trajectory_weights)
    if config.beta != 0.0 and ref_logps is None:
        raise ValueError(f"ref_logps: expected a tensor because config.beta is {config.beta}, got None")
    num_items = _num_items_tensor(num_items_in_batch, config, logps)
    loss, per_token, metrics, _, _ = ops.policy_loss(
        logps,
        *[_constant(x) for x in (old_logps, advantages, completion_mask)],
        *[_constant(x) for x in (ref_logps, token_weights, trajectory_weights, num_items)],
        config.loss_type,
        config.importance_sampling_level,
        config.epsilon_low,
        config.epsilon_high,
        config.delta,
        config.clip_ratio_dual,
        config.beta,
        config.max_completion_length,
        config.kl_log_ratio_limit,
        config.kl_limit,
        impl,
    )
    named = dict(zip(terms.METRICS, metrics.detach().unbind(), strict=True))
    return PolicyLossOutput(loss, per_token.detach(), named)


def _constant(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach()


def _check_tensors(
    logps: Any,
    old_logps: Any,
    advantages: Any,
    completion_mask: Any,
    ref_logps: Any,
    token_weights: Any,
    trajectory_weights: Any,
) -> None:
    check_tensor("logps", logps, shape=("B", "T"), dtypes=FLOATING)
    check_not_empty("logps", logps)
    rows, length = logps.shape
    check_tensor("completion_mask", completion_mask, shape=(rows, length), dtypes=MASK, device=logps.device)
    if isinstance(advantages, Tensor) and advantages.dim() not in (1, 2):
        raise ValueError(f"advantages: expected shape ({rows},) or ({rows}, {length}), got {tuple(advantages.shape)}")
    by_row = isinstance(advantages, Tensor) and advantages.dim() == 1
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "advantages": (advantages, (rows,) if by_row else (rows, length)),
        "old_logps": (old_logps, (rows, length)),
        "ref_logps": (ref_logps, (rows, length)),
        "token_weights": (token_weights, (rows, length)),
        "trajectory_weights": (trajectory_weights, (rows,)),
    }
    for name, (value, shape) in shapes.items():
        if value is not None or name == "advantages":
            check_tensor(name, value, shape=shape, dtypes=FLOATING, device=logps.device)


def _num_items_tensor(value: Any, config: PolicyLossConfig, logps: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not config.divides_by_num_items:
        raise ValueError(f"num_items_in_batch: expected None with loss_type {config.loss_type!r}, got {value!r}")
    if isinstance(value, Tensor):
        check_tensor("num_items_in_batch", value, shape=(), dtypes=INTEGER + FLOATING, device=logps.device)
        return value
    check_number("num_items_in_batch", value, low=0.0)
    return torch.full((), value, dtype=terms.compute_dtype(logps), device=logps.device)
