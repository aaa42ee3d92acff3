"""Mass and column sums on the CPU kernels, on every instruction set, against the reference in float64."""

import pytest
import torch
from dense_attention import dense_attention, intervals, segments, visible_keys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_cases import LENGTHS, B, case, scattered
from torch import Tensor

from vgpo_kernels.attention import native, reference
from vgpo_kernels.testing import assert_error_budget

MASKS = ("full", "causal", "left", "right", "packed", "window", "blocks", "empty", "blind", "arbitrary")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("sum", "mean", "max")
pytestmark = pytest.mark.usefixtures("capability")


def check_mass(tensors: dict, ids: Tensor, count: int, softcap: float | None = None) -> Tensor:
    """Compares the kernel with the reference in the same dtype and in float64; returns the masses."""
    q, k, lse, *bounds = tensors.values()
    options = (ids, *bounds, count, q.shape[-1] ** -0.5, softcap)
    masses = native.attention_mass(q, k, lse, *options)
    same = reference.attention_mass(q, k, lse, *options)
    exact = reference.attention_mass(q.double(), k.double(), lse.double(), *options)
    assert masses.dtype == same.dtype
    assert masses.stride() == same.stride()
    assert_error_budget("mass", masses, same, exact)
    return masses


def check_columns(tensors: dict, positions: Tensor, reduction: str, softcap: float | None = None) -> Tensor:
    """The same for column sums."""
    q, k, lse, *bounds = tensors.values()
    options = (positions, *bounds, reduction, q.shape[-1] ** -0.5, softcap)
    columns = native.attention_column_sum(q, k, lse, *options)
    same = reference.attention_column_sum(q, k, lse, *options)
    exact = reference.attention_column_sum(q.double(), k.double(), lse.double(), *options)
    assert columns.dtype == same.dtype
    assert columns.stride() == same.stride()
    assert_error_budget(reduction, columns, same, exact)
    return columns


@pytest.mark.parametrize("wanted", ["image", "two", "all", "none", "complete", "scattered", "images"])
@pytest.mark.parametrize("mask", MASKS)
def test_mass_under_every_mask_and_segmentation(mask: str, wanted: str) -> None:
    tensors = case(mask)
    masses = check_mass(tensors, *segments(wanted, B, LENGTHS[1]))
    if wanted == "none" or mask == "blind":
        assert torch.equal(masses, torch.zeros_like(masses))
    if wanted == "complete":
        seen = (tensors["start"] < tensors["end"]).float()[:, None].expand(masses.shape[:3])
        torch.testing.assert_close(masses.sum(-1), seen, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_columns_under_every_mask(mask: str, reduction: str) -> None:
    columns = check_columns(case(mask), scattered(LENGTHS[1], 140), reduction)
    if mask == "blind":
        assert torch.equal(columns, torch.zeros_like(columns))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 7, 16, 33, 128, 256, 289, 512])  # less than a vector, whole vectors, one more element
def test_head_sizes(D: int, dtype: torch.dtype) -> None:
    tensors = case("causal", (2, 1), D=D, dtype=dtype)
    check_mass(tensors, *segments("two", B, LENGTHS[1]))
    check_columns(tensors, scattered(LENGTHS[1], 30), "sum")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 3), (14, 2)])  # groups of 1 and 7
def test_groups_of_heads(heads: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = case("window", heads, dtype=dtype)
    check_mass(tensors, *segments("two", B, LENGTHS[1]))
    check_columns(tensors, scattered(LENGTHS[1], 70), "max")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 50.0])  # most scores at the cap, none near it
def test_softcap(softcap: float, dtype: torch.dtype) -> None:
    tensors = case("causal", dtype=dtype, softcap=softcap)
    check_mass(tensors, *segments("two", B, LENGTHS[1]), softcap)
    check_columns(tensors, scattered(LENGTHS[1], 40), "sum", softcap)


def test_many_blocks_of_keys_and_queries() -> None:
    # 700 keys of 256 elements are two blocks of panels on avx512, more on the others; 2 heads of 300 queries three
    # tasks; 300 queries in tiles of 4 more than the 64 tiles whose columns are summed first.
    start, end = intervals("causal", B, 300, 700)
    tensors = case((start, end), (2, 1), (300, 700), 256)
    check_mass(tensors, *segments("two", B, 700))
    check_mass(tensors, *segments("scattered", B, 700))
    for reduction in REDUCTIONS:
        check_columns(tensors, scattered(700, 400), reduction)


