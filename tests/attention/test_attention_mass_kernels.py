"""The mass kernel against dense float64 attention, on the masks and segments that break kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense_attention import dense_attention, inputs, intervals, segment_masses, segments, visible_keys
from torch import Tensor

from vgpo_kernels.attention.triton import attention_mass
from vgpo_kernels.testing import assert_error_budget

MASKS = ("full", "causal", "left", "right", "packed", "window", "blocks", "empty", "blind", "arbitrary")
# Triton's interpreter multiplies bf16 bit patterns: that dtype is for a GPU.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
B, LENGTHS = 2, (45, 150)  # fewer queries than keys, no multiple of a tile, three tiles of keys


def check(
    q: Tensor,
    k: Tensor,
    mask: str | tuple[Tensor, Tensor],
    wanted: str | tuple[Tensor, int],
    device: str,
    softcap: float | None = None,
) -> Tensor:
    """Compares the kernel on `device` with dense attention on the CPU, at the same fp32 LSE; returns the masses."""
    bounds = intervals(mask, len(q), q.shape[2], k.shape[2]) if isinstance(mask, str) else mask
    ids, count = segments(wanted, len(q), k.shape[2]) if isinstance(wanted, str) else wanted
    scale = q.shape[-1] ** -0.5
    lse = dense_attention(q.double(), k.double(), None, *bounds, softcap=softcap).lse.float()
    exact, same_dtype = (
        segment_masses(dense_attention(*x, None, *bounds, softcap=softcap, lse=lse).probabilities, ids, count)
        for x in ((q.double(), k.double()), (q, k))
    )
    arguments = [x.to(device) for x in (q, k, lse, ids, *bounds)]
    masses = attention_mass(*arguments, count, scale, softcap).cpu()
    assert masses.dtype == torch.float32
    assert_error_budget("mass", masses, same_dtype, exact)
    return masses


@pytest.mark.parametrize("wanted", ["image", "two", "all", "none", "complete", "scattered"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_and_segmentation(device: str, mask: str, wanted: str) -> None:
    q, k, _ = inputs(B, (4, 2), LENGTHS, 16)
    masses = check(q, k, mask, wanted, device)
    if wanted == "none" or mask == "blind":
        assert torch.equal(masses, torch.zeros_like(masses))
    if wanted == "complete":
        start, end = intervals(mask, B, *LENGTHS)
        seen = (start < end).float()[:, None].expand(masses.shape[:3])
        torch.testing.assert_close(masses.sum(-1), seen, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
# Powers of two, multiples of eight that are none, a head no vector divides, and one with a single vector. Above 256
# tiles are others, and rows that no vector divides are laid out anew.
@pytest.mark.parametrize("D", [8, 32, 64, 72, 80, 96, 100, 128, 256, 289, 512])
def test_head_sizes(device: str, dtype: torch.dtype, D: int) -> None:
    q, k, _ = inputs(1, (2, 1), (20, 140), D, dtype)
    check(q, k, "causal", "two", device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (14, 2)])  # groups of 1, 2 and 7: 128 rows cut one of 7
def test_groups_of_heads(device: str, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    q, k, _ = inputs(2, heads, (70, 100), 32, dtype)
    check(q, k, "window", "two", device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_segments_than_a_program_sums(device: str, dtype: torch.dtype) -> None:
    q, k, _ = inputs(1, (1, 1), (9, 170), 16, dtype)
    check(q, k, "full", "images", device)  # 40 segments: five blocks of eight
    ids = torch.arange(170).remainder(11).int()[None]  # 11: the second block is cut
    masses = check(q, k, "causal", (ids, 11), device)
    torch.testing.assert_close(masses.sum(-1), torch.ones_like(masses[..., 0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 50.0])  # most scores at the cap, none near it
def test_softcap(device: str, dtype: torch.dtype, softcap: float) -> None:
    q, k, _ = inputs(B, (4, 2), LENGTHS, 24, dtype)
    check(4 * q, k, "causal", "two", device, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_heads_in_groups_with_a_window_and_a_softcap(device: str, dtype: torch.dtype) -> None:
    q, k, _ = inputs(B, (4, 2), (21, 75), 320, dtype)
    check(4 * q, k, "window", "two", device, 5.0)


def test_more_tiles_than_are_listed_at_once(device: str) -> None:
    # 16 tiles of 64 keys are listed together: these are 19, the last one with 5 keys.
    q, k, _ = inputs(1, (1, 1), (5, 1157), 16, torch.float16)
    check(q, k, "full", "two", device)
    check(q, k, "full", "all", device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_tiles_with_wanted_keys_are_loaded(device: str, dtype: torch.dtype) -> None:
    # Keys 70 to 200 are wanted: they lie in tiles 1 to 3 of 64 keys, so NaN in tiles 0 and 4 is never seen, though
    # every query attends there; neither is NaN beside wanted keys, in tiles 1 and 3.
    q, k, _ = inputs(1, (2, 1), (40, 320), 32, dtype)
    ids = torch.full((1, 320), -1).int()
    ids[:, 70:200] = 0
    bounds = intervals("full", 1, 40, 320)
    lse = dense_attention(q.double(), k.double(), None, *bounds).lse.float()
    expected = check(q, k, bounds, (ids, 1), device)
    k = k.masked_fill(ids[:, None, :, None] < 0, torch.nan)
    arguments = [x.to(device) for x in (q, k, lse, ids, *bounds)]
    assert torch.equal(attention_mass(*arguments, 1, 32**-0.5, None).cpu(), expected)
    assert expected.min() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["left", "right", "empty", "blind", "window"])
def test_what_nothing_sees_may_be_nan(device: str, mask: str, dtype: torch.dtype) -> None:
    q, k, _ = inputs(B, (4, 2), LENGTHS, 16, dtype)
    bounds = intervals(mask, B, *LENGTHS)
    visible = visible_keys(*bounds, LENGTHS[1])
    blind, unseen = ~visible.any(2), ~visible.any(1)
    assert blind.any() or unseen.any()
    expected = check(q, k, bounds, "all", device)
    q = q.masked_fill(blind[:, None, :, None], torch.nan)
    k = k.masked_fill(unseen[:, None, :, None], torch.nan)
    masses = check(q, k, bounds, "all", device)
    assert torch.equal(masses, expected)
    lse = torch.full(q.shape[:3], torch.nan).to(device)
    blank = [x.to(device) for x in (q, k)]
    ids, count = segments("all", B, LENGTHS[1])
    ends = [x.to(device) for x in bounds]
    garbage = attention_mass(*blank, lse, ids.to(device), *ends, count, 0.25, None).cpu()
    # A NaN in the LSE of a blind query does not come out; in that of another it does.
    assert torch.equal(garbage[..., 0].isnan(), ~blind[:, None].expand(garbage.shape[:3]))


@pytest.mark.parametrize("D", [16, 256])
def test_a_nan_that_is_seen_comes_out_where_it_is_seen(device: str, D: int) -> None:
    # Every fifth query sees nothing, and every other one all 130 keys; two tiles are full.
    q, k, _ = inputs(1, (2, 1), (40, 130), D)
    k[:, :, 7] = torch.nan
    bounds = intervals("full", 1, 40, 130)
    blind = torch.arange(40) % 5 == 0
    bounds = (bounds[0], bounds[1].masked_fill(blind, 0))
    ids, count = segments("all", 1, 130)
    arguments = [x.to(device) for x in (q, k, torch.ones(1, 2, 40), ids, *bounds)]
    masses = attention_mass(*arguments, count, 0.25, None).cpu()[..., 0]
    assert masses[..., ~blind].isnan().all()
    assert torch.equal(masses[..., blind], torch.zeros(1, 2, 8))


def test_a_hidden_row_of_lse_gives_nothing(device: str) -> None:
    # An interval that is not empty, but an LSE of -inf: all its keys are hidden one by one.
    q, k, _ = inputs(1, (1, 1), (8, 64), 16)
    ids, count = segments("all", 1, 64)
    bounds = [x.to(device) for x in intervals("full", 1, 8, 64)]
    lse = torch.full((1, 1, 8), -torch.inf).to(device)
    masses = attention_mass(q.to(device), k.to(device), lse, ids.to(device), *bounds, count, 0.25, None)
    assert torch.equal(masses, torch.zeros_like(masses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "a column off", "rows of odd length", "transposed", "expanded"])
def test_strided_inputs(device: str, layout: str, dtype: torch.dtype) -> None:
    q, k, _ = inputs(B, (4, 2), LENGTHS, 16, dtype)
    plain = check(q.contiguous(), k.contiguous(), "causal", "two", device)
    if layout == "a column off":
        q, k = (torch.nn.functional.pad(x, (1, 7))[..., 1:17] for x in (q, k))
    elif layout == "rows of odd length":
        q, k = (torch.nn.functional.pad(x, (0, 3))[..., :16] for x in (q, k))
    elif layout == "transposed":  # elements of a head are not side by side
        q, k = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k))
    elif layout == "expanded":
        q, k = q[:1].expand(B, -1, -1, -1), k[:1].expand(B, -1, -1, -1)
        plain = check(q.contiguous(), k.contiguous(), "causal", "two", device)
    # Tiles may differ, so sums may run in another order.
    torch.testing.assert_close(check(q, k, "causal", "two", device), plain, rtol=1e-5, atol=1e-6)


def test_lse_and_segment_ids_of_any_layout(device: str) -> None:
    q, k, _ = inputs(B, (4, 2), LENGTHS, 16)
    bounds = intervals("causal", B, *LENGTHS)
    ids, count = segments("two", B, LENGTHS[1])
    lse = dense_attention(q, k, None, *bounds).lse
    plain = [x.to(device) for x in (q, k, lse, ids, *bounds)]
    strided = [x.to(device) for x in (q, k, lse.transpose(1, 2).contiguous().transpose(1, 2), ids.mT.contiguous().mT)]
    first = attention_mass(*plain, count, 0.25, None)
    assert torch.equal(attention_mass(*strided, *plain[4:], count, 0.25, None), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_bit_identical(device: str, dtype: torch.dtype) -> None:
    q, k, _ = inputs(B, (4, 2), LENGTHS, 32, dtype)
    assert torch.equal(check(q, k, "packed", "two", device), check(q, k, "packed", "two", device))


def test_empty_inputs(device: str) -> None:
    q, k, _ = (x.to(device) for x in inputs(1, (2, 1), (3, 5), 16))
    bounds = [x.to(device) for x in intervals("full", 1, 3, 0)]
    ids = torch.zeros((1, 0), dtype=torch.int32, device=device)
    lse = torch.zeros((1, 2, 3), device=device)
    assert torch.equal(attention_mass(q, k[:, :, :0], lse, ids, *bounds, 2, 0.25, None).cpu(), torch.zeros(1, 2, 3, 2))
    none = attention_mass(q[:, :, :0], k, lse[..., :0], ids.new_zeros(1, 5), *(x[:, :0] for x in bounds), 2, 0.25, None)
    assert none.shape == (1, 2, 0, 2)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from vgpo_kernels.attention.triton import compile_cases
case = next(case for case in compile_cases() if case.name == sys.argv[1])
signature = {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}
aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
constexprs, options = case.on("sm_90")
source = triton.compiler.ASTSource(fn=case.kernel, signature=signature, constexprs=constexprs, attrs=aligned)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


@pytest.mark.parametrize("name", ["attention mass bf16 D 128, 4 segments", "attention column bf16 D 128"])
def test_wgmma_and_asynchronous_copies_on_sm_90(name: str, tmp_path: Path) -> None:
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, name],
        env={**inherited, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "wgmma.mma_async" in done.stdout
    assert "cp.async.cg.shared.global" in done.stdout
