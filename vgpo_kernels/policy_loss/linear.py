"""From hidden states to results and gradients, a few tokens at a time: the logits of a chunk are all that ever exists.

`passes` is the module that runs the passes over logits: `reference`, `native` or `kernels`. A token is named by its
place in hidden (..., D): `index` holds one (m,) tensor for each leading dimension, so that masked tokens cost nothing
and no copy of the states is made.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels.policy_loss import logprob, products, terms
from vgpo_kernels.policy_loss.config import PolicyLossConfig

Index = tuple[Tensor, ...]

# Bytes of temporaries, by the type of the device; with what a product takes inside torch, a CPU stays below 128 MB.
MEMORY_BUDGETS = {"cuda": 512 * 10**6, "cpu": 108 * 10**6}


class Head(NamedTuple):
    """What makes logits of hidden states: softcap(hidden @ weight^T + bias) / temperature."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    temperature: float
    softcap: float | None


class Wanted(NamedTuple):
    """Which gradients are made."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients:
    """Sums the gradients of chunks; those of weight and bias in float32 (float64 for float64)."""

    def __init__(self, hidden: Tensor, head: Head, wanted: Wanted) -> None:
        dtype = logprob.compute_dtype(hidden)
        self.head = head
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wanted.hidden else None
        self.weight = head.weight.new_zeros(head.weight.shape, dtype=dtype) if wanted.weight else None
        self.bias = head.weight.new_zeros(head.weight.shape[:1], dtype=dtype) if wanted.bias else None

    def add(self, index: Index, states: Tensor, gradient: Tensor) -> None:
        """Adds what the gradient (n, V) of the logits of states (n, D), at `index`, gives."""
        if self.hidden is not None:
            self.hidden[index] = products.states_gradient(gradient, self.head.weight).to(self.hidden.dtype)
        if self.weight is not None:
            products.add_weight_gradient(self.weight, gradient, states)
        if self.bias is not None:
            self.bias.add_(gradient.sum(0, dtype=self.bias.dtype))


class Chunks:
    """Logits of a few tokens at a time, within a budget of memory, in buffers that every chunk uses again.

    Args:
        passes: the module whose `logits_of` makes them.
        hidden: (..., D).
        head: what makes logits of them.
        tokens: how many there are.
        budget: bytes that the buffers may take; None: MEMORY_BUDGETS.
        buffers: how many logits a token has at a time.
        gradients: whether gradients of the logits are made, too.

    Raises:
        ValueError: the budget does not hold one token.
    """

    def __init__(
        self,
        passes: Any,
        hidden: Tensor,
        head: Head,
        tokens: int,
        budget: int | None,
        *,
        buffers: int = 1,
        gradients: bool = False,
    ) -> None:
        self.passes, self.hidden, self.head = passes, hidden, head
        vocabulary, size = head.weight.shape
        dtype, gradient = logprob.compute_dtype(hidden), products.gradient_dtype(hidden)
        apart = gradients and gradient != dtype
        states = 2 * size * dtype.itemsize
        a_token = vocabulary * (buffers * dtype.itemsize + (gradient.itemsize if apart else 0)) + states
        fixed = products.tile_bytes(hidden) + 4 * logprob.BLOCK * dtype.itemsize
        allowed = MEMORY_BUDGETS.get(hidden.device.type, MEMORY_BUDGETS["cuda"]) if budget is None else budget
        most = (allowed - fixed) // a_token
        if most < 1 and budget is not None:
            raise ValueError(f"memory_budget: expected at least {fixed + a_token} bytes, for one token, got {budget}")
        # Chunks of one size: none is left over that is too small for a fast product.
        most = max(1, min(most, tokens))
        self.tokens = -(-tokens // -(-tokens // most)) if tokens else 1
        self.logits = [hidden.new_empty((self.tokens, vocabulary), dtype=dtype) for _ in range(buffers)]
        self.gradient = hidden.new_empty((self.tokens, vocabulary), dtype=gradient) if apart else self.logits[0]

    def __call__(self, index: Index) -> Iterator[tuple[Index, Tensor, Tensor]]:
        """Yields index, states (n, D) and logits (n, V) of each chunk."""
        for part in zip(*(axis.split(self.tokens) for axis in index), strict=True):
            states = self.hidden[part]
            yield part, states, self.product(states, self.head)

    def product(self, states: Tensor, head: Head, buffer: int = 0) -> Tensor:
        """Returns the logits (n, V) of states (n, D) in that buffer."""
        logits: Tensor = self.passes.logits_of(states, head.weight, head.bias, self.logits[buffer][: states.shape[0]])
        return logits


def logprobs(
    passes: Any, hidden: Tensor, index: Index, head: Head, targets: Tensor, entropy: bool, memory_budget: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns logps, LSE and entropy, (m,) each, of the targets (m,) of the tokens at `index`."""
    parts = []
    chunks = Chunks(passes, hidden, head, targets.shape[0], memory_budget)
    targets_of = iter(targets.split(chunks.tokens))
    for _, _, logits in chunks(index):
        found = passes.logits_logprobs(
            logits[None], next(targets_of)[None], None, head.temperature, head.softcap, entropy
        )
        parts.append([None if x is None else x[0] for x in found])
    if not parts:
        nothing = hidden.new_zeros(0, dtype=logprob.compute_dtype(hidden))
        return nothing, nothing.clone(), nothing.clone() if entropy else None
    logps, lse, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(lse), torch.cat(entropies) if entropy else None


