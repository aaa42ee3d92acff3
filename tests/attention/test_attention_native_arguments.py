"""What the CPU kernels of mass and column sums are given: by public functions, by compiled code, and wrongly."""

import pytest
import torch
from dense_attention import inputs, segments
from native_cases import LENGTHS, B, case, scattered
from torch import Tensor

import vgpo_kernels as vgpo
from vgpo_kernels import _native
from vgpo_kernels.attention import native

pytestmark = pytest.mark.usefixtures("capability")


def test_through_the_public_functions() -> None:
    q, k, _ = inputs(B, (4, 2), LENGTHS, 16)
    key_mask = torch.arange(LENGTHS[1]) >= torch.tensor([[0], [9]])
    _, lse = vgpo.attention_with_lse(q, k, k, key_mask=key_mask)
    ids, count = segments("two", B, LENGTHS[1])
    for impl in ("native", None):
        given = {"key_mask": key_mask, "query_range": (5, 40)}
        masses = vgpo.attention_mass(q.requires_grad_(), k, lse, ids.long(), count, **given, impl=impl)
        expected = vgpo.attention_mass(q.double(), k.double(), lse.double(), ids, count, **given, impl="reference")
        assert not masses.requires_grad
        torch.testing.assert_close(masses.double(), expected, rtol=1e-5, atol=1e-7)
        columns = vgpo.attention_column_sum(q, k, lse.double(), ids >= 0, **given, reduce_heads=True, impl=impl)
        expected = vgpo.attention_column_sum(q.double(), k.double(), lse.double(), ids >= 0, **given, impl="reference")
        torch.testing.assert_close(columns.double(), expected.mean(1), rtol=1e-5, atol=1e-7)


def test_values_are_checked() -> None:
    q, k, lse, *_ = case("causal").values()
    ids, count = segments("two", B, LENGTHS[1])
    with pytest.raises(ValueError, match="segment_ids: expected"):
        vgpo.attention_mass(q, k, lse, ids + 1, count, impl="native")
    with pytest.raises(ValueError, match="lse: expected that of the same q, k"):
        vgpo.attention_mass(q, k, lse - 5, torch.zeros_like(ids), 1, impl="native")
    with pytest.raises(ValueError, match="keys: expected positions"):
        vgpo.attention_column_sum(q, k, lse, torch.full((B, 1), LENGTHS[1]), impl="native")


def test_compile_and_opcheck() -> None:
    q, k, lse, start, end = case("causal").values()
    ids, count = segments("two", B, LENGTHS[1])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        masses = vgpo.attention_mass(q, k, lse, ids, 2, impl="native")
        return masses, vgpo.attention_column_sum(q, k, lse, ids >= 0, impl="native")

    expected = vgpo.attention_mass(q, k, lse, ids, 2), vgpo.attention_column_sum(q, k, lse, ids >= 0)
    for actual, known in zip(both(q, k), expected, strict=True):
        assert torch.equal(actual, known)
    mass = (q, k, lse, ids, start, end, count, 24**-0.5, None, "native")
    torch.library.opcheck(torch.ops.vgpo.attention_mass, mass)
    columns = (q, k, lse, scattered(LENGTHS[1], 40), start, end, "sum", 24**-0.5, None, "native")
    torch.library.opcheck(torch.ops.vgpo.attention_column_sum, columns)


# name: its place among the arguments, and the dimension that is made one too short
WRONG = {
    "out": (0, 2),
    "q": (1, 3),
    "k": (2, 3),
    "k rows": (2, 0),
    "k heads": (2, 1),
    "lse": (3, 2),
    "segment_ids or positions": (4, 1),
    "key_start": (5, 1),
    "key_end": (6, 0),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kernel", ["attention_mass", "attention_column_sum"])
def test_sizes_that_do_not_fit(kernel: str, wrong: str) -> None:
    q, k, lse, *bounds = case("causal", (3, 3)).values()
    ids = torch.zeros((B, LENGTHS[1]), dtype=torch.int32)
    out = torch.zeros((B, 3, LENGTHS[0], 2)) if kernel == "attention_mass" else torch.zeros((B, 3, LENGTHS[1]))
    arguments = [out, q, k, lse, ids, *bounds]
    place, dimension = WRONG[wrong]
    arguments[place] = arguments[place].narrow(dimension, 0, arguments[place].shape[dimension] - 1)
    numbers = (0.25, 0.0) if kernel == "attention_mass" else (0, 0.25, 0.0)
    with pytest.raises(ValueError, match="expected"):
        _native.call(kernel, *arguments, *numbers)


def test_types_and_values_given_to_the_kernels() -> None:
    q, k, lse, *bounds = case("causal").values()
    ids = torch.zeros((B, LENGTHS[1]), dtype=torch.int32)
    out, columns = torch.zeros(B, 4, LENGTHS[0], 1), torch.zeros(B, 4, LENGTHS[1])
    with pytest.raises(ValueError, match="dtype of q"):
        _native.call("attention_mass", out, q, k.half(), lse, ids, *bounds, 0.25, 0.0)
    with pytest.raises(TypeError, match="argument 4"):
        _native.call("attention_mass", out, q, k, lse, ids.long(), *bounds, 0.25, 0.0)
    with pytest.raises(ValueError, match="reduction"):
        _native.call("attention_column_sum", columns, q, k, lse, ids, *bounds, 3, 0.25, 0.0)
    # What lies outside is in no segment, and no key.
    _native.call("attention_mass", out, q, k, lse, ids + torch.iinfo(torch.int32).max, *bounds, 0.25, 0.0)
    assert torch.equal(out, torch.zeros_like(out))
    _native.call("attention_column_sum", columns, q, k, lse, ids + LENGTHS[1], *bounds, 0, 0.25, 0.0)
    assert torch.equal(columns, torch.zeros_like(columns))
    # Intervals that reach past the keys end with them.
    full = [torch.full_like(bounds[0], -5), torch.full_like(bounds[1], 2**31 - 1)]
    _native.call("attention_mass", out, q, k, lse, ids, *full, 0.25, 0.0)
    expected = native.attention_mass(q, k, lse, ids, 0 * full[0], 0 * full[1] + LENGTHS[1], 1, 0.25, None)
    assert torch.equal(out, expected)
