"""Attention with its mass on the CPU kernels, of many queries and of few, against the reference."""

import pytest
import torch
from attention_checks import MASKS, bundled, case
from dense_attention import visible_keys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vgpo_kernels as vgpo
from vgpo_kernels import _native
from vgpo_kernels.attention import native, reference
from vgpo_kernels.testing import assert_error_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.usefixtures("capability")


def attend(tensors, scale=None, softcap=None):
    scale = tensors["q"].shape[-1] ** -0.5 if scale is None else scale
    return native.visual_attention(**bundled(tensors), scale=scale, softcap=softcap)


def check(results, tensors, scale=None, softcap=None):
    """Compares with the reference in the same dtype and in float64."""
    scale = tensors["q"].shape[-1] ** -0.5 if scale is None else scale
    exact = {name: x.double() if name in "qkv" else x for name, x in tensors.items()}
    same = reference.visual_attention(**bundled(tensors), scale=scale, softcap=softcap)
    truth = reference.visual_attention(**bundled(exact), scale=scale, softcap=softcap)
    assert results[0].dtype == tensors["q"].dtype
    assert results[1].dtype == results[2].dtype == torch.float32
    for name, actual, expected, value in zip(("out", "mass", "lse"), results, same, truth, strict=True):
        assert actual.stride() == expected.stride()
        assert_error_budget(name, actual, expected, value)


