"""The focus score: how near each token's state is to the mean visual state."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import vgpo_kernels
from benchmarks.harness.cases import OURS, Case, Provider, Task, Work, compiled, half_on_gpu, ours_of
from benchmarks.peers import focus as peers
from benchmarks.tasks.sizes import LENGTHS, ROWS, VISUAL, paper_cases, sizes, small, sweep
from vgpo_kernels.testing import ragged_mask


class States(NamedTuple):
    """P prompt tokens, the first V of them visual, then completions of R, R - 16, R - 32, ... tokens."""

    hidden: Tensor  # (B, P + R, hidden)
    visual_mask: Tensor  # (B, P + R) bool
    completion_mask: Tensor  # (B, P + R) bool
    copied: Tensor  # (visual and completion tokens of all rows, hidden), for a copy of as much


def lengths(case: Case) -> list[int]:
    """Returns the tokens of each completion."""
    return [max(1, case["R"] - 16 * (row % 32)) for row in range(case["B"])]


def inputs(case: Case, device: torch.device) -> States:
    torch.manual_seed(0)
    B, P, V, R = (case[name] for name in ("B", "P", "V", "R"))
    hidden = torch.randn(B, P + R, case["hidden"], device=device, dtype=half_on_gpu(device))
    visual = (torch.arange(P + R, device=device) < V).expand(B, P + R)
    completion = torch.zeros(B, P + R, dtype=torch.bool, device=device)
    completion[:, P:] = ragged_mask(lengths(case), R).to(device)
    copied = hidden.new_zeros(B * V + sum(lengths(case)), case["hidden"])
    return States(hidden, visual, completion, copied)


def work(case: Case) -> Work:
    """Every visual and completion state once, every score once; a product of two states is two operations a column."""
    rows, scores = case["B"] * case["V"] + sum(lengths(case)), case["B"] * (case["P"] + case["R"])
    itemsize = half_on_gpu(torch.device(case.kind or "cpu")).itemsize
    return Work(4.0 * rows * case["hidden"], float(rows * case["hidden"] * itemsize + scores * 4))


def copy_of_rows(given: States) -> Tensor:
    """What the memory gives: as many bytes as the score reads, read once and written once."""
    return given.copied.copy_(given.hidden.flatten(0, 1)[: len(given.copied)])


def sweeps() -> list[Case]:
    held = sizes("7B", 1, 1024, 1024, 1024)
    cpu, gpu = held | {"hidden": 1024}, held | {"B": 8}
    return [
        *sweep("T", LENGTHS, cpu=cpu, gpu=gpu, varies="R", providers=(OURS, "dense torch")),
        *(replace(case, sizes={**case.sizes, "P": case["V"]}) for case in sweep("V", VISUAL, cpu=cpu, gpu=gpu)),
        *sweep("B", ROWS, cpu=cpu, gpu=gpu),
    ]


FOCUS = Task(
    "focus",
    cases=[
        *small(
            "B 8, P 1024 (1024 visual), R 1024, hidden 3584",
            tiny={"B": 3, "P": 24, "V": 20, "R": 40, "hidden": 40},
            **sizes("7B", 8, 1024, 1024, 1024),
        ),
        *paper_cases(),
        *sweeps(),
    ],
    inputs=inputs,
    providers={
        **ours_of(lambda given, impl: vgpo_kernels.visual_focus_score(*given[:3], impl=impl)),
        "copy of the rows read": Provider(copy_of_rows, "bound"),
        "dense torch": Provider(lambda given: peers.dense_focus(*given[:3])),
        "dense torch, torch.compile": Provider(lambda given: compiled(peers.dense_focus)(*given[:3]), compiled=True),
        "token loop": Provider(lambda given: peers.token_loop_focus(*given[:3])),
    },
    work=work,
)


@pytest.mark.task(FOCUS)
def test_focus(entry):
    entry.measure()