def logprobs_backward(
    passes: Any,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    valid: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """Returns the gradients of log-probs, entropy and LSE, all (...) as `targets`; logits are made once more."""
    gradients = Gradients(hidden, head, wanted)
    index = valid.nonzero(as_tuple=True)
    chunks = Chunks(passes, hidden, head, index[0].shape[0], None, gradients=True)
    for part, states, logits in chunks(index):
        of_part = [None if x is None else x[part][None] for x in (lse, entropy, grad_logps, grad_entropy, grad_lse)]
        out = chunks.gradient[: states.shape[0]]
        passes.logits_gradient(
            logits[None], targets[part][None], None, *of_part, head.temperature, head.softcap, out[None]
        )
        gradients.add(part, states, out)
    return gradients


def policy_loss(
    passes: Any,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    trajectory_weights: Tensor | None,
    num_items: Tensor | None,
    config: PolicyLossConfig,
    memory_budget: int | None,
    wanted: Wanted,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor, Gradients]:
    """Returns (loss, per-token loss, metrics, normaliser) as the policy loss does, logps, entropy, gradients.

    At token level the coefficient of a token is known once its own logits are: one product, then two for the gradients.
    A ratio of whole rows needs every log-probability first: one product more.
    """
    valid = completion_mask != 0
    index = valid.nonzero(as_tuple=True)
    dtype = logprob.compute_dtype(hidden)
    logps, entropy = (torch.zeros(targets.shape, dtype=dtype, device=hidden.device) for _ in range(2))
    by_row = (completion_mask, ref_logps, token_weights, trajectory_weights, num_items, config)
    gradients = Gradients(hidden, head, wanted)
    row_scale = terms.row_scale(valid, config, dtype)
    if not any(wanted) or config.importance_sampling_level == "sequence":
        logps[index], _, entropy[index] = passes.linear_logprobs(
            hidden, index, head.weight, head.bias, targets[index], head.temperature, head.softcap, True, memory_budget
        )
        loss, per_token, metrics, coefficients, scale = passes.policy_loss(logps, old_logps, advantages, *by_row)
        if any(wanted):
            coefficients = coefficients * row_scale
            _second_pass(passes, hidden, head, targets, index, coefficients, memory_budget, gradients)
        return (loss, per_token, metrics, scale / row_scale), logps, entropy, gradients

    weighted = terms.effective_advantages(advantages, valid, token_weights, trajectory_weights, dtype)
    row_weights = terms.row_weights(valid, config, dtype)
    row_weights = None if row_weights is None else row_weights * row_scale
    chunks = Chunks(passes, hidden, head, index[0].shape[0], memory_budget, gradients=True)
    for part, states, logits in chunks(index):
        of_part = [
            None if x is None else x[part][None].to(dtype) for x in (old_logps, weighted, ref_logps, row_weights)
        ]
        out = chunks.gradient[: states.shape[0]]
        found = passes.logits_loss(
            logits[None], targets[part][None], None, *of_part, head.temperature, head.softcap, config, out[None]
        )
        logps[part], entropy[part] = (x[0] for x in found)
        gradients.add(part, states, out)
    loss, per_token, metrics, _, scale = passes.policy_loss(logps, old_logps, advantages, *by_row)
    return (loss, per_token, metrics, scale / row_scale), logps, entropy, gradients


def _second_pass(
    passes: Any,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    index: Index,
    coefficients: Tensor,
    memory_budget: int | None,
    gradients: Gradients,
) -> None:
    chunks = Chunks(passes, hidden, head, index[0].shape[0], memory_budget, gradients=True)
    for part, states, logits in chunks(index):
        of_logits = (logits[None], targets[part][None], None)
        _, lse, _ = passes.logits_logprobs(*of_logits, head.temperature, head.softcap, False)
        out = chunks.gradient[: states.shape[0]]
        passes.logits_gradient(
            *of_logits, lse, None, coefficients[part][None], None, None, head.temperature, head.softcap, out[None]
        )
        gradients.add(part, states, out)


def visual_dependency(
    passes: Any,
    hidden: Tensor,
    corrupted: Tensor,
    head: Head,
    corrupted_head: Head,
    targets: Tensor,
    index: Index,
    kind: str,
) -> Tensor:
    """Returns how far the log-probs at `index` differ between the two states, (m,); see the public function."""
    if kind == "kl":
        chunks = Chunks(passes, hidden, head, index[0].shape[0], None, buffers=2)
        parts = [
            passes.logits_kl(logits, chunks.product(corrupted[part], corrupted_head, 1), head.temperature, head.softcap)
            for part, _, logits in chunks(index)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=logprob.compute_dtype(hidden))
    seen, unseen = (
        passes.linear_logprobs(
            states, index, of.weight, of.bias, targets[index], of.temperature, of.softcap, False, None
        )[0]
        for states, of in ((hidden, head), (corrupted, corrupted_head))
    )
    if kind == "logratio":
        return seen - unseen
    return terms.k3(unseen - seen)