def check_case(*arguments, scale=None, softcap=None):
    tensors = case(*arguments)
    check(attend(tensors, scale, softcap), tensors, scale, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_of_many_queries(mask, dtype):
    # 234 rows: two blocks of them, the second cut; 200 keys: two blocks and eight.
    check_case(mask, "image", (6, 2), (78, 200), 16, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_of_few_queries(mask, dtype):
    # Six rows of a group; 1300 keys are three pieces, and no multiple of a block.
    check_case(mask, "image", (4, 2), (3, 1300), 16, dtype)


@pytest.mark.parametrize("lengths", [(1, 150), (40, 150)])
@pytest.mark.parametrize("kind", ["none", "all", "scattered", "holes"])
def test_every_kind_of_key(kind, lengths):
    check_case("causal", kind, (2, 1), lengths, 16, torch.float32)


@pytest.mark.parametrize(
    "heads", [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (7, 1), (8, 1), (9, 1), (17, 1), (150, 1), (4, 4)]
)
def test_one_query_of_groups_of_heads(heads):
    # Every width of few rows, one row more than that, more than a vector holds, more than a block.
    check_case("causal", "holes", heads, (1, 107), 16, torch.float32)


@pytest.mark.parametrize("lengths", [(2, 101), (23, 101)])
@pytest.mark.parametrize("D", [1, 3, 8, 40, 64, 72, 100, 128, 256, 320, 511, 512])
def test_every_head_size(D, lengths):
    check_case("causal", "image", (2, 1), lengths, D, torch.float32)
    check_case("causal", "image", (2, 1), lengths, D, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(4, 90), (30, 90)])
def test_softcap(lengths, dtype):
    check_case("window", "holes", (2, 1), lengths, 32, dtype, scale=1.0, softcap=3.0)


@pytest.mark.parametrize("scale", [0.0, -1.5, 3.0])
@pytest.mark.parametrize("lengths", [(2, 700), (30, 90)])
def test_any_scale(lengths, scale):
    check_case("causal", "image", (2, 1), lengths, 16, torch.float32, scale=scale)


@pytest.mark.parametrize("lengths", [(1, 1100), (50, 110)])
@pytest.mark.parametrize("layout", ["contiguous", "columns apart", "an element off", "keys in front", "one for all"])
def test_any_strides(layout, lengths):
    tensors = case("causal", "image", (4, 2), lengths, 16, torch.float32)
    if layout == "one for all":
        tensors |= {name: tensors[name][:1, :1].expand_as(tensors[name]) for name in "kv"}
        tensors |= {name: tensors[name][:1].expand(2, -1) for name in ("key_kinds", "key_start", "key_end")}
    expected = attend({name: x.contiguous() for name, x in tensors.items()})
    for name in "qkv":
        if layout == "columns apart":
            tensors[name] = tensors[name].repeat_interleave(2, dim=3)[..., ::2]
        elif layout == "an element off":
            tensors[name] = torch.nn.functional.pad(tensors[name], (1, 2))[..., 1:17]
        elif layout == "keys in front":
            tensors[name] = tensors[name].mT.contiguous().mT
    for name in ("key_kinds", "key_start", "key_end"):
        if layout == "columns apart":
            tensors[name] = tensors[name].repeat_interleave(3, dim=1)[:, ::3]
    results = attend(tensors)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    check(results, tensors)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("lengths", [(2, 600), (60, 130)])
def test_a_query_never_meets_what_it_does_not_see(lengths, bad):
    # A key and a value that the last query alone sees: the other rows of the task are as without.
    tensors = case("causal", "image", (4, 2), lengths, 16, torch.float32)
    expected = attend(tensors)
    for name in "kv":
        tensors[name] = tensors[name].clone()
        tensors[name][:, :, -1] = bad
    results = attend(tensors)
    assert all(torch.equal(a[:, :, :-1], b[:, :, :-1]) for a, b in zip(results, expected, strict=True))
    assert not results[0][:, :, -1].isfinite().any()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("Lq", [1, 30])
def test_what_is_not_finite_and_seen_comes_out(Lq, name, bad):
    # One piece of keys, and two that meet in the merge.
    for Lk in (60, 1100):
        tensors = case("full", "image", (2, 2), (Lq, Lk), 16, torch.float32)
        tensors[name] = tensors[name].clone()
        tensors[name][0, 1, -1, 3] = bad
        results = attend(tensors)
        scale = 16**-0.5
        expected = reference.visual_attention(**bundled(tensors), scale=scale, softcap=None)
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a[b.isinf()], b[b.isinf()])
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("lengths", [(1, 1500), (90, 300)])
def test_threads_change_no_bit(lengths, threads):
    tensors = case("causal", "holes", (6, 2), lengths, 24, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = attend(tensors)
        torch.set_num_threads(threads)
        results = attend(tensors)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_short_cache_in_a_long_buffer():
    # Pieces are of the keys that are seen: those past a row's length change nothing.
    tensors = case("causal", "image", (2, 1), (1, 4096), 16, torch.float32)
    tensors["key_end"].fill_(256)
    for name in "kv":
        tensors[name] = tensors[name].clone()
        tensors[name][:, :, 256:] = NAN
    check(attend(tensors), tensors)


@pytest.mark.parametrize("shape", [(0, 2, 1, 3, 5, 8), (2, 2, 1, 0, 5, 8), (2, 2, 1, 3, 0, 8)])
def test_nothing_to_attend_with(shape):
    B, Hq, Hkv, Lq, Lk, D = shape
    q, k = torch.ones(B, Hq, Lq, D), torch.ones(B, Hkv, Lk, D)
    kinds, start = torch.ones(B, Lk, dtype=torch.int8), torch.zeros(B, Lq, dtype=torch.int32)
    tensors = {"q": q, "k": k, "v": k, "key_kinds": kinds, "key_start": start, "key_end": start + Lk}
    results = attend(tensors, scale=1.0)
    expected = reference.visual_attention(**bundled(tensors), scale=1.0, softcap=None)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data):
    B, Hkv, group = (data.draw(st.integers(1, n)) for n in (3, 3, 10))
    Lq, D = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    Lk = data.draw(st.one_of(st.integers(1, 200), st.integers(900, 1300)))
    dtype = data.draw(st.sampled_from(DTYPES))
    swapped, softcap = data.draw(st.booleans()), data.draw(st.sampled_from([None, 2.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    q, k, v = (
        torch.randn((B, L, H, D) if swapped else (B, H, L, D), generator=generator).to(dtype)
        for H, L in ((Hkv * group, Lq), (Hkv, Lk), (Hkv, Lk))
    )
    if swapped:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    v = v.abs()  # nothing cancels: an output of few elements has no other scale to judge an error by
    bounds = torch.randint(0, Lk + 1, (2, B, Lq), generator=generator, dtype=torch.int32)
    kinds = torch.randint(0, 3, (B, Lk), generator=generator).to(torch.int8)
    if data.draw(st.booleans()):
        bounds = bounds.sort(0).values
        kinds[:, : Lk // 2] = 2
    unseen = ~visible_keys(bounds[0], bounds[1], Lk, kinds).any(1)[:, None, :, None]
    tensors = {"q": q, "k": k.masked_fill(unseen, NAN), "v": v.masked_fill(unseen, INF), "key_kinds": kinds}
    tensors |= {"key_start": bounds[0], "key_end": bounds[1]}
    check(attend(tensors, softcap=softcap), tensors, softcap=softcap)


def test_gradients_as_on_the_reference():
    q, k, v = (
        x.requires_grad_() for x in (torch.randn(2, 4, 9, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16))
    )
    visual = torch.arange(20).expand(2, 20) < 7
    gradients = []
    for impl in ("native", "reference"):
        found = vgpo.visual_attention(q, k, v, visual, impl=impl)
        loss = found.out.square().sum() + found.visual_mass.sum() + found.lse.sum()
        gradients.append(torch.autograd.grad(loss, (q, k, v)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_decode_through_the_public_function():
    # Caches of 700 and of 5 tokens, a window and a hole.
    q, k, v = torch.randn(2, 14, 1, 64), torch.randn(2, 2, 800, 64), torch.randn(2, 2, 800, 64)
    visual, lengths = torch.arange(800).expand(2, 800) < 300, torch.tensor([700, 5])
    hole = torch.ones(2, 800, dtype=torch.bool)
    hole[0, 650:660] = False
    options = {"key_mask": hole, "window": 500}
    exact = vgpo.visual_attention_decode(
        q.double(), k.double(), v.double(), visual, lengths, **options, impl="reference"
    )
    same = vgpo.visual_attention_decode(q, k, v, visual, lengths, **options, impl="reference")
    for row, length in enumerate(lengths):
        k[row, :, length:] = NAN
        v[row, :, length:] = INF
    found = vgpo.visual_attention_decode(q, k, v, visual, lengths, **options, impl="native")
    for name, a, b, c in zip(found._fields, found, same, exact, strict=True):
        assert_error_budget(name, a, b, c)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_as_one_graph():
    q, k, v = torch.randn(1, 2, 9, 16), torch.randn(1, 1, 20, 16), torch.randn(1, 1, 20, 16)
    visual = torch.arange(20)[None] < 7

    def attended(q, k, v):
        return vgpo.visual_attention(q, k, v, visual, impl="native")

    found = torch.compile(attended, fullgraph=True, backend="aot_eager")(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(found, attended(q, k, v), strict=True))


def test_the_operator_is_well_formed():
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    start, kinds = torch.zeros(1, 5, dtype=torch.int32), torch.ones(1, 5, dtype=torch.int8)
    arguments = (q, k, v, kinds, start, start + 5, 0.5, None, "native")
    torch.library.opcheck(torch.ops.vgpo.visual_attention, arguments)


WRONG = {
    "k": torch.zeros(2, 3, 7, 8),
    "v": torch.zeros(2, 2, 6, 8),
    "out": torch.zeros(2, 4, 5, 7),
    "mass": torch.zeros(2, 4, 4),
    "lse": torch.zeros(2, 3, 5),
    "key_kinds": torch.zeros(2, 6, dtype=torch.uint8),
    "key_start": torch.zeros(1, 5, dtype=torch.int32),
    "key_end": torch.zeros(2, 4, dtype=torch.int32),
}


@pytest.mark.parametrize("name", WRONG)
def test_sizes_are_checked(name):
    right = {
        "out": torch.zeros(2, 4, 5, 8),
        "mass": torch.zeros(2, 4, 5),
        "lse": torch.zeros(2, 4, 5),
        "q": torch.zeros(2, 4, 5, 8),
        "k": torch.zeros(2, 2, 7, 8),
        "v": torch.zeros(2, 2, 7, 8),
        "key_kinds": torch.zeros(2, 7, dtype=torch.uint8),
        "key_start": torch.zeros(2, 5, dtype=torch.int32),
        "key_end": torch.full((2, 5), 1 << 30, dtype=torch.int32),  # beyond the keys: cut to them
    }
    _native.call("visual_attention", *right.values(), 1.0, 0.0)
    with pytest.raises(ValueError, match="v: expected size|q: expected" if name == "k" else name):
        _native.call("visual_attention", *(right | {name: WRONG[name]}).values(), 1.0, 0.0)
    with pytest.raises(ValueError, match="one dtype"):
        _native.call("visual_attention", *(right | {"v": right["v"].half()}).values(), 1.0, 0.0)
    with pytest.raises(TypeError):
        _native.call("visual_attention", *(right | {"key_end": right["key_end"].long()}).values(), 1.0, 0.0)