def test_long_sums_of_columns() -> None:
    # 3000 queries that all see four keys: a sum of 3000 terms for each.
    start, end = (x.expand(2, -1) for x in intervals("full", 1, 3000, 4))
    check_columns(case((start, end), (1, 1), (3000, 4), 8), torch.arange(4).int().expand(2, -1), "sum")


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("mask", ["left", "right", "empty", "blind", "window"])
def test_what_nothing_sees_may_be_anything(mask: str, garbage: float) -> None:
    tensors = case(mask)
    visible = visible_keys(tensors["start"], tensors["end"], LENGTHS[1])
    blind, unseen = ~visible.any(2)[:, None], ~visible.any(1)[:, None, :, None]
    assert blind.any() or unseen.any()
    ids, count = segments("all", B, LENGTHS[1])
    positions = torch.arange(LENGTHS[1]).int().expand(B, -1)
    masses, columns = check_mass(tensors, ids, count), check_columns(tensors, positions, "sum")
    poisoned = tensors | {
        "q": tensors["q"].masked_fill(blind[..., None], garbage),
        "k": tensors["k"].masked_fill(unseen, garbage),
        "lse": tensors["lse"].masked_fill(blind, garbage),
    }
    q, k, lse, *bounds = poisoned.values()
    scale = q.shape[-1] ** -0.5
    assert torch.equal(native.attention_mass(q, k, lse, ids, *bounds, count, scale, None), masses)
    assert torch.equal(native.attention_column_sum(q, k, lse, positions, *bounds, "sum", scale, None), columns)


def test_unwanted_keys_are_not_read() -> None:
    tensors = case("full")
    ids, count = segments("two", B, LENGTHS[1])
    positions = torch.where(ids >= 0, torch.arange(LENGTHS[1]), -1).int()
    masses, columns = check_mass(tensors, ids, count), check_columns(tensors, positions, "mean")
    tensors["k"] = tensors["k"].masked_fill(ids[:, None, :, None] < 0, torch.nan)
    q, k, lse, *bounds = tensors.values()
    assert torch.equal(native.attention_mass(q, k, lse, ids, *bounds, count, 24**-0.5, None), masses)
    assert torch.equal(native.attention_column_sum(q, k, lse, positions, *bounds, "mean", 24**-0.5, None), columns)
    assert masses[0].max() > 0
    assert columns[0].max() > 0


@pytest.mark.parametrize("name", ["q", "k", "lse"])
def test_a_nan_that_is_seen_comes_out_where_it_is_seen(name: str) -> None:
    tensors = case("causal")
    tensors[name][:, 1, 7] = torch.nan
    ids, count = segments("all", B, LENGTHS[1])
    positions = torch.arange(LENGTHS[1]).int().expand(B, -1)
    assert check_mass(tensors, ids, count).isnan().any()
    for reduction in REDUCTIONS:
        columns = check_columns(tensors, positions, reduction)
        assert columns.isnan().any()
        assert not columns.isnan().all()


def test_an_infinite_key_is_as_in_the_reference() -> None:
    # A tile of queries that is not full has rows of zeros, whose product with it is a NaN.
    tensors = case("full", (2, 1))
    tensors["k"][:, :, 149] = torch.inf
    tensors["q"] = -tensors["q"].abs()
    check_mass(tensors, *segments("all", B, LENGTHS[1]))
    columns = check_columns(tensors, torch.arange(LENGTHS[1]).int().expand(B, -1), "sum")
    assert torch.equal(columns[..., 149], torch.zeros_like(columns[..., 149]))


def test_an_lse_of_minus_infinity_gives_nothing() -> None:
    # Intervals that are not empty: all their keys are hidden one by one.
    tensors = case("full")
    tensors["lse"][:, :, ::3] = -torch.inf
    masses = check_mass(tensors, *segments("all", B, LENGTHS[1]))
    assert torch.equal(masses[:, :, ::3], torch.zeros_like(masses[:, :, ::3]))
    for reduction in REDUCTIONS:
        check_columns(tensors, scattered(LENGTHS[1], 40), reduction)


def relaid(x: Tensor, layout: str) -> Tensor:
    """Returns equal elements, laid out in another way."""
    if layout == "a column off":
        return torch.nn.functional.pad(x, (1, 7))[..., 1:-7]
    if layout == "rows of odd length":
        return torch.nn.functional.pad(x, (0, 3))[..., :-3]
    if layout == "transposed":  # elements of a row are not side by side
        return x.mT.contiguous().mT
    if layout == "every second":
        return x.repeat_interleave(2, -1)[..., ::2]
    return x.contiguous()


LAYOUTS = ("contiguous", "a column off", "rows of odd length", "transposed", "every second")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    tensors = case("causal", dtype=dtype)
    ids, count = segments("two", B, LENGTHS[1])
    positions = scattered(LENGTHS[1], 40)
    masses, columns = check_mass(tensors, ids, count), check_columns(tensors, positions, "sum")
    strided = {name: relaid(x, layout) for name, x in tensors.items()}
    assert torch.equal(check_mass(strided, relaid(ids, layout), count), masses)
    assert torch.equal(check_columns(strided, relaid(positions, layout), "sum"), columns)


