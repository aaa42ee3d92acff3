"""The column-sum kernel against dense float64 attention: masks, positions in any order, reductions."""

import pytest
import torch
from dense_attention import column_sums, dense_attention, inputs, intervals, visible_keys
from torch import Tensor

from vgpo_kernels.attention.triton import attention_column_sum, column
from vgpo_kernels.testing import assert_error_budget

MASKS = ("full", "causal", "left", "right", "packed", "window", "blocks", "empty", "blind", "arbitrary")
# Triton's interpreter multiplies bf16 bit patterns: that dtype is for a GPU.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
B, LENGTHS = 2, (75, 150)  # fewer queries than keys, no multiple of a tile, three blocks of fp32 queries


def check(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    mask: str | tuple[Tensor, Tensor],
    reduction: str,
    device: str,
    softcap: float | None = None,
) -> Tensor:
    """Compares the kernel on `device` with dense attention on the CPU, at the same fp32 LSE; returns the columns."""
    bounds = intervals(mask, len(q), q.shape[2], k.shape[2]) if isinstance(mask, str) else mask
    lse = dense_attention(q.double(), k.double(), None, *bounds, softcap=softcap).lse.float()
    exact, same_dtype = (
        column_sums(dense_attention(*x, None, *bounds, softcap=softcap, lse=lse).probabilities, positions, reduction)
        for x in ((q.double(), k.double()), (q, k))
    )
    arguments = [x.to(device) for x in (q, k, lse, positions, *bounds)]
    columns = attention_column_sum(*arguments, reduction, q.shape[-1] ** -0.5, softcap).cpu()
    assert columns.dtype == torch.float32
    assert_error_budget(reduction, columns, same_dtype, exact)
    return columns


def scattered(Lk: int, n: int) -> Tensor:
    """Returns (2, n) int32 positions: in no order, with -1 in the middle, a block of -1 only, and duplicates."""
    generator = torch.Generator().manual_seed(5)
    positions = torch.randint(0, Lk, (2, n), generator=generator)
    positions[0, 3], positions[1, 5:9] = -1, -1
    positions[0, 64:128] = -1
    positions[1, 64:] = -1
    return positions.int()


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_and_reduction(device: str, mask: str, reduction: str) -> None:
    q, k, _ = inputs(B, (4, 2), LENGTHS, 16)
    columns = check(q, k, scattered(LENGTHS[1], 140), mask, reduction, device)
    if mask == "blind":
        assert torch.equal(columns, torch.zeros_like(columns))


@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_a_whole_mask_of_keys(device: str, reduction: str) -> None:
    # A bool mask comes as its positions in order, then -1 up to Lk: fp32 blocks of 64 slots, the last ones empty.
    q, k, _ = inputs(B, (4, 2), LENGTHS, 16)
    positions = torch.full((B, LENGTHS[1]), -1)
    positions[0, :70], positions[1, :10] = torch.arange(20, 90), torch.arange(0, 100, 10)
    check(q, k, positions.int(), "causal", reduction, device)


def test_complete_columns_sum_to_the_queries(device: str) -> None:
    q, k, _ = inputs(1, (2, 1), LENGTHS, 16)
    columns = check(q, k, torch.arange(LENGTHS[1]).int()[None], "causal", "sum", device)
    torch.testing.assert_close(columns.sum(-1), torch.full((1, 2), float(LENGTHS[0])), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
# Powers of two, multiples of eight that are none, a head no vector divides, and one with a single vector. Above 256
# tiles are others, and rows that no vector divides are laid out anew.
@pytest.mark.parametrize("D", [8, 32, 64, 72, 80, 96, 100, 128, 256, 289, 512])
def test_head_sizes(device: str, dtype: torch.dtype, D: int) -> None:
    q, k, _ = inputs(1, (2, 1), (70, 90), D, dtype)
    check(q, k, torch.arange(0, 30).int()[None], "causal", "sum", device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (7, 1)])  # groups of 1, 2 and 7
def test_groups_of_heads(device: str, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    q, k, _ = inputs(2, heads, (40, 90), 32, dtype)
    check(q, k, scattered(90, 70), "window", "sum", device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 50.0])  # most scores at the cap, none near it
