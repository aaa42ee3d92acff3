"""Log-probabilities and the policy loss of hidden states and a head, without logits and with them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vgpo_kernels
from benchmarks.harness.cases import Case, Provider, Task, Work, compiled, half_on_gpu, ours_of
from benchmarks.peers import losses as peers
from benchmarks.tasks.sizes import LENGTHS, ROWS, WORDS, paper_cases, sizes, small, sweep
from benchmarks.tasks.test_policy_loss import BNPO

TINY = {"B": 2, "R": 24, "hidden": 40, "vocabulary": 97}
SMALL = sizes("7B", 1, 1024, 1024, 1024, hidden=512, vocabulary=50_000)
HELD = sizes("7B", 1, 0, 0, 512, hidden=128, vocabulary=4096)


class States(NamedTuple):
    """The states before R sampled tokens a row, and the head."""

    hidden: Tensor  # (B, R, hidden)
    weight: Tensor  # (vocabulary, hidden)
    targets: Tensor  # (B, R) int64
    old_logps: Tensor  # (B, R) fp32
    advantages: Tensor  # (B,) fp32
    mask: Tensor  # (B, R) bool


def inputs(case: Case, device: torch.device) -> States:
    torch.manual_seed(0)
    B, R, size, words, dtype = case["B"], case["R"], case["hidden"], case["vocabulary"], half_on_gpu(device)
    hidden = torch.randn(B, R, size, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(words, size, device=device, dtype=dtype).mul_(size**-0.5).requires_grad_()
    targets = torch.randint(0, words, (B, R), device=device)
    with torch.no_grad():
        old = vgpo_kernels.linear_logprobs(hidden, weight, targets).logps
    old += 0.1 * torch.randn_like(old)
    mask = torch.ones(B, R, dtype=torch.bool, device=device)
    return States(hidden, weight, targets, old, torch.randn(B, device=device), mask)


def products(case: Case, count: int) -> Work:
    """Counts so many products of states and head, and what they and their gradients are made of, moved once."""
    tokens, itemsize = case["B"] * case["R"], half_on_gpu(torch.device(case.kind or "cpu")).itemsize
    moved = (tokens + case["vocabulary"]) * case["hidden"] * itemsize * (2 if count > 1 else 1)
    return Work(2.0 * count * tokens * case["hidden"] * case["vocabulary"], float(moved))


def logits_bytes(copies: int) -> Callable[[Case], float]:
    """Returns what so many fp32 copies of the logits take."""
    return lambda case: 4.0 * copies * case["B"] * case["R"] * case["vocabulary"]


def without_gradients(function: Callable[..., Any]) -> Callable[[States], Any]:
    return torch.no_grad()(lambda given: function(*given[:3]))


@torch.no_grad()
def logprobs(given: States, impl: str | None) -> tuple[Tensor, Tensor]:
    return vgpo_kernels.linear_logprobs(*given[:3], entropy=True, impl=impl)[:2]


LOGPROBS = Task(
    "log-probs of hidden states",
    cases=[
        *small("B 1, R 1024, hidden 512, vocabulary 50,000", tiny=TINY, **SMALL),
        *paper_cases(),
        *sweep("T", LENGTHS, cpu=HELD, gpu=sizes("7B", 1, 0, 0, 0), varies="R"),
        *sweep("vocabulary", WORDS, cpu=HELD, gpu=sizes("7B", 8, 0, 0, 1024)),
        *sweep("B", ROWS, cpu=HELD, gpu=sizes("7B", 0, 0, 0, 1024)),
    ],
    inputs=inputs,
    providers={
        **ours_of(logprobs),
        "dense torch": Provider(without_gradients(peers.dense_logprobs), extra_bytes=logits_bytes(4)),
        "dense torch, torch.compile": Provider(
            without_gradients(lambda *given: compiled(peers.dense_logprobs)(*given)),
            compiled=True,
            extra_bytes=logits_bytes(4),
        ),
        "TRL fused head": Provider(without_gradients(peers.trl_fused_head), needs=("trl",)),
        "Liger's cross-entropy with entropy (CuTe on sm_90)": Provider(
            without_gradients(peers.liger_scaled_cross_entropy), needs=("liger_kernel",)
        ),
        # They have no entropy to give.
        "cut-cross-entropy, no entropy": Provider(
            without_gradients(peers.cut_cross_entropy), "bound", needs=("cut_cross_entropy",), gpu=True
        ),
        "Liger's cross-entropy, no entropy": Provider(
            without_gradients(peers.liger_cross_entropy), "bound", needs=("liger_kernel",), gpu=True
        ),
    },
    work=lambda case: products(case, 1),
)


@pytest.mark.task(LOGPROBS)
def test_linear_logprobs(entry):
    entry.measure()


def with_gradients(loss_of: Callable[[States], Tensor]) -> Callable[[States], tuple[Tensor, ...]]:
    def run(given: States) -> tuple[Tensor, ...]:
        loss = loss_of(given)
        return loss.detach(), *torch.autograd.grad(loss, given[:2])

    return run


def linear_loss(impl: str | None) -> Callable[[States], Tensor]:
    return lambda given: vgpo_kernels.linear_policy_loss(*given, config=BNPO, impl=impl).loss


def after(function: Callable[..., Any]) -> Callable[[States], Tensor]:
    """Returns the dense loss of the log-probabilities that a function makes of states and head."""
    return lambda given: peers.dense_policy_loss(function(*given[:3])[0], *given[3:])


def cut_loss(given: States) -> Tensor:
    return peers.dense_policy_loss(peers.cut_cross_entropy(*given[:3]), *given[3:])


LOSS = Task(
    "policy loss of hidden states",
    cases=[
        *small("B 1, R 1024, hidden 512, vocabulary 50,000", tiny=TINY, **SMALL),
        *paper_cases(),
        *sweep("T", LENGTHS, cpu=HELD, gpu=sizes("7B", 1, 0, 0, 0), varies="R"),
        *sweep("vocabulary", WORDS, cpu=HELD, gpu=sizes("7B", 8, 0, 0, 1024)),
        *sweep("B", ROWS, cpu=HELD, gpu=sizes("7B", 0, 0, 0, 1024)),
    ],
    inputs=inputs,
    providers={
        **ours_of(lambda given, impl: with_gradients(linear_loss(impl))(given)),
        "dense torch": Provider(with_gradients(after(peers.dense_logprobs)), extra_bytes=logits_bytes(5)),
        "dense torch, torch.compile": Provider(
            with_gradients(after(lambda *given: compiled(peers.dense_logprobs)(*given))),
            compiled=True,
            extra_bytes=logits_bytes(5),
        ),
        "TRL fused head": Provider(with_gradients(after(peers.trl_fused_head)), needs=("trl",)),
        "Liger": Provider(
            with_gradients(lambda given: peers.liger_linear_loss(*given)), needs=("liger_kernel",), compiled=True
        ),
        "Liger's cross-entropy (CuTe on sm_90), loss in torch": Provider(
            with_gradients(after(peers.liger_scaled_cross_entropy)), needs=("liger_kernel",)
        ),
        "cut-cross-entropy": Provider(with_gradients(cut_loss), needs=("cut_cross_entropy",), gpu=True),
    },
    work=lambda case: products(case, 3),
)


@pytest.mark.task(LOSS)
def test_linear_policy_loss(entry):
    entry.measure()
