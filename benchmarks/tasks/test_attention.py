"""Attention toward visual tokens: mass and column sums given the LSE, attention that returns the mass, its backward."""

import os
import unittest.mock
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vgpo_kernels
from benchmarks.harness.cases import IMPL, OURS, Case, Provider, Task, compiled, ours_of
from benchmarks.peers import attention as peers
from benchmarks.tasks.attention_cases import (
    ANY_MASK,
    TINY,
    Attention,
    attention_inputs,
    edge_cases,
    map_bytes,
    masked,
    not_side_by_side,
    sweeps,
    whole_map_bytes,
    work_of,
)
from benchmarks.tasks.sizes import paper_cases, sizes, small


def mass(given: Attention, impl: str | None) -> Tensor:
    q, k, lse = given.q, given.k, given.lse
    return vgpo_kernels.attention_mass(q, k, lse, given.segment_ids, given.num_segments, impl=impl, **given.masks)


def two_lse(backend: str | None) -> Callable[[Attention], Tensor]:
    return lambda given: peers.two_lse_mass(given.q, given.k, given.lse, given.images, backend)


def flex_mass(given: Attention) -> Tensor:
    """FlexAttention's LSE over the keys of each image, with keys for values, less the LSE over all."""
    masses = []
    for segment in range(given.num_segments):
        if segment not in given.prepared:
            visual = given.segment_ids == segment
            given.prepared[segment] = peers.flex_mask(given.sequences, given.q.shape[2], visual)
        _, lse = peers.flex(given.q, given.k, given.k, given.prepared[segment])
        masses.append((lse - given.lse).exp())
    return torch.stack(masses, -1)


def eager_mass(given: Attention) -> tuple[Tensor, ...]:
    return given.q, given.k, given.sequences, given.segment_ids, given.num_segments


MASS = Task(
    "attention mass, given the LSE",
    cases=[
        *small("7B, B 1, P 1024 (1024 visual), R 1024", tiny=TINY, **sizes("7B", 1, 1024, 1024, 1024)),
        *paper_cases(),
        *edge_cases((*ANY_MASK, "two LSEs, stock kernel", "FlexAttention"), cpu=True, few=True),
        *sweeps("T", "V", "B", providers=(OURS, "two LSEs, stock kernel")),
    ],
    inputs=attention_inputs,
    providers={
        **ours_of(mass),
        "two LSEs, stock kernel": Provider(two_lse(None), obstacle=not_side_by_side),
        "two LSEs, flash-attn 2": Provider(
            two_lse("flash_attn_2"), needs=("flash_attn",), gpu=True, obstacle=not_side_by_side
        ),
        "two LSEs, flash-attn 3": Provider(
            two_lse("flash_attn_3"), needs=("flash_attn_interface",), gpu=True, obstacle=not_side_by_side
        ),
        "FlexAttention": Provider(flex_mass, gpu=True, compiled=True),
        "eager map": Provider(lambda given: peers.eager_mass(*eager_mass(given)), extra_bytes=map_bytes),
        "eager map, torch.compile": Provider(
            lambda given: compiled(peers.eager_mass)(*eager_mass(given)),
            compiled=True,
            extra_bytes=map_bytes,
        ),
    },
    work=lambda case: work_of(case, passes=1, whole=False, visual_only=True),
)


@pytest.mark.task(MASS)
def test_attention_mass(entry):
    entry.measure()


def column_sum(given: Attention, impl: str | None) -> Tensor:
    q, k, lse = given.q, given.k, given.lse
    return vgpo_kernels.attention_column_sum(q, k, lse, given.visual_mask, impl=impl, **given.masks)


def eager_column_sum(given: Attention) -> tuple[Tensor, ...]:
    return given.q, given.k, given.sequences, given.visual_mask


def given_lse(given: Attention) -> tuple[Tensor, ...]:
    return given.q, given.k, given.lse, given.sequences, given.visual_mask


