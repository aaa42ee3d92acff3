"""The public functions: masks and what they come to, both routes, decode, errors."""

import pytest
import torch
from dense_attention import dense_attention, inputs, intervals, segment_masses, visible_keys
from torch import Tensor

import vgpo_kernels as vgpo

B, LENGTHS, D = 2, (23, 40), 32


@pytest.fixture(params=["reference", "triton", "native"])
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
    "nothing seen": {"key_mask": padding(left=[40, 0], right=[0, 40])},
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


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("width", [257, 512])
def test_wide_heads_by_both_routes_with_their_gradients(width: int, impl: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(B, (4, 2), (9, 21), width))
    exact_q, exact_k, exact_v = (x.detach().double().requires_grad_() for x in (q, k, v))
    mask = {"window": 7, "softcap": 4.0}
    visual = (torch.arange(21) % 7 < 3).expand(B, -1)
    riding = vgpo.visual_attention(q, k, v, visual, **mask, impl=impl)
    exact = vgpo.visual_attention(exact_q, exact_k, exact_v, visual, **mask, impl="reference")
    for actual, expected in zip(riding, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    out, lse = vgpo.attention_with_lse(q, k, v, **mask)
    torch.testing.assert_close(out, riding.out, rtol=1e-5, atol=1e-5)
    mass = vgpo.attention_mass(q, k, lse, visual.int() - 1, 1, **mask, impl=impl)
    torch.testing.assert_close(mass[..., 0], riding.visual_mass, rtol=1e-5, atol=1e-6)
    last = vgpo.visual_attention_decode(q[:, :, -1:], k, v, visual, torch.full((B,), 21), **mask, impl=impl)
    torch.testing.assert_close(last.visual_mass, riding.visual_mass[:, :, -1:], rtol=1e-5, atol=1e-6)
    (riding.out.sum() + riding.visual_mass.sum()).backward()
    (exact.out.sum() + exact.visual_mass.sum()).backward()
    for leaf, expected in ((q, exact_q), (k, exact_k), (v, exact_v)):
        torch.testing.assert_close(leaf.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)


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


def test_a_key_mask_may_be_zeros_and_ones(impl: str, device: str) -> None:
    """As tokenizers make attention masks."""
    q, k, v = inputs(B, (2, 2), LENGTHS, D, device=device)
    mask, visual = padding(left=[3, 0], right=[0, 2]).to(device), torch.ones(B, LENGTHS[1], device=device)
    expected = vgpo.visual_attention(q, k, v, visual, key_mask=mask, impl=impl)
    found = vgpo.visual_attention(q, k, v, visual, key_mask=mask.long(), impl=impl)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the interpreter would take hours")
def test_more_rows_than_a_grid_axis_holds(device: str) -> None:
    """70,000 queries, where 65,535 is the most that a second or third grid axis takes."""
    q, k, v = inputs(1, (2, 1), (70_000, 70_000), D, torch.bfloat16, device)
    visual = torch.arange(70_000, device=device)[None] % 3 == 0
    found = vgpo.visual_attention(q, k, v, visual, window=64, impl="triton")
    expected = vgpo.visual_attention(q, k, v, visual, window=64, impl="reference")
    torch.testing.assert_close(found.visual_mass, expected.visual_mass, rtol=0, atol=1e-2)
    torch.testing.assert_close(found.lse, expected.lse, rtol=0, atol=1e-2)
    mass = vgpo.attention_mass(q, k, found.lse, visual.int() - 1, 1, window=64, impl="triton")[..., 0]
    torch.testing.assert_close(mass, expected.visual_mass, rtol=0, atol=1e-2)


def test_the_masses_are_constants() -> None:
    q, k, v = (x.clone().requires_grad_() for x in inputs(1, (2, 2), (5, 5), D))
    _, lse = vgpo.attention_with_lse(q, k, v)
    assert lse.requires_grad
    assert not vgpo.attention_mass(q, k, lse, torch.zeros(1, 5, dtype=torch.int64), 1).requires_grad
    assert not vgpo.attention_column_sum(q, k, lse, torch.ones(1, 5, dtype=torch.bool)).requires_grad


@pytest.mark.parametrize("Lq", [70, 3])  # whole tiles of queries, and few that are split over keys
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_and_seen_comes_out(bad: float, Lq: int, impl: str, device: str) -> None:
    q, k, v = inputs(1, (2, 2), (Lq, 70), D, device=device)
    visual = torch.ones(1, 70, device=device)
    q = q.masked_fill((torch.arange(Lq, device=device) == 1)[:, None], bad)
    for result in vgpo.visual_attention(q, k, v, visual, impl=impl):
        assert result[:, :, 1].isnan().all()
        assert not result[:, :, 0].isnan().any()
        assert not result[:, :, 2].isnan().any()


def test_an_lse_may_be_in_double_precision(impl: str, device: str) -> None:
    q, k, v = inputs(1, (2, 2), (8, 8), D, device=device)
    _, lse = vgpo.attention_with_lse(q, k, v)
    ids = torch.zeros(1, 8, dtype=torch.int64, device=device)
    for function in (
        lambda x: vgpo.attention_mass(q, k, x, ids, 1, impl=impl),
        lambda x: vgpo.attention_column_sum(q, k, x, ids == 0, impl=impl),
    ):
        torch.testing.assert_close(function(lse.double()), function(lse))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_what_sdpa_casts_and_nothing_within(dtype: torch.dtype, impl: str, device: str) -> None:
    """RoPE hands over fp32 queries and keys beside bf16 values; sums stay in fp32."""
    if impl == "triton" and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter's products are wrong in bf16")
    q, k, v = inputs(B, (4, 2), LENGTHS, D, device=device)
    visual = torch.arange(LENGTHS[1], device=device).expand(B, -1) % 3 == 0

    def everything(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
        riding = vgpo.visual_attention(q, k, v, visual, impl=impl)
        out, lse = vgpo.attention_with_lse(q, k, v)
        mass = vgpo.attention_mass(q, k, lse, visual.int(), 2, impl=impl)
        received = vgpo.attention_column_sum(q, k, lse, visual, impl=impl)
        loss = riding.out.float().sum() + riding.visual_mass.sum() + out.float().sum()
        return [*riding, out, lse, mass, received, *torch.autograd.grad(loss, (q, k, v))]

    expected = everything(q.to(dtype), k.to(dtype), v.to(dtype))
    with torch.autocast(device, dtype=dtype):
        results = everything(q, k, v.to(dtype))
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result.to(wanted.dtype), wanted, rtol=0, atol=0)


def test_the_mean_is_over_queries_that_see_any_key(impl: str, device: str) -> None:
    """Each of six queries sees one key alone, and the third's is a hole: its interval is not empty, but it is blind."""
    q, k, v = inputs(1, (2, 2), (6, 6), D, device=device)
    at = torch.arange(6, device=device)[None]
    options = {"intervals": (at, at + 1), "key_mask": at != 2}
    _, lse = vgpo.attention_with_lse(q, k, v, **options)
    received = vgpo.attention_column_sum(q, k, lse, at != 0, reduction="mean", impl=impl, **options)
    expected = torch.where((at == 0) | (at == 2), 0.0, 1 / 5).expand(2, -1)[None]
    torch.testing.assert_close(received, expected)


def test_the_lse_of_flex_attention_will_do(impl: str, device: str) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = inputs(1, (4, 2), (16, 16), D, device=device)
    causal = create_block_mask(lambda _b, _h, i, j: i >= j, None, None, 16, 16, device=device)
    _, lse = flex_attention(q, k, v, block_mask=causal, enable_gqa=True, return_lse=True)
    visual = torch.arange(16, device=device)[None] < 5
    mass = vgpo.attention_mass(q, k, lse, visual.int() - 1, 1, impl=impl)[..., 0]
    torch.testing.assert_close(mass, vgpo.visual_attention(q, k, v, visual, impl=impl).visual_mass)


def test_visible_keys_of_the_dense_transcription_are_intervals() -> None:
    """The transcription that kernels are tested against reads intervals as the documentation says."""
    start, end = torch.tensor([[1, 3]]), torch.tensor([[3, 3]])
    assert visible_keys(start, end, 4).tolist() == [[[False, True, True, False], [False] * 4]]
