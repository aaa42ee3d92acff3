"""The public functions: masks and what they come to, both routes, decode, errors."""

import pytest
import torch
from dense_attention import dense_attention, inputs, intervals, segment_masses, visible_keys
from torch import Tensor

import vgpo_kernels as vgpo

B, LENGTHS, D = 2, (23, 40), 32


@pytest.fixture(params=["reference", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


def allowed(mask: dict, Lq: int, Lk: int, batch: int = B) -> Tensor:
    """Returns (B, Lq, Lk) bool, the masks of the public functions written down key by key."""
    visible = torch.ones(batch, Lq, Lk, dtype=torch.bool)
    for i in range(Lq):
        at = i + Lk - Lq
        for j in range(Lk):
            sees = j <= at or not mask.get("causal", True)
            if mask.get("window") is not None:
                sees = sees and abs(at - j) < mask["window"]
            visible[:, i, j] = sees
    if mask.get("key_mask") is not None:
        visible &= mask["key_mask"][:, None]
    return visible


def padding(*, left: list[int], right: list[int], holes: tuple[int, ...] = ()) -> Tensor:
    position = torch.arange(LENGTHS[1])
    mask = (position >= torch.tensor(left)[:, None]) & (position < LENGTHS[1] - torch.tensor(right)[:, None])
    mask[:, list(holes)] = False
    return mask


MASKS = {
    "causal": {},
    "everything": {"causal": False},
    "window": {"window": 6},
    "window on both sides": {"window": 6, "causal": False},
    "left padding": {"key_mask": padding(left=[3, 19], right=[0, 0])},
    "right padding": {"key_mask": padding(left=[0, 0], right=[2, 25]), "causal": False},
    "holes": {"key_mask": padding(left=[1, 0], right=[0, 4], holes=(9, 10, 21))},
    "nobody": {"key_mask": padding(left=[40, 0], right=[0, 40])},
    "window and padding": {"window": 5, "key_mask": padding(left=[3, 19], right=[0, 1])},
}


@pytest.mark.parametrize("name", MASKS)
def test_both_routes_agree_with_eager_attention(name: str, impl: str, device: str) -> None:
    mask = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in MASKS[name].items()}
    q, k, v = inputs(B, (4, 2), LENGTHS, D, device=device)
    visible = allowed(MASKS[name], *LENGTHS).to(device)
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT * D**-0.5).masked_fill(
        ~visible[:, None], float("-inf")
    )
    lse = scores.logsumexp(-1)
    probabilities = (scores - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()
    visual = (torch.arange(LENGTHS[1], device=device) % 7 < 3).expand(B, -1)

    riding = vgpo.visual_attention(q, k, v, visual, **mask, impl=impl)
    expected = (probabilities * visual[:, None, None]).sum(-1)
    torch.testing.assert_close(riding.visual_mass.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        riding.out.double(), probabilities @ v.double().repeat_interleave(2, 1), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(riding.lse.double(), lse, rtol=1e-5, atol=1e-5)

    out, stock_lse = vgpo.attention_with_lse(q, k, v, **mask)
    torch.testing.assert_close(out, riding.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stock_lse, riding.lse, rtol=1e-5, atol=1e-5)
    segments = torch.where(visual, 1, 0)
    mass = vgpo.attention_mass(q, k, stock_lse, segments, 2, **mask, impl=impl)
    torch.testing.assert_close(mass[..., 1], riding.visual_mass, rtol=1e-5, atol=1e-6)
    sees = visible.any(2)[:, None].expand_as(mass[..., 0]).float()
    torch.testing.assert_close(mass.sum(-1), sees, rtol=1e-5, atol=1e-5)
    heads = vgpo.attention_mass(q, k, stock_lse, segments, 2, **mask, impl=impl, reduce_heads=True)
    torch.testing.assert_close(heads, mass.mean(1))
    part = vgpo.attention_mass(q, k, stock_lse, segments, 2, **mask, impl=impl, query_range=(5, 17))
    torch.testing.assert_close(part, mass[:, :, 5:17], rtol=1e-6, atol=1e-7)

    received = vgpo.attention_column_sum(q, k, stock_lse, visual, **mask, impl=impl, query_range=(5, 17))
    columns = (probabilities[:, :, 5:17].sum(2) * visual[:, None]).float()
    torch.testing.assert_close(received, columns, rtol=1e-5, atol=1e-5)
    wanted = torch.tensor([[39, 0, -1, 8], [2, 2, 30, -1]], device=device)
    at_positions = vgpo.attention_column_sum(
        q, k, stock_lse, wanted, **mask, impl=impl, query_range=(5, 17), reduce_heads=True
    )
    every = probabilities[:, :, 5:17].sum(2).mean(1).float()
    expected = every.gather(1, wanted.clamp(min=0)).masked_fill(wanted < 0, 0)
    torch.testing.assert_close(at_positions, expected, rtol=1e-5, atol=1e-5)


def test_packed_rows_are_rows(impl: str, device: str) -> None:
    """Three sequences of odd lengths in one row, and padding after the last."""
    bounds = torch.tensor([0, 7, 18, 31], device=device)
    q, k, v = inputs(1, (4, 2), (35, 35), D, device=device)
    visual = (torch.arange(35, device=device) % 5 < 2)[None]
    packed = vgpo.visual_attention(q, k, v, visual, cu_seqlens=bounds, max_seqlen=13, impl=impl)
    stock = vgpo.attention_with_lse(q, k, v, cu_seqlens=bounds, max_seqlen=13)
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        one = vgpo.visual_attention(*(x[:, :, low:high] for x in (q, k, v)), visual[:, low:high], impl=impl)
        for whole, alone in zip(packed, one, strict=True):
            torch.testing.assert_close(whole[:, :, low:high], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stock[0][:, :, low:high], one.out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stock[1][:, :, low:high], one.lse, rtol=1e-5, atol=1e-5)
    assert not packed.out[:, :, 31:].any()
    assert not packed.visual_mass[:, :, 31:].any()
    assert packed.lse[:, :, 31:].isneginf().all()


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("Lq", [1, 3])
def test_decode_is_the_end_of_the_whole(Lq: int, window: int | None, impl: str, device: str) -> None:
    """Caches of different lengths in one buffer, NaN past their ends."""
    Lk, lengths = 64, torch.tensor([64, 41], device=device)
    q, k, v = inputs(B, (4, 2), (Lk, Lk), D, device=device)
    visual = torch.rand(B, Lk, device=device) < 0.4
    past = (torch.arange(Lk, device=device) >= lengths[:, None])[:, None, :, None]
    caches = k.masked_fill(past, torch.nan), v.masked_fill(past, torch.nan)
    last = torch.stack([q[row, :, length - Lq : length] for row, length in enumerate(lengths.tolist())])
    hidden = torch.ones(B, Lk, dtype=torch.bool, device=device)
    hidden[0, :5] = False
    decoded = vgpo.visual_attention_decode(last, *caches, visual, lengths, key_mask=hidden, window=window, impl=impl)
    for row, length in enumerate(lengths.tolist()):
        whole = vgpo.visual_attention(
            *(x[row : row + 1, :, :length] for x in (q, k, v)),
            visual[row : row + 1, :length],
            key_mask=hidden[row : row + 1, :length],
            window=window,
            impl=impl,
        )
        for one, every in zip(decoded, whole, strict=True):
            torch.testing.assert_close(one[row], every[0, :, -Lq:], rtol=1e-5, atol=1e-5)


def test_decode_keeps_given_intervals_within_the_cache(impl: str, device: str) -> None:
    q, k, v = inputs(1, (2, 2), (1, 16), D, device=device)
    lengths = torch.tensor([9], device=device)
    bounds = torch.tensor([[2]], device=device), torch.tensor([[16]], device=device)
    visual = torch.ones(1, 16, device=device)
    decoded = vgpo.visual_attention_decode(q, k, v, visual, lengths, intervals=bounds, impl=impl)
    expected = vgpo.visual_attention(q, k[:, :, 2:9], v[:, :, 2:9], visual[:, 2:9], impl=impl)
    torch.testing.assert_close(decoded.lse, expected.lse)


def test_intervals_take_any_integer_dtype_and_layout(impl: str, device: str) -> None:
    q, k, v = inputs(B, (2, 2), LENGTHS, D, device=device)
    start, end = (x.to(device) for x in intervals("window", B, *LENGTHS))
    visual = torch.ones(B, LENGTHS[1], device=device)
    plain = vgpo.visual_attention(q, k, v, visual, intervals=(start, end), impl=impl)
    wide = torch.stack([start.long(), end.long()], dim=-1)
    other = vgpo.visual_attention(q, k, v, visual, intervals=wide.unbind(-1), impl=impl)
    torch.testing.assert_close(plain, other, rtol=0, atol=0)


def test_segments_of_hidden_keys_weigh_nothing(impl: str, device: str) -> None:
    q, k, v = inputs(B, (2, 2), LENGTHS, D, device=device)
    key_mask = padding(left=[0, 0], right=[0, 0], holes=(4, 5, 20)).to(device)
    dense = dense_attention(q, k, v, *(x.to(device) for x in intervals("full", B, *LENGTHS)), key_kinds=key_mask.char())
    ids = torch.zeros(B, LENGTHS[1], dtype=torch.int64, device=device)
    bad = k.masked_fill(~key_mask[:, None, :, None], torch.nan)
    mass = vgpo.attention_mass(q, bad, dense.lse, ids, 1, causal=False, key_mask=key_mask, impl=impl)
    torch.testing.assert_close(mass, segment_masses(dense.probabilities, ids, 1), rtol=1e-5, atol=1e-6)
    received = vgpo.attention_column_sum(q, bad, dense.lse, ids == 0, causal=False, key_mask=key_mask, impl=impl)
    assert not received[:, :, ~key_mask[0]].any()
    torch.testing.assert_close(received, dense.probabilities.sum(2), rtol=1e-5, atol=1e-5)


def test_the_masses_are_constants() -> None:
    q, k, v = (x.clone().requires_grad_() for x in inputs(1, (2, 2), (5, 5), D))
    _, lse = vgpo.attention_with_lse(q, k, v)
    assert lse.requires_grad
    assert not vgpo.attention_mass(q, k, lse, torch.zeros(1, 5, dtype=torch.int64), 1).requires_grad
    assert not vgpo.attention_column_sum(q, k, lse, torch.ones(1, 5, dtype=torch.bool)).requires_grad


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
        ({"key_mask": torch.ones(B, 8)}, TypeError, "key_mask: expected dtype bool, got float32"),
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
        ({"impl": "cuda"}, ValueError, "impl: expected one of 'triton', 'reference' or None, got 'cuda'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_errors_name_the_argument(wrong: dict, error: type[Exception], message: str) -> None:
    arguments = good() | wrong
    with pytest.raises(error, match=message):
        vgpo.visual_attention(**arguments)


def test_a_head_size_above_256_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 288)
    with pytest.raises(ValueError, match="q: expected a head size of at most 256, got 288"):
        vgpo.visual_attention(q, q, q, torch.ones(1, 2))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"lse": torch.zeros(B, 4, 5)}, ValueError, r"lse: expected shape \(2, 4, 6\), got \(2, 4, 5\)"),
        ({"lse": torch.zeros(B, 4, 6).half()}, TypeError, "lse: expected dtype float32 or float64, got float16"),
        ({"segment_ids": torch.zeros(B, 8)}, TypeError, "segment_ids: expected dtype int8"),
        ({"segment_ids": torch.full((B, 8), 2)}, ValueError, "segment_ids: expected less than num_segments = 2, got 2"),
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


def test_errors_of_decode() -> None:
    q, k, v = inputs(B, (4, 2), (1, 8), D)
    visual = torch.ones(B, 8)
    with pytest.raises(ValueError, match=r"cache_lengths: expected shape \(2\), got \(3,\)"):
        vgpo.visual_attention_decode(q, k, v, visual, torch.ones(3).int())
    with pytest.raises(ValueError, match="intervals: expected key_end of at most 8, got 9 at row 1, position 0"):
        vgpo.visual_attention_decode(q, k, v, visual, torch.tensor([8, 9]))
    with pytest.raises(ValueError, match=r"k_cache: expected shape \(2, Hkv, Lk, 32\)"):
        vgpo.visual_attention_decode(q, k[..., :16], v, visual, torch.tensor([8, 8]))


def test_visible_keys_of_the_dense_transcription_are_intervals() -> None:
    """The transcription that kernels are tested against reads intervals as the documentation says."""
    start, end = torch.tensor([[1, 3]]), torch.tensor([[3, 3]])
    assert visible_keys(start, end, 4).tolist() == [[[False, True, True, False], [False] * 4]]
