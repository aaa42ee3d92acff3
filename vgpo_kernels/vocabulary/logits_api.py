"""The public functions that start at logits: log-probabilities and the policy loss in one pass over them."""

from torch import Tensor

from vgpo_kernels.policy_loss.api import PolicyLossOutput
from vgpo_kernels.policy_loss.backend import LossInputs
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.vocabulary import logits_ops
from vgpo_kernels.vocabulary.checks import check_logits, check_logits_loss
from vgpo_kernels.vocabulary.results import LinearLogprobs, loss_output


def selective_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> LinearLogprobs:
    """Returns the log-probabilities of tokens from logits, read once, computed in float32 whatever their dtype.

    Differentiable in the logits through all three results. Masked tokens are not read, may hold anything, and have a
    gradient of exactly 0. `linear_logprobs` does without logits. The targets are checked, for which a GPU is waited
    for.

    Args:
        logits: (..., V) floating; a slice such as logits[:, :-1] is read in place.
        targets: (...) int64, the sampled tokens.
        temperature: above 0; divides the logits.
        softcap: bounds the logits before that; None: as they are (models apply theirs to the logits they return).
        entropy: return the entropies, too.
        mask: (...) bool or 0/1, which tokens count; None: all.
        impl: "triton", "native" or "reference"; None chooses by device.

    Returns:
        LinearLogprobs(logps, entropy, lse).

    Raises:
        TypeError: an argument is no tensor, or has a dtype it must not have.
        ValueError: a shape or device does not fit, a target is no token of the vocabulary, a number is out of range.
        RuntimeError: `impl` cannot run here.

    Example:
        >>> import torch
        >>> selective_logprobs(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1])).logps
        tensor([-0.5514])

    Source: log softmax(logits)[target]; entropy = lse - sum softmax(z) z.
    """
    temperature, softcap = check_logits(logits, targets, mask, temperature, softcap)
    shape = targets.shape
    rows = _as_rows(logits)
    logps, lse, entropies = logits_ops.selective_logprobs(
        rows,
        targets.reshape(rows.shape[:2]).contiguous(),
        None if mask is None else mask.reshape(rows.shape[:2]).contiguous(),
        temperature,
        softcap,
        bool(entropy),
        impl,
    )
    return LinearLogprobs(logps.view(shape), entropies.view(shape) if entropy else None, lse.view(shape))


def logits_policy_loss(
    logits: Tensor,
    targets: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    trajectory_weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    config: PolicyLossConfig | None = None,
    num_items_in_batch: int | float | Tensor | None = None,
    inplace: bool = False,
    impl: str | None = None,
) -> PolicyLossOutput:
    """Returns `policy_loss` of logits, whose gradient is written while they are read: one read and one write of them.

    The loss, its metrics and every option are those of `policy_loss`. The gradient is made in the forward and handed
    out by the first backward; a second one through the same loss is refused by autograd. With
    importance_sampling_level="sequence" the logits are read once more. `linear_policy_loss` does without logits. The
    targets are checked, for which a GPU is waited for.

    Args:
        logits: (B, T, V) floating; a slice such as logits[:, :-1] is read in place.
        targets: (B, T) int64, the sampled tokens; anything where masked.
        old_logps, advantages, completion_mask, ref_logps, token_weights, trajectory_weights, config,
        num_items_in_batch:
            as in `policy_loss`.
        temperature: above 0; divides the logits.
        softcap: bounds the logits before that; None: as they are (models apply theirs to the logits they return).
        inplace: write the gradient where the logits were, which are lost, also without gradients, and in any tensor
            that they are a slice of: no memory of their size is taken. For logits that nothing else reads, and that are
            no leaf.
        impl: "triton", "native" or "reference"; None chooses by device.

    Returns:
        PolicyLossOutput(loss, per_token_loss, metrics, logps, entropy); the metrics have `entropy`, too.

    Raises:
        TypeError: an argument is no tensor, or has a dtype it must not have.
        ValueError: as in `policy_loss`; a target is no token of the vocabulary; `inplace` of a leaf that requires a
            gradient.
        RuntimeError: `impl` cannot run here; a second backward.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[0.0, 1.0, 0.0]]], requires_grad=True)
        >>> out = logits_policy_loss(logits, torch.tensor([[1]]), None, torch.tensor([0.5]), torch.tensor([[True]]))
        >>> out.loss.backward()
        >>> logits.grad[0]
        tensor([[ 0.1060, -0.2119,  0.1060]])

    Source: VGPO, arXiv 2604.09349; terms and averages as in TRL 1.16, `GRPOTrainer._compute_loss`.
    """
    inputs = LossInputs(old_logps, advantages, completion_mask, ref_logps, token_weights, trajectory_weights)
    inputs, config, temperature, softcap = check_logits_loss(
        logits, targets, inputs, num_items_in_batch, config, temperature, softcap, inplace
    )
    inputs = inputs._replace(completion_mask=inputs.completion_mask.contiguous())
    rows = logits if logits.stride(-1) == 1 else logits.contiguous()
    loss, per_token, metrics, logps, entropy = logits_ops.LogitsPolicyLoss.apply(
        rows, inplace, targets.contiguous(), inputs, temperature, softcap, config, impl
    )
    return loss_output(loss, per_token, metrics, logps, entropy, completion_mask)


def _as_rows(logits: Tensor) -> Tensor:
    """Returns the logits as (B, T, V) with a last stride of 1: as they lie in memory where that can be."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() == 3:
        return logits
    return logits.reshape(1, -1, logits.shape[-1])
