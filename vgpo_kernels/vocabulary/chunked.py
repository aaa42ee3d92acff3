"""From hidden states to results and gradients, a few tokens at a time: the logits of a chunk are all that ever exists.

A token is named by its place in hidden (..., D): an index holds one (m,) tensor for each leading dimension, so that
masked tokens cost nothing and no copy of the states is made.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels._dtypes import compute_dtype
from vgpo_kernels.policy_loss import terms
from vgpo_kernels.policy_loss.backend import LossInputs, LossResults
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.vocabulary import matmul
from vgpo_kernels.vocabulary.backend import Backend, Head, Index, Logprobs
from vgpo_kernels.vocabulary.reference import BLOCK

# Bytes of temporaries, by the type of the device; with what a product takes inside torch, a CPU stays below 128 MB.
MEMORY_BUDGETS = {"cuda": 512 * 10**6, "cpu": 108 * 10**6}


class GradientsNeeded(NamedTuple):
    """Which gradients are made."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


NO_GRADIENTS = GradientsNeeded()


class Gradients(NamedTuple):
    """The gradients that are needed; those of weight and bias in float32 (float64 for float64)."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Chunks:
    """Logits of a few tokens at a time, within a memory budget, in buffers that every chunk uses again.

    Args:
        backend: what makes the logits.
        hidden: (..., D).
        head: what makes logits of them.
        index: the tokens, (m,) for each leading dimension of `hidden`.
        budget: bytes that the buffers may take; None: MEMORY_BUDGETS.
        needed: the gradients that `add` sums.
        buffers: how many logits a token has at a time.

    Raises:
        ValueError: the budget does not hold one token.
    """

    def __init__(
        self,
        backend: Backend,
        hidden: Tensor,
        head: Head,
        index: Index,
        budget: int | None = None,
        needed: GradientsNeeded = NO_GRADIENTS,
        buffers: int = 1,
    ) -> None:
        self.backend, self.hidden, self.head, self.index = backend, hidden, head, index
        tokens, (vocabulary, width) = index[0].shape[0], head.weight.shape
        dtype, gradient = compute_dtype(hidden.dtype), matmul.gradient_dtype(hidden.dtype, hidden.device)
        apart = any(needed) and gradient != dtype
        states = 2 * width * dtype.itemsize
        a_token = vocabulary * (buffers * dtype.itemsize + (gradient.itemsize if apart else 0)) + states
        fixed = matmul.tile_bytes(hidden.dtype, hidden.device) + 4 * BLOCK * dtype.itemsize
        allowed = MEMORY_BUDGETS.get(hidden.device.type, MEMORY_BUDGETS["cuda"]) if budget is None else budget
        most = (allowed - fixed) // a_token
        if most < 1 and budget is not None:
            raise ValueError(f"memory_budget: expected at least {fixed + a_token} bytes, for one token, got {budget}")
        # Chunks of one size: none is left over that is too small for a fast product.
        most = max(1, min(most, tokens))
        self.tokens = -(-tokens // -(-tokens // most)) if tokens else 1
        self.logits = [hidden.new_empty((self.tokens, vocabulary), dtype=dtype) for _ in range(buffers)]
        self.gradient = hidden.new_empty((self.tokens, vocabulary), dtype=gradient) if apart else self.logits[0]
        self.gradients = Gradients(
            torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needed.hidden else None,
            hidden.new_zeros(head.weight.shape, dtype=dtype) if needed.weight else None,
            hidden.new_zeros(vocabulary, dtype=dtype) if needed.bias else None,
        )

    def __iter__(self) -> Iterator[tuple[Index, Tensor, Tensor, Tensor]]:
        """Yields index, states (n, D), logits (n, V) and a buffer for their gradient of each chunk."""
        for part in zip(*(axis.split(self.tokens) for axis in self.index), strict=True):
            states = self.hidden[part]
            out = self.logits[0][: states.shape[0]]
            logits = self.backend.logits_of(states, self.head.weight, self.head.bias, out)
            yield part, states, logits, self.gradient[: states.shape[0]]

    def add(self, part: Index, states: Tensor, gradient: Tensor) -> None:
        """Adds what the gradient (n, V) of the logits of a chunk gives."""
        of_hidden, of_weight, of_bias = self.gradients
        if of_hidden is not None:
            of_hidden[part] = matmul.states_gradient(gradient, self.head.weight).to(of_hidden.dtype)
        if of_weight is not None:
            matmul.add_weight_gradient(of_weight, gradient, states)
        if of_bias is not None:
            of_bias.add_(gradient.sum(0, dtype=of_bias.dtype))


def logprobs(
    backend: Backend,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    index: Index,
    entropy: bool,
    memory_budget: int | None = None,
) -> Logprobs:
    """Returns logps, LSE and entropy (None unless asked for), (m,) each, of the targets (m,) of the tokens at `index`.

    Fused if the backend has such a kernel, else chunked.
    """
    if backend.fused_logprobs is not None:
        return backend.fused_logprobs(hidden, index, head, targets, entropy)
    chunks = Chunks(backend, hidden, head, index, memory_budget)
    logps, lse, entropies = (hidden.new_empty(targets.shape, dtype=compute_dtype(hidden.dtype)) for _ in range(3))
    start = 0
    for _, _, logits, _ in chunks:
        part = slice(start, start + logits.shape[0])
        found = backend.logits_logprobs(
            logits[None], targets[part][None], None, head.temperature, head.softcap, entropy
        )
        for whole, values in zip((logps, lse, entropies), found, strict=True):
            if values is not None:
                whole[part] = values[0]
        start = part.stop
    return logps, lse, entropies if entropy else None


def logprobs_backward(
    backend: Backend,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    index: Index,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    needed: GradientsNeeded,
) -> Gradients:
    """Returns the gradients of log-probs, entropy and LSE, all (...) as `targets`; logits are made once more."""
    chunks = Chunks(backend, hidden, head, index, needed=needed)
    for part, states, logits, out in chunks:
        of_entropy, by_logps, by_entropy, by_lse = (
            None if x is None else x[part][None] for x in (entropy, grad_logps, grad_entropy, grad_lse)
        )
        backend.logits_gradient(
            logits[None],
            targets[part][None],
            None,
            lse[part][None],
            of_entropy,
            by_logps,
            by_entropy,
            by_lse,
            head.temperature,
            head.softcap,
            out[None],
        )
        chunks.add(part, states, out)
    return chunks.gradients


def policy_loss(
    backend: Backend,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    inputs: LossInputs,
    config: PolicyLossConfig,
    memory_budget: int | None,
    needed: GradientsNeeded,
) -> tuple[LossResults, Tensor, Tensor, Gradients]:
    """Returns the loss as the policy loss does, logps, entropy, and gradients before they are normalised.

    At token level the coefficient of a token is known once its own logits are: one product, then two for the gradients.
    A ratio of whole rows needs every log-probability first: one product more.
    """
    valid = inputs.completion_mask != 0
    index = valid.nonzero(as_tuple=True)
    dtype = compute_dtype(hidden.dtype)
    logps = torch.zeros(targets.shape, dtype=dtype, device=hidden.device)
    entropy = torch.zeros_like(logps)
    multiplier = terms.row_multiplier(valid, config, dtype)
    if not any(needed) or config.importance_sampling_level == "sequence":
        logps[index], _, entropies = logprobs(backend, hidden, head, targets[index], index, True, memory_budget)
        entropy[index] = entropies  # type: ignore[assignment]  # asked for
        results = backend.policy_loss(logps, inputs, config)
        gradients = Gradients(None, None, None)
        if any(needed):
            coefficients = results.gradient * multiplier
            gradients = _second_pass(backend, hidden, head, targets, index, coefficients, memory_budget, needed)
        return results._replace(normalizer=results.normalizer / multiplier), logps, entropy, gradients

    weighted = terms.effective_advantages(inputs, valid, dtype)
    row_weights = terms.row_weights(valid, config, dtype)
    row_weights = None if row_weights is None else row_weights * multiplier
    chunks = Chunks(backend, hidden, head, index, memory_budget, needed)
    for part, states, logits, out in chunks:
        old, ref, weights = (
            None if x is None else x[part][None].to(dtype) for x in (inputs.old_logps, inputs.ref_logps, row_weights)
        )
        found = backend.logits_loss(
            logits[None],
            targets[part][None],
            None,
            old,
            weighted[part][None],
            ref,
            weights,
            head.temperature,
            head.softcap,
            config,
            out[None],
        )
        logps[part], entropy[part] = (x[0] for x in found)
        chunks.add(part, states, out)
    results = backend.policy_loss(logps, inputs, config)
    return results._replace(normalizer=results.normalizer / multiplier), logps, entropy, chunks.gradients


def _second_pass(
    backend: Backend,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    index: Index,
    coefficients: Tensor,
    memory_budget: int | None,
    needed: GradientsNeeded,
) -> Gradients:
    """Returns the gradients of sum(coefficients * logps)."""
    scaling = (head.temperature, head.softcap)
    chunks = Chunks(backend, hidden, head, index, memory_budget, needed)
    for part, states, logits, out in chunks:
        of_logits = (logits[None], targets[part][None], None)
        _, lse, _ = backend.logits_logprobs(*of_logits, *scaling, False)
        backend.logits_gradient(*of_logits, lse, None, coefficients[part][None], None, None, *scaling, out[None])
        chunks.add(part, states, out)
    return chunks.gradients


def visual_dependency(
    backend: Backend,
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
        chunks = Chunks(backend, hidden, head, index, buffers=2)
        divergence = hidden.new_empty(index[0].shape, dtype=compute_dtype(hidden.dtype))
        pieces = divergence.split(chunks.tokens)
        for piece, (part, _, logits, _) in zip(pieces, chunks, strict=True):
            out = chunks.logits[1][: len(piece)]
            other = backend.logits_of(corrupted[part], corrupted_head.weight, corrupted_head.bias, out)
            piece.copy_(backend.logits_kl(logits, other, head.temperature, head.softcap))
        return divergence
    found, of_corrupted = (
        logprobs(backend, states, of, targets[index], index, False)[0]
        for states, of in ((hidden, head), (corrupted, corrupted_head))
    )
    return found - of_corrupted if kind == "logratio" else terms.k3(of_corrupted - found)