COLUMN = Task(
    "attention column sum, given the LSE",
    cases=[
        *small("7B, B 1, P 1024 (1024 visual), R 1024", tiny=TINY, **sizes("7B", 1, 1024, 1024, 1024)),
        *paper_cases(),
        *edge_cases((*ANY_MASK, "flash-colreduce"), few=True),
        *sweeps("T", "V", "B"),
    ],
    inputs=attention_inputs,
    providers={
        **ours_of(column_sum),
        "map of the wanted keys, given the LSE": Provider(
            lambda given: peers.map_column_sum(*given_lse(given)), extra_bytes=map_bytes, obstacle=masked
        ),
        "map of the wanted keys, given the LSE, torch.compile": Provider(
            lambda given: compiled(peers.map_column_sum)(*given_lse(given)),
            compiled=True,
            extra_bytes=map_bytes,
        ),
        "flash-colreduce": Provider(
            # It returns sums in the queries' dtype.
            lambda given: peers.colreduce(given.q, given.k, given.visual_mask),
            needs=("flash_colreduce",),
            gpu=True,
            obstacle=masked,
        ),
        "eager map": Provider(lambda given: peers.eager_column_sum(*eager_column_sum(given)), extra_bytes=map_bytes),
        "eager map, torch.compile": Provider(
            lambda given: compiled(peers.eager_column_sum)(*eager_column_sum(given)),
            compiled=True,
            extra_bytes=map_bytes,
        ),
    },
    work=lambda case: work_of(case, passes=1, whole=False, visual_only=True),
)


@pytest.mark.task(COLUMN)
def test_attention_column_sum(entry):
    entry.measure()


def of_completion(given: Attention, visual_mass: Tensor) -> Tensor:
    """Returns the mass at the completion's queries, which is what scores need and all that some providers give."""
    return visual_mass[..., given.prepared["prompt"] :]


def whole_inputs(case: Case, device: torch.device) -> Attention:
    given = attention_inputs(case, device, whole=True)
    given.prepared["prompt"] = case["P"]
    return given


def fused(given: Attention, impl: str | None) -> tuple[Tensor, Tensor]:
    found = vgpo_kernels.visual_attention(given.q, given.k, given.v, given.visual_mask, impl=impl, **given.masks)
    return found.out, of_completion(given, found.visual_mass)


def fused_in_gluon(given: Attention) -> tuple[Tensor, Tensor]:
    """The same with `VGPO_HOPPER=1`; the launch may not fall back to the plain kernel."""
    with unittest.mock.patch.dict(os.environ, VGPO_HOPPER="1"), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return fused(given, "triton")


def not_on_sm_90(case: Case) -> str | None:
    """Returns why the kernel in Gluon does not run here."""
    if torch.version.hip or torch.cuda.get_device_capability() != (9, 0):
        return "needs a GPU of compute capability 9.0"
    return None if case["D"] in (64, 128) else "takes heads of 64 and 128"


def stock_and_mass(given: Attention) -> tuple[Tensor, Tensor]:
    """The fastest stock kernel at hand, and our mass from its LSE."""
    out, lse = peers.stock_attention(given.q, given.k, given.v)
    asked = (given.prepared["prompt"], given.q.shape[2])
    return out, vgpo_kernels.attention_mass(given.q, given.k, lse, given.segment_ids, 1, query_range=asked, impl=IMPL)[
        ..., 0
    ]


def stock_twice(given: Attention) -> tuple[Tensor, Tensor]:
    """The fastest stock kernel at hand, and once more from the completion to the visual keys."""
    out, lse = peers.stock_attention(given.q, given.k, given.v)
    prompt = given.prepared["prompt"]
    return out, peers.two_lse_mass(given.q[:, :, prompt:], given.k, lse[..., prompt:], given.images)[..., 0]


def flex_once(given: Attention) -> tuple[Tensor, Tensor]:
    if "mask" not in given.prepared:
        given.prepared["mask"] = peers.flex_mask(given.sequences, given.q.shape[2])
    return peers.flex(given.q, given.k, given.v, given.prepared["mask"])


def flex_output(given: Attention) -> tuple[Tensor, Tensor]:
    """FlexAttention, and once more from the completion to the visual keys."""
    prompt = given.prepared["prompt"]
    if "visual mask" not in given.prepared:
        queries = given.q.shape[2] - prompt
        given.prepared["visual mask"] = peers.flex_mask(given.sequences, queries, given.visual_mask)
    out, lse = flex_once(given)
    _, visual_lse = peers.flex(given.q[:, :, prompt:], given.k, given.k, given.prepared["visual mask"])
    return out, (visual_lse - lse[..., prompt:]).exp()


def eager_output(given: Attention, run: Callable[..., Any] = peers.eager_output) -> tuple[Tensor, Tensor]:
    out, visual_mass = run(given.q, given.k, given.v, given.sequences, given.visual_mask)
    return out, of_completion(given, visual_mass)


