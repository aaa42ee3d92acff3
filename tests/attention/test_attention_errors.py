"""Errors of the public functions: the argument, what was expected, what came."""

import pytest
import torch
from dense_attention import inputs

import vgpo_kernels as vgpo

B, D = 2, 32


def good() -> dict:
    q, k, v = inputs(B, (4, 2), (6, 8), D)
    return {"q": q, "k": k, "v": v, "visual_mask": torch.ones(B, 8)}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"q": [1]}, TypeError, "q: expected a tensor, got list"),
        ({"q": torch.zeros(2, 4, 6)}, ValueError, r"q: expected shape \(B, Hq, Lq, D\), got \(2, 4, 6\)"),
        ({"k": torch.zeros(B, 2, 8, 16)}, ValueError, r"k: expected shape \(2, Hkv, Lk, 32\), got \(2, 2, 8, 16\)"),
        ({"k": torch.zeros(B, 2, 8, D).half()}, TypeError, "k: expected dtype float32, got float16"),
        ({"k": torch.zeros(B, 3, 8, D)}, ValueError, "k: expected a number of heads that divides q's 4, got 3"),
        ({"k": torch.zeros(B, 2, 0, D)}, ValueError, "k: expected at least one element"),
        ({"v": torch.zeros(B, 2, 7, D)}, ValueError, r"v: expected shape \(2, 2, 8, 32\), got \(2, 2, 7, 32\)"),
        ({"visual_mask": torch.ones(B, 6)}, ValueError, r"visual_mask: expected shape \(2, 8\), got \(2, 6\)"),
        ({"scale": "0.1"}, TypeError, "scale: expected a number, got '0.1'"),
        ({"softcap": 0.0}, ValueError, r"softcap: expected a number in \(0.0, inf\), got 0.0"),
        ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
        ({"window": (3, 3)}, TypeError, r"window: expected an int, got \(3, 3\)"),
        ({"key_mask": torch.ones(B, 8)}, TypeError, "key_mask: expected dtype bool or .*, got float32"),
        ({"key_mask": torch.full((B, 8), 2)}, ValueError, "key_mask: expected 0 or 1, got 2 at row 0, position 0"),
        ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, "cu_seqlens: expected at least 2 bounds of one packed row"),
        ({"max_seqlen": 8}, ValueError, "max_seqlen: expected None without cu_seqlens, got 8"),
        (
            {"intervals": torch.zeros(2, B, 6)},
            TypeError,
            r"intervals: expected a pair \(key_start, key_end\), got Tensor",
        ),
        ({"intervals": (torch.zeros(B, 6), torch.zeros(B, 6))}, TypeError, "intervals key_start: expected dtype int8"),
        (
            {"intervals": (torch.zeros(B, 6).int(), torch.zeros(B, 5).int())},
            ValueError,
            r"intervals key_end: expected shape \(2, 6\), got \(2, 5\)",
        ),
        (
            {"intervals": (torch.zeros(B, 6).int(), torch.full((B, 6), 9))},
            ValueError,
            "intervals: expected key_end of at most 8, got 9 at row 0, position 0",
        ),
        (
            {"intervals": (torch.full((B, 6), -1), torch.full((B, 6), 8))},
            ValueError,
            "intervals: expected key_start of at least 0, got -1 at row 0, position 0",
        ),
        (
            {"intervals": (torch.zeros(B, 6).int(),) * 2, "window": 3},
            ValueError,
            "window: expected None beside intervals, which say the whole mask",
        ),
        ({"impl": "cuda"}, ValueError, "impl: expected one of 'triton', 'native', 'reference' or None, got 'cuda'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_errors_name_the_argument(wrong: dict, error: type[Exception], message: str) -> None:
    arguments = good() | wrong
    with pytest.raises(error, match=message):
        vgpo.visual_attention(**arguments)


def test_a_head_size_above_512_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 576)
    with pytest.raises(ValueError, match="q: expected a head size of at most 512, got 576"):
        vgpo.visual_attention(q, q, q, torch.ones(1, 2))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"lse": torch.zeros(B, 4, 5)}, ValueError, r"lse: expected shape \(2, 4, 6\), got \(2, 4, 5\)"),
        ({"lse": torch.zeros(B, 4, 6).half()}, TypeError, "lse: expected dtype float32 or float64, got float16"),
        ({"segment_ids": torch.zeros(B, 8)}, TypeError, "segment_ids: expected dtype int8"),
        (
            {"segment_ids": torch.full((B, 8), 2)},
            ValueError,
            "segment_ids: expected -1 or less than num_segments = 2, got 2",
        ),
        ({"num_segments": 0}, ValueError, "num_segments: expected at least 1, got 0"),
        ({"num_segments": 1.5}, TypeError, "num_segments: expected an int, got 1.5"),
        ({"query_range": (3, 3)}, ValueError, r"query_range: expected 0 <= start < stop <= 6, got \(3, 3\)"),
        ({"query_range": (0, 7)}, ValueError, r"query_range: expected 0 <= start < stop <= 6, got \(0, 7\)"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_errors_of_the_mass(wrong: dict, error: type[Exception], message: str) -> None:
    q, k, _ = inputs(B, (4, 2), (6, 8), D)
    arguments = {
        "q": q,
        "k": k,
        "lse": torch.zeros(B, 4, 6),
        "segment_ids": torch.zeros(B, 8, dtype=torch.int64),
        "num_segments": 2,
    }
    with pytest.raises(error, match=message):
        vgpo.attention_mass(**(arguments | wrong))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"keys": [0]}, TypeError, "keys: expected a tensor, got list"),
        ({"keys": torch.ones(B, 6, dtype=torch.bool)}, ValueError, r"keys: expected shape \(2, 8\), got \(2, 6\)"),
        ({"keys": torch.zeros(B, 8)}, TypeError, "keys: expected dtype bool or int8"),
        ({"keys": torch.tensor([[0, 8], [0, 1]])}, ValueError, "keys: expected positions from 0 to 7, or -1, got 8"),
        ({"reduction": "median"}, ValueError, "reduction: expected one of 'sum', 'mean', 'max', got 'median'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_errors_of_the_column_sum(wrong: dict, error: type[Exception], message: str) -> None:
    q, k, _ = inputs(B, (4, 2), (6, 8), D)
    arguments = {"q": q, "k": k, "lse": torch.zeros(B, 4, 6), "keys": torch.ones(B, 8, dtype=torch.bool)}
    with pytest.raises(error, match=message):
        vgpo.attention_column_sum(**(arguments | wrong))


def test_an_lse_of_other_masks_is_told() -> None:
    q, k, v = inputs(B, (2, 2), (8, 8), D)
    key_mask = torch.arange(8).expand(B, -1) > 5
    _, lse = vgpo.attention_with_lse(q, k, v, key_mask=key_mask)
    with pytest.raises(ValueError, match="lse: expected that of the same q, k, scale and masks, got one under which"):
        vgpo.attention_mass(q, k, lse, torch.zeros(B, 8, dtype=torch.int64), 1, query_range=(7, 8))


def test_ids_are_checked_before_they_are_narrowed() -> None:
    q, k, v = inputs(1, (2, 2), (4, 4), D)
    _, lse = vgpo.attention_with_lse(q, k, v)
    for wrong in (2**32, -7):
        with pytest.raises(ValueError, match=f"segment_ids: expected -1 or less than num_segments = 2, got {wrong}"):
            vgpo.attention_mass(q, k, lse, torch.full((1, 4), wrong), 2)
        with pytest.raises(ValueError, match=f"keys: expected positions from 0 to 3, or -1, got {wrong}"):
            vgpo.attention_column_sum(q, k, lse, torch.full((1, 4), wrong))
    bounds = torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), 2**32 + 1)
    with pytest.raises(ValueError, match="intervals: expected key_end of at most 4, got 4294967297"):
        vgpo.visual_attention(q, k, v, torch.ones(1, 4), intervals=bounds)


