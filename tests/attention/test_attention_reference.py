"""The reference against attention written down densely in float64, and the memory it takes."""

import subprocess
import sys

import pytest
import torch
from dense_attention import column_sums, dense_attention, inputs, intervals, segment_masses, segments, visible_keys
from torch import Tensor

from vgpo_kernels.attention import reference
from vgpo_kernels.attention.intervals import KeyMask
from vgpo_kernels.testing import assert_error_budget

MASKS = ("full", "causal", "left", "right", "packed", "window", "blocks", "empty", "blind", "arbitrary")
B, LENGTHS = 2, (37, 61)  # no multiple of any block, and more keys than queries


def poisoned(q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, kinds: Tensor) -> list[Tensor]:
    """Returns q, k, v with NaN where nothing sees and nothing is seen."""
    visible = visible_keys(key_start, key_end, k.shape[2], kinds)
    blind, unseen = ~visible.any(2), ~visible.any(1)
    return [x.masked_fill(bad[:, None, :, None], torch.nan) for x, bad in ((q, blind), (k, unseen), (v, unseen))]


def kinds_of_keys(Lk: int) -> Tensor:
    """Returns (B, Lk) int8 with every kind in it, the hidden ones in the middle of a row."""
    kinds = torch.randint(1, 3, (B, Lk)).to(torch.int8)
    kinds[0, 20], kinds[1, 30:33] = 0, 0
    return kinds


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mask", MASKS)
def test_it_is_dense_attention(mask: str, softcap: float | None) -> None:
    q, k, v = (x.double() for x in inputs(B, (6, 2), LENGTHS, 24))
    bounds, kinds = intervals(mask, B, *LENGTHS), kinds_of_keys(LENGTHS[1])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dense = dense_attention(*leaves, *bounds, key_kinds=kinds, scale=0.3, softcap=softcap)
    mass = (dense.probabilities * (kinds == 2)[:, None, None]).sum(-1)
    grads = [torch.randn_like(x) for x in (dense.out, mass, dense.lse)]
    finite_lse = dense.lse.masked_fill(dense.lse.isneginf(), 0.0)
    torch.autograd.backward((dense.out, mass, finite_lse), grads)

    bad = poisoned(q, k, v, *bounds, kinds)
    results = reference.visual_attention(*bad, KeyMask(*bounds, kinds), 0.3, softcap)
    for result, expected in zip(results, (dense.out, mass, dense.lse), strict=True):
        torch.testing.assert_close(result, expected.detach(), rtol=1e-10, atol=1e-12)
    gradients = reference.visual_attention_backward(*grads, *bad, KeyMask(*bounds, kinds), *results, 0.3, softcap)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        # The dense softmax of a row without keys has NaN gradients; nothing depends on such a row.
        torch.testing.assert_close(gradient, leaf.grad.nan_to_num(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wanted", ["image", "two", "all", "none", "complete", "images", "scattered"])
@pytest.mark.parametrize("mask", MASKS)
def test_masses_and_column_sums_are_those_of_the_dense_map(mask: str, wanted: str) -> None:
    q, k, v = (x.double() for x in inputs(B, (6, 2), LENGTHS, 24))
    bounds = intervals(mask, B, *LENGTHS)
    dense = dense_attention(q, k, v, *bounds)
    ids, count = segments(wanted, B, LENGTHS[1])
    bad_q, bad_k, _ = poisoned(q, k, v, *bounds, torch.ones(B, LENGTHS[1]))
    bad_k = bad_k.masked_fill((ids < 0)[:, None, :, None], torch.nan)
    mass = reference.attention_mass(bad_q, bad_k, dense.lse, ids, *bounds, count, 24**-0.5, None)
    torch.testing.assert_close(mass, segment_masses(dense.probabilities, ids, count), rtol=1e-10, atol=1e-12)
    if wanted == "complete":
        sees = (bounds[0] < bounds[1]).double()[:, None].expand_as(mass[..., 0])
        torch.testing.assert_close(mass.sum(-1), sees)
    positions = torch.where(ids >= 0, torch.arange(LENGTHS[1]), -1).flip(1).int()
    for reduction in ("sum", "mean", "max"):
        received = reference.attention_column_sum(
            bad_q, bad_k, dense.lse, positions, *bounds, reduction, 24**-0.5, None
        )
        expected = column_sums(dense.probabilities, positions, reduction)
        torch.testing.assert_close(received, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("D", [72, 512])  # no power of two; the largest
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_is_within_the_budget(dtype: torch.dtype, D: int) -> None:
    q, k, v = inputs(B, (4, 2), LENGTHS, D, dtype)
    bounds, kinds = intervals("causal", B, *LENGTHS), kinds_of_keys(LENGTHS[1])
    outs = []
    for tensors in ((q, k, v), (q.double(), k.double(), v.double())):
        leaves = [x.clone().requires_grad_() for x in tensors]
        dense = dense_attention(*leaves, *bounds, key_kinds=kinds)
        mass = (dense.probabilities * (kinds == 2)[:, None, None]).sum(-1)
        (dense.out.sum() + mass.sum() + dense.lse.sum()).backward()
        outs.append([dense.out.detach(), mass.detach(), dense.lse.detach(), *(leaf.grad for leaf in leaves)])
    results = reference.visual_attention(q, k, v, KeyMask(*bounds, kinds), D**-0.5, None)
    ones = [torch.ones_like(x) for x in results]
    gradients = reference.visual_attention_backward(*ones, q, k, v, KeyMask(*bounds, kinds), *results, D**-0.5, None)
    names = ("out", "mass", "lse", "grad q", "grad k", "grad v")
    for name, actual, same, exact in zip(names, (*results, *gradients), *outs, strict=True):
        assert_error_budget(name, actual, same, exact)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one query and of seven keys give what one block gives."""
    q, k, v = (x.double() for x in inputs(B, (4, 2), LENGTHS, 16))
    bounds, kinds = intervals("window", B, *LENGTHS), kinds_of_keys(LENGTHS[1])
    ids, count = segments("scattered", B, LENGTHS[1])

    def everything() -> list[Tensor]:
        results = reference.visual_attention(q, k, v, KeyMask(*bounds, kinds), 0.25, None)
        gradients = reference.visual_attention_backward(
            *results, q, k, v, KeyMask(*bounds, kinds), *results, 0.25, None
        )
        mass = reference.attention_mass(q, k, results[2], ids, *bounds, count, 0.25, None)
        received = [
            reference.attention_column_sum(q, k, results[2], ids, *bounds, reduction, 0.25, None)
            for reduction in ("sum", "mean", "max")
        ]
        return [*results, *gradients, mass, *received]

    whole = everything()
    monkeypatch.setattr(reference, "SCORES", 1)
    monkeypatch.setattr(reference, "KEYS", 7)
    for one, many in zip(whole, everything(), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12)


_MEMORY = """
import torch, vgpo_kernels
L = 8192
q = torch.randn(1, L, 28, 128).transpose(1, 2)
k, v = (torch.randn(1, L, 4, 128).transpose(1, 2) for _ in range(2))
visual = (torch.arange(L)[None] >= 64) & (torch.arange(L)[None] < 1088)

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024

def extra(make):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    result = make()
    size = sum(x.numel() * x.element_size() for x in (result if isinstance(result, tuple) else (result,)))
    print(round(status("VmHWM") - before - size / 2**20, 1))
    return result

vgpo_kernels.visual_attention(q[:, :, :8], k[:, :, :8], v[:, :, :8], visual[:, :8])
out, lse = extra(lambda: vgpo_kernels.attention_with_lse(q, k, v))
extra(lambda: vgpo_kernels.attention_mass(q, k, lse, visual.int() - 1, 1))
extra(lambda: vgpo_kernels.attention_column_sum(q, k, lse, visual))
extra(lambda: vgpo_kernels.visual_attention(q, k, v, visual))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_8k_by_8k_with_28_heads_takes_tens_of_megabytes() -> None:
    """8192 queries and keys in fp32, forward; an attention map would take 7.5 GB."""
    run = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    extras = [float(line) for line in run.stdout.split()]
    assert len(extras) == 4
    assert max(extras) < 100, extras


def test_gradients_of_the_public_function_pass_gradcheck() -> None:
    from vgpo_kernels import attention_with_lse, visual_attention

    q, k, v = (x.double().contiguous().requires_grad_() for x in inputs(1, (2, 1), (4, 6), 3))
    visual = torch.tensor([[0, 1, 1, 0, 0, 1]])
    for softcap in (None, 0.7):
        assert torch.autograd.gradcheck(
            lambda *x, cap=softcap: visual_attention(*x, visual, softcap=cap, scale=0.9), (q, k, v)
        )
        assert torch.autograd.gradcheck(lambda *x, cap=softcap: attention_with_lse(*x, softcap=cap), (q, k, v))
