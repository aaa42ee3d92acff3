"""Token and trajectory weights by the paper's recipe."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import vgpo_kernels
from benchmarks.harness.cases import Case, Provider, Task, Work, ours_of
from benchmarks.peers import focus as peers
from benchmarks.tasks.sizes import LENGTHS, ROWS, paper_cases, sizes, small, sweep
from vgpo_kernels import VGPOConfig
from vgpo_kernels.testing import ragged_mask

CONFIG = VGPOConfig.paper()
GROUP = 8  # completions of a prompt


class Scores(NamedTuple):
    """Focus of completions of R, R - 16, R - 32, ... tokens, eight of them for each prompt."""

    focus: Tensor  # (B, R) fp32
    completion_mask: Tensor  # (B, R) bool
    group_ids: Tensor  # (B,) int64


def inputs(case: Case, device: torch.device) -> Scores:
    torch.manual_seed(0)
    B, R = case["B"], case["R"]
    mask = ragged_mask([max(R // 2, R - 16 * (row % 32)) for row in range(B)], R).to(device)
    return Scores(torch.rand(B, R, device=device) * 2 - 1, mask, torch.arange(B, device=device) // GROUP)


def ours(given: Scores, impl: str | None) -> tuple[Tensor, Tensor]:
    return vgpo_kernels.vgpo_weights(*given, CONFIG, impl=impl)[:2]


def work(case: Case) -> Work:
    """Focus and mask read once, token weights written once; no products."""
    return Work(0.0, float(case["B"] * case["R"] * (4 + 1 + 4)))


HELD = sizes("7B", 64, 1024, 1024, 2048)

WEIGHTS = Task(
    "weights",
    cases=[
        *small("B 64, R 2048", tiny={"B": 16, "R": 64}, **sizes("7B", 64, 1024, 1024, 2048)),
        *paper_cases(),
        *sweep("T", LENGTHS, cpu=HELD, gpu=HELD, varies="R"),
        *sweep("B", tuple(GROUP * rows for rows in ROWS), cpu=HELD, gpu=HELD),
    ],
    inputs=inputs,
    providers={
        **ours_of(ours),
        "token loop": Provider(lambda given: peers.token_loop_weights(*given)),
    },
    work=work,
    dtype=lambda _: torch.float32,
    least=2,
)


@pytest.mark.task(WEIGHTS)
def test_weights(entry):
    entry.measure()