FORWARD = Task(
    "attention with LSE and mass",
    cases=[
        *small("7B, B 1, P 512 (512 visual), R 512", tiny=TINY, **sizes("7B", 1, 512, 512, 512)),
        *paper_cases(),
        *edge_cases((*ANY_MASK, "FlexAttention, twice")),
        *sweeps("T", "V", "B"),
    ],
    inputs=whole_inputs,
    providers={
        **ours_of(fused),
        "vgpo_kernels in Gluon": Provider(fused_in_gluon, "ours", gpu=True, obstacle=not_on_sm_90),
        "vgpo_kernels, mass after a stock kernel": Provider(stock_and_mass, "ours"),
        "stock kernel, no mass": Provider(lambda given: peers.stock_attention(given.q, given.k, given.v), "bound"),
        "two LSEs, stock kernel": Provider(stock_twice),
        "FlexAttention, no mass": Provider(flex_once, "bound", gpu=True, compiled=True),
        "FlexAttention, twice": Provider(flex_output, gpu=True, compiled=True),
        "eager map": Provider(eager_output, extra_bytes=whole_map_bytes),
        "eager map, torch.compile": Provider(
            lambda given: eager_output(given, compiled(peers.eager_output)),
            compiled=True,
            extra_bytes=whole_map_bytes,
        ),
    },
    work=lambda case: work_of(case, passes=2, whole=True, visual_only=False),
)


@pytest.mark.task(FORWARD)
def test_attention_with_mass(entry):
    entry.measure()


def backward(name: str, forward: Callable[[Attention], tuple[Tensor, ...]], *, of_mass: bool = True):
    """Returns the gradients of q, k and v; the forward runs once, before anything is timed."""

    def run(given: Attention) -> tuple[Tensor, ...]:
        key = (name, id(given.q))
        if key not in given.prepared:
            given.prepared[key] = forward(given)
        outputs = given.prepared[key][: 1 + of_mass]
        wanted = (given.grad_out, given.grad_mass)[: 1 + of_mass]
        return torch.autograd.grad(outputs, (given.q, given.k, given.v), wanted, retain_graph=True)

    return run


def forward_of(impl: str | None) -> Callable[[Attention], tuple[Tensor, ...]]:
    def run(given: Attention) -> tuple[Tensor, ...]:
        inputs = (given.q, given.k, given.v, given.visual_mask)
        return vgpo_kernels.visual_attention(*inputs, impl=impl, **given.masks)[:2]

    return run


def eager_forward(given: Attention) -> tuple[Tensor, Tensor]:
    return peers.eager_output(given.q, given.k, given.v, given.sequences, given.visual_mask)


def flex_forward(given: Attention) -> tuple[Tensor, Tensor]:
    given.prepared["prompt"] = 0
    return flex_output(given)


def sdpa_forward(given: Attention) -> tuple[Tensor]:
    options = {"is_causal": True, "enable_gqa": True}
    return (torch.nn.functional.scaled_dot_product_attention(given.q, given.k, given.v, **options),)


BACKWARD = Task(
    "attention backward with a mass gradient",
    cases=[
        *small("7B, B 1, P 256 (256 visual), R 768", tiny=TINY, **sizes("7B", 1, 256, 256, 768)),
        *paper_cases(),
        *edge_cases(),
        # More tokens take two cores up to a minute a call.
        *(case for case in sweeps("T", "V", "B") if case.kind == "cuda" or (case["R"] <= 8192 and case["P"] <= 4096)),
    ],
    inputs=lambda case, device: attention_inputs(case, device, whole=True, gradients=True),
    providers={
        **ours_of(lambda given, impl: backward(impl or "ours", forward_of(impl))(given)),
        "vgpo_kernels, no mass gradient": Provider(backward(IMPL or "ours", forward_of(IMPL), of_mass=False), "bound"),
        "SDPA, no mass gradient": Provider(backward("sdpa", sdpa_forward, of_mass=False), "bound"),
        "FlexAttention, twice": Provider(backward("flex", flex_forward), gpu=True, compiled=True),
        "eager map": Provider(backward("eager", eager_forward), extra_bytes=lambda case: 2 * whole_map_bytes(case)),
    },
    work=lambda case: work_of(case, passes=5, whole=True, visual_only=False),
    keeps_forward=True,
)


@pytest.mark.task(BACKWARD)
def test_attention_backward(entry):
    entry.measure()
