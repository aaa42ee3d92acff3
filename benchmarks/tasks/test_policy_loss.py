"""The policy loss of log-probabilities and of logits, forward and backward, and log-probabilities of logits."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import vgpo_kernels
from benchmarks.harness.cases import Case, Provider, Task, Work, compiled, half_on_gpu, ours_of
from benchmarks.peers import losses as peers
from benchmarks.tasks.sizes import LENGTHS, ROWS, WORDS, paper_cases, sizes, small, sweep
from vgpo_kernels import PolicyLossConfig
from vgpo_kernels.testing import ragged_mask

CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28}
DAPO, BNPO = PolicyLossConfig(loss_type="dapo", **CLIP), PolicyLossConfig(loss_type="bnpo", **CLIP)


def completions(case: Case, device: torch.device) -> Tensor:
    """Returns the (B, R) mask of completions of R, R - 16, R - 32, ... tokens."""
    return ragged_mask([max(1, case["R"] - 16 * (row % 32)) for row in range(case["B"])], case["R"]).to(device)


class Logps(NamedTuple):
    """What the loss is made of once log-probabilities are known."""

    logps: Tensor  # (B, R) fp32
    old_logps: Tensor  # (B, R) fp32
    advantages: Tensor  # (B,) fp32
    mask: Tensor  # (B, R) bool


def logps_inputs(case: Case, device: torch.device) -> Logps:
    torch.manual_seed(0)
    logps = torch.randn(case["B"], case["R"], device=device).requires_grad_()
    old = logps.detach() + 0.1 * torch.randn_like(logps)
    return Logps(logps, old, torch.randn(case["B"], device=device), completions(case, device))


def with_gradient(loss_of: Callable[[Logps], Tensor]) -> Callable[[Logps], tuple[Tensor, Tensor]]:
    def run(given: Logps) -> tuple[Tensor, Tensor]:
        loss = loss_of(given)
        return loss.detach(), *torch.autograd.grad(loss, given.logps)

    return run


def logps_loss(impl: str | None) -> Callable[[Logps], Tensor]:
    return lambda given: vgpo_kernels.policy_loss(*given, config=DAPO, impl=impl).loss


LOGPS = Task(
    "policy loss of log-probs",
    cases=[
        *small("B 64, R 2048", tiny={"B": 4, "R": 48}, **sizes("7B", 64, 1024, 1024, 2048)),
        *paper_cases(),
        *sweep("T", LENGTHS, cpu=sizes("7B", 16, 0, 0, 0), gpu=sizes("7B", 64, 0, 0, 0), varies="R"),
        *sweep("B", ROWS, cpu=sizes("7B", 0, 0, 0, 8192), gpu=sizes("7B", 0, 0, 0, 8192)),
    ],
    inputs=logps_inputs,
    providers={
        **ours_of(lambda given, impl: with_gradient(logps_loss(impl))(given)),
        "dense torch": Provider(with_gradient(lambda given: peers.dense_policy_loss(*given))),
        "dense torch, torch.compile": Provider(
            with_gradient(lambda given: compiled(peers.dense_policy_loss)(*given)),
            compiled=True,
        ),
        "TRL": Provider(with_gradient(lambda given: peers.trl_policy_loss(*given)), needs=("trl",)),
    },
    # Three arrays of floats and a mask read, one of floats written: the gradient.
    work=lambda case: Work(0.0, float(case["B"] * case["R"] * (4 + 4 + 1 + 4))),
    dtype=lambda _: torch.float32,
)


@pytest.mark.task(LOGPS)
def test_policy_loss(entry):
    entry.measure()


class Logits(NamedTuple):
    """Logits of R tokens a row and of one more, which `longer` holds for the peers that take it."""

    logits: Tensor  # (B, R, vocabulary), a leaf on the memory of `longer`
    longer: Tensor  # (B, R + 1, vocabulary), a leaf
    targets: Tensor  # (B, R) int64
    old_logps: Tensor  # (B, R) fp32
    advantages: Tensor  # (B,) fp32
    mask: Tensor  # (B, R) bool


def logits_inputs(case: Case, device: torch.device) -> Logits:
    torch.manual_seed(0)
    B, R, words = case["B"], case["R"], case["vocabulary"]
    longer = torch.randn(B, R + 1, words, device=device, dtype=half_on_gpu(device))
    targets = torch.randint(0, words, (B, R), device=device)
    old = vgpo_kernels.selective_logprobs(longer[:, :-1], targets).logps
    old += 0.1 * torch.randn_like(old)
    logits = longer[:, :-1].detach().requires_grad_()
    return Logits(
        logits, longer.requires_grad_(), targets, old, torch.randn(B, device=device), completions(case, device)
    )


def of_logits(loss_of: Callable[[Logits], Tensor]) -> Callable[[Logits], tuple[Tensor, Tensor]]:
    def run(given: Logits) -> tuple[Tensor, Tensor]:
        loss = loss_of(given)
        return loss.detach(), *torch.autograd.grad(loss, given.logits)

    return run


def logits_loss(impl: str | None) -> Callable[[Logits], Tensor]:
    return lambda given: vgpo_kernels.logits_policy_loss(given.logits, *given[2:], config=BNPO, impl=impl).loss


def after(logprobs: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Logits], Tensor]:
    """Returns the dense loss of what a function makes of the logits."""
    return lambda given: peers.dense_policy_loss(logprobs(given.logits, given.targets), *given[3:])


def liger_loss(given: Logits) -> tuple[Tensor, Tensor]:
    loss = peers.liger_logits_loss(given.longer, *given[2:])
    return loss.detach(), torch.autograd.grad(loss, given.longer)[0][:, :-1]


def dense_bytes(case: Case) -> float:
    """Returns what log-softmax in fp32 and its backward hold at once."""
    return 12.0 * case["B"] * case["R"] * case["vocabulary"]


def read(case: Case, times: int) -> Work:
    """Counts the logits moved so many times; there are no products."""
    itemsize = half_on_gpu(torch.device(case.kind or "cpu")).itemsize
    return Work(0.0, float(case["B"] * case["R"] * case["vocabulary"] * itemsize * times))


TINY = {"B": 2, "R": 9, "vocabulary": 97}
SMALL = sizes("7B", 1, 1024, 1024, 512, vocabulary=50_000)
SWEPT = [
    *sweep("T", LENGTHS, cpu=sizes("7B", 1, 0, 0, 0, vocabulary=1024), gpu=sizes("7B", 1, 0, 0, 0), varies="R"),
    *sweep("vocabulary", WORDS, cpu=sizes("7B", 1, 0, 0, 256), gpu=sizes("7B", 8, 0, 0, 1024)),
    *sweep("B", ROWS, cpu=sizes("7B", 0, 0, 0, 256, vocabulary=8192), gpu=sizes("7B", 0, 0, 0, 1024)),
]

LOGITS = Task(
    "policy loss of logits",
    cases=[*small("B 1, R 512, vocabulary 50,000", tiny=TINY, **SMALL), *paper_cases(), *SWEPT],
    inputs=logits_inputs,
    providers={
        **ours_of(lambda given, impl: of_logits(logits_loss(impl))(given)),
        "dense torch": Provider(of_logits(after(peers.dense_selective)), extra_bytes=dense_bytes),
        "dense torch, torch.compile": Provider(
            of_logits(after(lambda *given: compiled(peers.dense_selective)(*given))),
            compiled=True,
            extra_bytes=dense_bytes,
        ),
        "TRL": Provider(of_logits(after(peers.trl_selective)), needs=("trl",), extra_bytes=dense_bytes),
        "Liger": Provider(liger_loss, needs=("liger_kernel",), gpu=True),
    },
    work=lambda case: read(case, 2),
)


@pytest.mark.task(LOGITS)
def test_logits_policy_loss(entry):
    entry.measure()


def selective(given: Logits, impl: str | None) -> Tensor:
    return vgpo_kernels.selective_logprobs(given.logits, given.targets, impl=impl).logps


SELECTIVE = Task(
    "selective log-probs of logits",
    cases=[*small("B 1, R 512, vocabulary 50,000", tiny=TINY, **SMALL), *paper_cases(), *SWEPT],
    inputs=logits_inputs,
    providers={
        **ours_of(torch.no_grad()(selective)),
        "dense torch": Provider(
            torch.no_grad()(lambda g: peers.dense_selective(g.logits, g.targets)), extra_bytes=dense_bytes
        ),
        "dense torch, torch.compile": Provider(
            torch.no_grad()(lambda g: compiled(peers.dense_selective)(g.logits, g.targets)),
            compiled=True,
            extra_bytes=dense_bytes,
        ),
        "TRL": Provider(torch.no_grad()(lambda g: peers.trl_selective(g.logits, g.targets)), needs=("trl",)),
    },
    work=lambda case: read(case, 1),
)


@pytest.mark.task(SELECTIVE)
def test_selective_logprobs(entry):
    entry.measure()
