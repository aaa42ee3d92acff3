"""The public functions that start at hidden states: log-probabilities, the loss, visual dependency. No logits."""

import torch
from torch import Tensor

from vgpo_kernels.policy_loss.api import PolicyLossOutput
from vgpo_kernels.policy_loss.backend import LossInputs
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.vocabulary import hidden_ops
from vgpo_kernels.vocabulary.backend import Head
from vgpo_kernels.vocabulary.checks import check_dependency, check_hidden, check_hidden_loss
from vgpo_kernels.vocabulary.results import LinearLogprobs, loss_output


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    entropy: bool = False,
    impl: str | None = None,
) -> LinearLogprobs:
    """Returns the log-probabilities of tokens straight from hidden states; the logits are never whole.

    The logits are hidden @ weight^T + bias in float32, bounded by `softcap` and divided by `temperature`. On a GPU they
    exist in registers only; elsewhere, and in the backward, which makes them once more, a few tokens' at a time.
    Differentiable in hidden, weight and bias through all three results; the gradient of the weight is summed in
    float32. Masked tokens cost nothing, may hold anything, and have a gradient of exactly 0. Under autocast hidden,
    weight and bias are cast as `torch.nn.functional.linear` casts them. The targets are checked, for which a GPU is
    waited for.

    Args:
        hidden: (..., D) floating, last-layer states after the final norm, each at the position BEFORE its target.
        weight: (V, D), the head's, in the dtype of `hidden`.
        targets: (...) int64, the sampled tokens.
        bias: (V,), the head's, or None.
        temperature: above 0; that of sampling.
        softcap: logits become softcap * tanh(logits / softcap); None: as they are.
        mask: (...) bool or 0/1, which tokens count; None: all.
        entropy: return the entropies, too.
        impl: "triton", "native" or "reference"; None chooses by device.

    Returns:
        LinearLogprobs(logps, entropy, lse).

    Raises:
        TypeError: an argument is no tensor, or has a dtype it must not have.
        ValueError: a shape or device does not fit, a target is no token of the vocabulary, a number is out of range.
        RuntimeError: `impl` cannot run here.

    Example:
        >>> import torch
        >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> linear_logprobs(hidden, weight, torch.tensor([1, 2])).logps
        tensor([-0.5514, -0.5514])

    Source: log softmax(hidden @ weight^T)[target]; entropy = lse - sum softmax(z) z.
    """
    hidden, head = check_hidden(hidden, Head(weight, bias, temperature, softcap), targets, mask)
    constant = None if mask is None else mask.detach()
    logps, lse, entropies = hidden_ops.linear_logprobs(
        hidden, head.weight, head.bias, targets, constant, head.temperature, head.softcap, bool(entropy), impl
    )
    return LinearLogprobs(logps, entropies if entropy else None, lse)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    trajectory_weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    config: PolicyLossConfig | None = None,
    num_items_in_batch: int | float | Tensor | None = None,
    memory_budget: int | None = None,
    impl: str | None = None,
) -> PolicyLossOutput:
    """Returns `policy_loss` of hidden states and a head, with its gradients, in three matrix products and no logits.

    The loss, its metrics and every option are those of `policy_loss`. The gradients of hidden, weight and bias that
    are needed are made in the forward, a few tokens at a time; the backward only scales them, and has no derivative.
    With importance_sampling_level="sequence" the ratio of a row needs all of its log-probabilities first: one product
    more, a first pass. If no gradient is needed there is one product. Masked tokens are left out before the first
    product. The targets are checked and the valid tokens gathered, for which a GPU is waited for.

    Args:
        hidden: (B, T, D) floating, last-layer states after the final norm, each at the position BEFORE its target.
        weight: (V, D), the head's, in the dtype of `hidden`. Its gradient is summed in float32.
        targets: (B, T) int64, the sampled tokens; anything where masked.
        old_logps, advantages, completion_mask, ref_logps, token_weights, trajectory_weights, config,
        num_items_in_batch:
            as in `policy_loss`.
        bias: (V,), the head's, or None.
        temperature: above 0; that of sampling.
        softcap: logits become softcap * tanh(logits / softcap) before; None: as they are.
        memory_budget: bytes of the buffers for logits and their gradient, at least one token's and some 4 MiB (12 MiB
            for half precision on a CPU); None: 108 MB on a CPU, 512 MB elsewhere.
        impl: "triton", "native" or "reference"; None chooses by device.

    Returns:
        PolicyLossOutput(loss, per_token_loss, metrics, logps, entropy); the metrics have `entropy`, too.

    Raises:
        TypeError: an argument is no tensor, or has a dtype it must not have.
        ValueError: as in `policy_loss`; a target is no token of the vocabulary; a budget that holds no token.
        RuntimeError: `impl` cannot run here.

    Example:
        >>> import torch
        >>> hidden, weight = torch.eye(2)[None].requires_grad_(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> targets, mask = torch.tensor([[1, 2]]), torch.tensor([[True, False]])
        >>> out = linear_policy_loss(hidden, weight, targets, None, torch.tensor([0.5]), mask)
        >>> out.loss.backward()
        >>> hidden.grad[0]
        tensor([[-0.2119,  0.1060],
                [ 0.0000,  0.0000]])

    Source: VGPO, arXiv 2604.09349; terms and averages as in TRL 1.16, `GRPOTrainer._compute_loss`.
    """
    inputs = LossInputs(old_logps, advantages, completion_mask, ref_logps, token_weights, trajectory_weights)
    hidden, head, inputs, config = check_hidden_loss(
        hidden,
        Head(weight, bias, temperature, softcap),
        targets,
        inputs,
        num_items_in_batch,
        config,
        memory_budget,
    )
    needs_hidden, needs_weight, needs_bias = (
        torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)
    )
    loss, per_token, metrics, logps, entropy, *_ = hidden_ops.linear_policy_loss(
        hidden,
        head.weight,
        head.bias,
        targets,
        *inputs,
        temperature=head.temperature,
        softcap=head.softcap,
        memory_budget=memory_budget,
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
        needs_bias=needs_bias,
        impl=impl,
        **config.settings(),
    )
    return loss_output(loss, per_token, metrics, logps, entropy, completion_mask)


