"""What the tests of the vocabulary side share: inputs, and the same computed from whole logits."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels import PolicyLossConfig, PolicyLossOutput, policy_loss
from vgpo_kernels.testing import ragged_mask


class Scaling(NamedTuple):
    """What happens to logits before the softmax."""

    temperature: float = 1.0
    softcap: float | None = None


PLAIN = Scaling()


@dataclass(frozen=True)
class Case:
    """Hidden states and a head, and what the loss takes beside them."""

    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None
    targets: Tensor  # (B, T)
    mask: Tensor
    by_token: dict[str, Tensor | None]

    def parameters(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def to(self, dtype: torch.dtype) -> "Case":
        """The case in another dtype, as leaves that want a gradient; what the loss takes beside stays."""
        hidden, weight, bias = (
            None if x is None else x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight, self.bias)
        )
        return Case(hidden, weight, bias, self.targets, self.mask, self.by_token)

    def on(self, device: str) -> "Case":
        moved = [
            None if x is None else x.detach().to(device).requires_grad_() for x in (self.hidden, self.weight, self.bias)
        ]
        by_token = {name: None if x is None else x.to(device) for name, x in self.by_token.items()}
        return Case(*moved, self.targets.to(device), self.mask.to(device), by_token)


def random_case(
    lengths: list[int],
    length: int,
    *,
    size: int = 16,
    vocabulary: int = 50,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    scaling: Scaling = PLAIN,
) -> Case:
    """Log-ratios of standard deviation 0.5, masked targets of -100."""
    rows = len(lengths)
    hidden = torch.randn(rows, length, size).to(dtype)
    weight = (torch.randn(vocabulary, size) * 1.5 * size**-0.5).to(dtype)
    offsets = (0.5 * torch.randn(vocabulary)).to(dtype) if bias else None
    targets = torch.randint(0, vocabulary, (rows, length))
    mask = ragged_mask(lengths, length)
    logps = dense_logprobs(hidden.double(), weight.double(), _double(offsets), targets, scaling)[0].float()
    by_token = {
        "old_logps": logps + 0.5 * torch.randn(rows, length),
        "advantages": torch.randn(rows, length),
        "ref_logps": logps + 0.5 * torch.randn(rows, length),
        "token_weights": 0.1 + 1.9 * torch.rand(rows, length),
        "trajectory_weights": 0.9 + torch.rand(rows),
    }
    case = Case(hidden, weight, offsets, targets.masked_fill(~mask, -100), mask, by_token)
    return case.to(dtype)


def dense_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling) -> Tensor:
    """Whole logits (..., V), in the dtype of the product or at least float32."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return scaled(logits, scaling)


def scaled(logits: Tensor, scaling: Scaling) -> Tensor:
    if scaling.softcap is not None:
        logits = scaling.softcap * torch.tanh(logits / scaling.softcap)
    return logits / scaling.temperature


def of_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and LSEs of scaled logits, differentiable."""
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
    return chosen, entropy, logits.logsumexp(-1)


def dense_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scaling: Scaling
) -> tuple[Tensor, Tensor, Tensor]:
    return of_logits(dense_logits(hidden, weight, bias, scaling), targets)


def dense_loss(case: Case, config: PolicyLossConfig, scaling: Scaling, **options) -> PolicyLossOutput:
    """`policy_loss` of log-probabilities of whole logits; it has its own tests against TRL and transcriptions."""
    logps, entropy, _ = dense_logprobs(case.hidden, case.weight, case.bias, case.targets, scaling)
    output = policy_loss(logps, completion_mask=case.mask, config=config, impl="reference", **case.by_token, **options)
    masked = [torch.where(case.mask, x.detach(), 0.0) for x in (logps, entropy)]
    return output._replace(logps=masked[0], entropy=masked[1])


def _double(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()
