"""Attention of one new token a row to its KV cache, with the visual mass."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import vgpo_kernels
from benchmarks.harness.cases import Case, Provider, Task, Work, compiled, half_on_gpu, ours_of
from benchmarks.peers import attention as peers
from benchmarks.tasks.sizes import LENGTHS, ROWS, paper_cases, sizes, small, sweep


class Cache(NamedTuple):
    """P + R tokens in the cache of each row, the first V of them visual; all rows are full."""

    q: Tensor  # (B, Hq, 1, D)
    k: Tensor  # (B, Hkv, P + R, D)
    v: Tensor  # (B, Hkv, P + R, D)
    visual_mask: Tensor  # (B, P + R) bool
    lengths: Tensor  # (B,) int64
    sequences: Tensor  # (B, P + R) int32, all 0: nothing is padding
    visual: int  # V


def inputs(case: Case, device: torch.device) -> Cache:
    torch.manual_seed(0)
    dtype, B, length, D = half_on_gpu(device), case["B"], case["P"] + case["R"], case["D"]
    q = torch.randn(B, case["heads"], 1, D, device=device, dtype=dtype)
    k, v = torch.randn(2, B, case["kv_heads"], length, D, device=device, dtype=dtype)
    visual = (torch.arange(length, device=device) < case["V"]).expand(B, length)
    sequences = torch.zeros_like(visual, dtype=torch.int32)
    return Cache(q, k, v, visual, torch.full((B,), length, device=device), sequences, case["V"])


def ours(given: Cache, impl: str | None) -> tuple[Tensor, Tensor]:
    return vgpo_kernels.visual_attention_decode(*given[:5], impl=impl)[:2]


def stock(given: Cache) -> Tensor:
    return scaled_dot_product_attention(given.q, given.k, given.v, enable_gqa=True)


def two_lse(given: Cache) -> tuple[Tensor, Tensor]:
    """The fastest stock kernel at hand, and once more to the visual keys, which are the first."""
    out, lse = peers.stock_attention(given.q, given.k, given.v, causal=False)
    return out, peers.two_lse_mass(given.q, given.k, lse, [[(0, given.visual)]])[..., 0]


def work(case: Case) -> Work:
    """Two products a cached token and query head; both caches are read once."""
    tokens, itemsize = case["B"] * (case["P"] + case["R"]), half_on_gpu(torch.device(case.kind or "cpu")).itemsize
    return Work(
        4.0 * case["heads"] * tokens * case["D"], 2.0 * case["kv_heads"] * tokens * case["D"] * itemsize + tokens
    )


HELD = sizes("7B", 8, 256, 256, 1792)

DECODE = Task(
    "attention of one token to a cache",
    cases=[
        *small(
            "7B, B 8, 2048 cached (1024 visual)",
            tiny={"B": 2, "P": 16, "V": 16, "R": 33, "heads": 4, "kv_heads": 2, "D": 32},
            **sizes("7B", 8, 1024, 1024, 1024),
        ),
        *paper_cases(),
        *sweep("T", LENGTHS, cpu=HELD | {"B": 1}, gpu=HELD, varies="R"),
        *sweep("B", ROWS, cpu=HELD, gpu=HELD),
    ],
    inputs=inputs,
    providers={
        **ours_of(ours),
        "SDPA, no mass": Provider(stock, "bound"),
        "two LSEs, stock kernel": Provider(two_lse),
        "eager map": Provider(lambda given: peers.eager_output(*given[:3], given.sequences, given.visual_mask)),
        "eager map, torch.compile": Provider(
            lambda given: compiled(peers.eager_output)(*given[:3], given.sequences, given.visual_mask),
            compiled=True,
        ),
    },
    work=work,
)


@pytest.mark.task(DECODE)
def test_decode(entry):
    entry.measure()