@pytest.mark.parametrize(
    ("bounds", "longest", "message"),
    [
        ([0, 5, 3, 8], None, r"cu_seqlens: expected bounds that do not fall, got \[0, 5, 3, 8\]"),
        ([0, 5, 12], None, "cu_seqlens: expected bounds from 0 to 8, got 12 at row 2"),
        ([-3, 8], None, "cu_seqlens: expected bounds from 0 to 8, got -3 at row 0"),
        ([0, 5, 8], 4, "max_seqlen: expected at least 5, the longest sequence, got 4"),
    ],
)
def test_packed_bounds_are_checked(bounds: list[int], longest: int | None, message: str) -> None:
    q, k, v = inputs(1, (2, 2), (8, 8), D)
    for function in (vgpo.attention_with_lse, lambda *x, **y: vgpo.visual_attention(*x, torch.ones(1, 8), **y)):
        with pytest.raises(ValueError, match=message):
            function(q, k, v, cu_seqlens=torch.tensor(bounds), max_seqlen=longest)


@pytest.mark.parametrize("query_range", [3, slice(1, 3), (1, 3, 4), (1.0, 3.0), (True, 3)])
def test_a_query_range_is_two_ints(query_range) -> None:
    q, k, _ = inputs(1, (2, 2), (8, 8), D)
    with pytest.raises(TypeError, match="query_range: expected"):
        vgpo.attention_mass(q, k, torch.zeros(1, 2, 8), torch.zeros(1, 8).int(), 1, query_range=query_range)


def test_causal_is_a_bool() -> None:
    q, k, v = inputs(1, (2, 2), (8, 8), D)
    with pytest.raises(TypeError, match="causal: expected a bool, got None"):
        vgpo.attention_with_lse(q, k, v, causal=None)
    with pytest.raises(TypeError, match="q: expected a tensor, got list"):
        vgpo.attention_backend([1], k)


def test_errors_of_decode() -> None:
    q, k, v = inputs(B, (4, 2), (1, 8), D)
    visual = torch.ones(B, 8)
    with pytest.raises(ValueError, match=r"cache_lengths: expected shape \(2,\), got \(3,\)"):
        vgpo.visual_attention_decode(q, k, v, visual, torch.ones(3).int())
    for wrong in (9, 0, -1):
        expected = (
            f"cache_lengths: expected from 1, the number of queries, to 8, the cache's length, got {wrong} at row 1"
        )
        with pytest.raises(ValueError, match=expected):
            vgpo.visual_attention_decode(q, k, v, visual, torch.tensor([8, wrong]))
    with pytest.raises(ValueError, match=r"k_cache: expected shape \(2, Hkv, Lk, 32\)"):
        vgpo.visual_attention_decode(q, k[..., :16], v, visual, torch.tensor([8, 8]))