def test_softcap(device: str, dtype: torch.dtype, softcap: float) -> None:
    q, k, _ = inputs(B, (4, 2), LENGTHS, 24, dtype)
    check(4 * q, k, scattered(LENGTHS[1], 40), "causal", "sum", device, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_heads_in_groups_with_a_window_and_a_softcap(device: str, dtype: torch.dtype) -> None:
    q, k, _ = inputs(B, (4, 2), (21, 75), 384, dtype)
    check(4 * q, k, scattered(75, 40), "window", "max", device, 5.0)


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_queries_split_among_programs(device: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two splits of 32-query blocks at least one each, merged in order: three blocks cut, three full.
    q, k, _ = inputs(1, (1, 1), (200, 40), 16)
    positions = torch.arange(30).int()[None]
    start = torch.zeros((1, 200), dtype=torch.int32)
    bounds = (start, torch.where(torch.arange(200) < 100, torch.arange(200) % 40, 40).int()[None])
    assert column._splits(1, 7) == 1
    whole = check(q, k, positions, bounds, reduction, device)
    monkeypatch.setattr(column, "SPLIT_BLOCKS", 1)
    assert column._splits(1, 7) == 7
    split = check(q, k, positions, bounds, reduction, device)
    assert torch.equal(split, check(q, k, positions, bounds, reduction, device))
    torch.testing.assert_close(split, whole, rtol=1e-6, atol=1e-7)


def test_more_query_blocks_than_are_bounded_at_once(device: str) -> None:
    # 32 blocks of 64 queries are bounded by one program: these are 33, the last one with a query.
    q, k, _ = inputs(1, (1, 1), (2049, 70), 8, torch.float16)
    check(q, k, torch.arange(0, 70, 7).int()[None], "full", "sum", device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["left", "right", "empty", "blind", "window"])
def test_what_nothing_sees_may_be_nan(device: str, mask: str, dtype: torch.dtype) -> None:
    q, k, _ = inputs(B, (4, 2), LENGTHS, 16, dtype)
    bounds = intervals(mask, B, *LENGTHS)
    visible = visible_keys(*bounds, LENGTHS[1])
    blind, unseen = ~visible.any(2), ~visible.any(1)
    assert blind.any() or unseen.any()
    positions = torch.arange(LENGTHS[1]).int().expand(B, -1).contiguous()
    expected = check(q, k, positions, bounds, "sum", device)
    q = q.masked_fill(blind[:, None, :, None], torch.nan)
    k = k.masked_fill(unseen[:, None, :, None], torch.nan)
    assert torch.equal(check(q, k, positions, bounds, "sum", device), expected)


@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_a_nan_that_is_seen_comes_out(device: str, reduction: str) -> None:
    q, k, _ = inputs(1, (1, 1), (40, 40), 16)
    k[:, :, 7] = torch.nan
    bounds = intervals("causal", 1, 40, 40)
    positions = torch.tensor([[6, 7, 8]]).int()
    arguments = [x.to(device) for x in (q, k, torch.ones(1, 1, 40), positions, *bounds)]
    columns = attention_column_sum(*arguments, reduction, 0.25, None).cpu()
    assert columns.isnan().tolist() == [[[False, True, False]]]


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_a_hidden_row_of_lse_gives_nothing(device: str, reduction: str) -> None:
    # Intervals that are not empty, but an LSE of -inf: all keys are hidden one by one.
    q, k, _ = (x.to(device) for x in inputs(1, (1, 1), (40, 64), 16))
    bounds = [x.to(device) for x in intervals("full", 1, 40, 64)]
    positions = torch.arange(64, device=device).int()[None]
    lse = torch.full((1, 1, 40), -torch.inf, device=device)
    columns = attention_column_sum(q, k, lse, positions, *bounds, reduction, 0.25, None)
    assert torch.equal(columns, torch.zeros_like(columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["a column off", "rows of odd length", "transposed", "expanded"])
def test_strided_inputs(device: str, layout: str, dtype: torch.dtype) -> None:
    q, k, _ = inputs(B, (2, 1), LENGTHS, 16, dtype)
    positions = scattered(LENGTHS[1], 40)
    if layout == "a column off":
        q, k = (torch.nn.functional.pad(x, (1, 7))[..., 1:17] for x in (q, k))
    elif layout == "rows of odd length":
        q, k = (torch.nn.functional.pad(x, (0, 3))[..., :16] for x in (q, k))
    elif layout == "transposed":  # elements of a head are not side by side
        q, k = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k))
    else:
        q, k = q[:1].expand(B, -1, -1, -1), k[:1].expand(B, -1, -1, -1)
    strided = check(q, k, positions.mT.contiguous().mT, "causal", "sum", device)
    contiguous = check(q.contiguous(), k.contiguous(), positions, "causal", "sum", device)
    # Tiles may differ, so sums may run in another order.
    torch.testing.assert_close(strided, contiguous, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "max"])
def test_runs_are_bit_identical(device: str, reduction: str) -> None:
    q, k, _ = inputs(B, (4, 2), LENGTHS, 32, torch.float16)
    first, second = (check(q, k, scattered(LENGTHS[1], 140), "packed", reduction, device) for _ in range(2))
    assert torch.equal(first, second)


def test_empty_inputs(device: str) -> None:
    q, k, _ = (x.to(device) for x in inputs(1, (2, 1), (3, 5), 16))
    bounds = [x.to(device) for x in intervals("full", 1, 3, 5)]
    positions = torch.zeros((1, 4), dtype=torch.int32, device=device)
    lse = torch.zeros((1, 2, 3), device=device)
    none = attention_column_sum(q, k, lse, positions[:, :0], *bounds, "sum", 0.25, None)
    assert none.shape == (1, 2, 0)
    ends = [x[:, :0] for x in bounds]
    columns = attention_column_sum(q[:, :, :0], k, lse[..., :0], positions, *ends, "mean", 0.25, None)
    assert torch.equal(columns.cpu(), torch.zeros(1, 2, 4))