def test_broadcast_inputs() -> None:
    tensors = {name: x[:1] for name, x in case("full").items()}
    ids, count = segments("image", 1, LENGTHS[1])
    positions = scattered(LENGTHS[1], 40)[:1]
    masses, columns = check_mass(tensors, ids, count), check_columns(tensors, positions, "sum")
    expanded = {name: x.expand(3, *x.shape[1:]) for name, x in tensors.items()}
    assert torch.equal(check_mass(expanded, ids.expand(3, -1), count), masses.expand(3, -1, -1, -1))
    assert torch.equal(check_columns(expanded, positions.expand(3, -1), "sum"), columns.expand(3, -1, -1))
    # One query for all, one key for all, an element for a whole row.
    expanded["q"], expanded["k"] = (x[:, :, :1, :1].expand_as(x) for x in (expanded["q"], expanded["k"]))
    check_mass(expanded, ids.expand(3, -1), count)
    check_columns(expanded, positions.expand(3, -1), "sum")


def test_the_number_of_threads_changes_nothing() -> None:
    # 3 heads of 500 queries: two tasks or more for each of both rows and each key head.
    start, end = intervals("causal", B, 500, 500)
    q, k, lse, *bounds = case((start, end), (6, 2), (500, 500), 16).values()
    ids, count = segments("two", B, 500)
    positions = scattered(500, 400)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                [native.attention_mass(q, k, lse, ids, *bounds, count, 0.25, None)]
                + [native.attention_column_sum(q, k, lse, positions, *bounds, way, 0.25, None) for way in REDUCTIONS]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


def test_empty_inputs() -> None:
    q, k, lse, start, end = (x[:1] for x in case("full", (2, 1), (3, 5), 16).values())
    ids = torch.zeros((1, 5), dtype=torch.int32)
    none = native.attention_mass(q, k[:, :, :0], lse, ids[:, :0], start, 0 * end, 2, 0.25, None)
    assert torch.equal(none, torch.zeros(1, 2, 3, 2))
    assert native.attention_mass(q, k, lse, ids, start, end, 0, 0.25, None).shape == (1, 2, 3, 0)
    no_queries = (q[:, :, :0], k, lse[:, :, :0])
    bounds = (start[:, :0], end[:, :0])
    assert native.attention_mass(*no_queries, ids, *bounds, 2, 0.25, None).shape == (1, 2, 0, 2)
    columns = native.attention_column_sum(*no_queries, ids, *bounds, "mean", 0.25, None)
    assert torch.equal(columns, torch.zeros(1, 2, 5))
    assert native.attention_column_sum(q, k, lse, ids[:, :0], start, end, "max", 0.25, None).shape == (1, 2, 0)
    no_head = native.attention_mass(q[..., :0], k[..., :0], 0 * lse, ids, start, end, 1, 0.25, None)
    assert torch.equal(no_head, torch.full((1, 2, 3, 1), 5.0))
    no_rows = native.attention_mass(q[:0], k[:0], lse[:0], ids[:0], start[:0], end[:0], 2, 0.25, None)
    assert no_rows.shape == (0, 2, 3, 2)


SIZES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 20), st.integers(1, 110), st.integers(1, 40))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=SIZES,
    dtype=st.sampled_from(DTYPES),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=6, max_size=6),
    count=st.integers(1, 6),
    reduction=st.sampled_from(REDUCTIONS),
    softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 999),
)
def test_any_shape_and_layout(sizes, dtype, layouts, count, reduction, softcap, seed) -> None:
    kv_heads, group, Lq, Lk, D = sizes
    generator = torch.Generator().manual_seed(seed)
    # Few bits, so that products are exact in any order: the best of torch's roundings in a few numbers is no budget.
    q, k = (
        (torch.randint(-8, 9, shape, generator=generator) / 4).to(dtype)
        for shape in ((B, kv_heads * group, Lq, D), (B, kv_heads, Lk, D))
    )
    start, end = torch.randint(0, Lk + 1, (2, B, Lq), generator=generator).int()
    ids = torch.randint(-1, count, (B, Lk), generator=generator).int()
    positions = torch.randint(-1, Lk, (B, Lk + 3), generator=generator).int()
    lse = dense_attention(q.double(), k.double(), None, start, end, softcap=softcap).lse.float()
    names = ("q", "k", "lse", "start", "end")
    tensors = {
        name: relaid(x, layout) for name, x, layout in zip(names, (q, k, lse, start, end), layouts[:5], strict=True)
    }
    check_mass(tensors, relaid(ids, layouts[5]), count, softcap)
    check_columns(tensors, relaid(positions, layouts[5]), reduction, softcap)