def linear_visual_dependency(
    hidden: Tensor,
    hidden_corrupted: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    kind: str = "k3",
    weight_corrupted: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Returns how much each token depends on the image: how far it moves when the image is corrupted.

    p are the probabilities with the image (`hidden`), q those with a blank, masked or noisy one (`hidden_corrupted`),
    of the same tokens. A constant: no gradient flows into it. The logits of a few tokens exist at a time at most.

    Args:
        hidden: (..., D) floating, states that see the image, each at the position BEFORE its target.
        hidden_corrupted: (..., D), the same with a corrupted image.
        weight: (V, D), the head's, in the dtype of `hidden`.
        targets: (...) int64, the sampled tokens.
        kind: "logratio": log p - log q of the target; "k3": exp(d) - d - 1 with d = log q - log p of the target, which
            estimates KL(p || q) from one sample and is never negative; "kl": KL(p || q) over the whole vocabulary.
        weight_corrupted: (V, D), the head of the model that made `hidden_corrupted`; None: the same.
        bias, temperature, softcap, mask, impl: as in `linear_logprobs`.

    Returns:
        (...) fp32 (fp64 for fp64 input), 0 where masked.

    Raises:
        TypeError, ValueError, RuntimeError: as in `linear_logprobs`; `kind` is none of those above.

    Example:
        >>> import torch
        >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> linear_visual_dependency(hidden, 0 * hidden, weight, torch.tensor([1, 0]), kind="logratio")
        tensor([ 0.5472, -0.4528])

    Source: k3 is John Schulman's estimator of a KL divergence.
    """
    head = Head(weight, bias, temperature, softcap)
    hidden, corrupted, head, other = check_dependency(
        hidden, hidden_corrupted, head, weight_corrupted, targets, mask, kind
    )
    constants = (hidden, corrupted, head.weight, other, head.bias, targets, mask)
    return hidden_ops.linear_visual_dependency(
        *(None if x is None else x.detach() for x in constants), head.temperature, head.softcap, kind, impl
    )
