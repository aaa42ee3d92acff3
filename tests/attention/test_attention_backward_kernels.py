"""Gradients through the output, the mass and the LSE: the kernels against autograd through dense attention."""

import pytest
import torch
from attention_checks import DTYPES, MASKS, bundled, case, dense, on, without_finite_scores

from vgpo_kernels.attention import reference
from vgpo_kernels.attention.triton import visual_attention, visual_attention_backward
from vgpo_kernels.testing import assert_error_budget

# Two tiles of queries and two of keys.
LENGTHS = (70, 140)


def gradients_given(tensors, through):
    """Returns the gradients of out, mass and LSE; None or 0 where nothing comes through."""
    generator = torch.Generator().manual_seed(6)
    q = tensors["q"]
    grad_out = torch.randn(q.shape, generator=generator).to(q.dtype)
    grad_mass, grad_lse = (torch.randn(q.shape[:3], generator=generator) for _ in range(2))
    if "out" not in through:
        grad_out = torch.zeros_like(grad_out)
    return grad_out, grad_mass if "mass" in through else None, grad_lse if "lse" in through else None


def kernel_gradients(device, tensors, given, scale, softcap=None):
    tensors = on(device, tensors)
    grads = [None if grad is None else grad.to(device) for grad in given]
    known = dict(
        zip(("out", "mass", "lse"), visual_attention(**bundled(tensors), scale=scale, softcap=softcap), strict=True)
    )
    return visual_attention_backward(*grads, **bundled(tensors), **known, scale=scale, softcap=softcap)


def autograd_gradients(tensors, given, dtype, scale, softcap=None):
    leaves = {name: tensors[name].nan_to_num(0.0).to(dtype).requires_grad_() for name in "qkv"}
    results = dense(tensors | leaves, dtype, scale=scale, softcap=softcap)
    loss = 0.0
    for result, grad in zip(results, given, strict=True):
        if grad is not None:
            loss = loss + (result.masked_fill(result.isinf(), 0.0) * grad.to(result.dtype)).sum()
    return torch.autograd.grad(loss, list(leaves.values()))


def check(device, tensors, through=("out", "mass", "lse"), scale=None, softcap=None):
    scale = tensors["q"].shape[-1] ** -0.5 if scale is None else scale
    dtype = tensors["q"].dtype
    given = gradients_given(tensors, through)
    actual = kernel_gradients(device, tensors, given, scale, softcap)
    same = autograd_gradients(tensors, given, dtype, scale, softcap)
    exact = autograd_gradients(tensors, given, torch.float64, scale, softcap)
    for name, gradient, expected, truth in zip(("dq", "dk", "dv"), actual, same, exact, strict=True):
        assert gradient.dtype == dtype
        assert_error_budget(name, gradient.cpu(), expected, truth)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(device, mask, dtype):
    check(device, case(mask, "image", (1, 1), LENGTHS, 16, dtype))


@pytest.mark.parametrize("kind", ["none", "all", "scattered", "holes"])
def test_every_kind_of_key(device, kind):
    check(device, case("causal", kind, (1, 1), LENGTHS, 16, torch.float16))


@pytest.mark.parametrize("through", [("out",), ("mass",), ("lse",), ("out", "mass"), ("out", "lse")])
def test_through_each_result(device, through):
    check(device, case("window", "image", (1, 1), (70, 70), 16, torch.float32), through)


@pytest.mark.parametrize(
    ("D", "dtype"),
    [
        (72, torch.float16),  # a tile cut after whole vectors
        (100, torch.float32),  # cut within a vector, so that rows are laid out anew
        (128, torch.float16),
        (256, torch.float16),  # dK and dV one after the other
        (289, torch.float16),  # tiles of wide heads, cut within a vector
    ],
)
def test_head_sizes(device, D, dtype):
    check(device, case("causal", "image", (1, 1), (66, 66), D, dtype))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (7, 1)])
def test_groups_of_heads(device, heads):
    check(device, case("left", "image", heads, (66, 40), 16, torch.float16))


@pytest.mark.parametrize("lengths", [(1, 90), (5, 90), (129, 129)])
def test_lengths(device, lengths):
    # One query and few, whose forward is split over keys; one query and one key more than whole tiles.
    check(device, case("causal", "holes" if lengths[0] < 9 else "image", (2, 1), lengths, 16, torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(device, dtype):
    # Two heads: the largest error of torch in one is luck, and so would the budget be.
    check(device, case("packed", "image", (2, 2), LENGTHS, 32, dtype), scale=1.0, softcap=3.0)


@pytest.mark.parametrize(("D", "dtype", "lengths"), [(512, torch.float16, (19, 35)), (320, torch.float32, (5, 18))])
def test_wide_heads_in_groups_with_a_window_and_a_softcap(device, D, dtype, lengths):
    tensors = case("window", "holes", (2, 1), lengths, D, dtype)
    check(device, tensors, scale=0.2, softcap=3.0)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(device, scale):
    check(device, case("causal", "image", (1, 1), (70, 70), 16, torch.float32), scale=scale)


def test_strided_and_expanded_gradients(device):
    tensors = case("right", "image", (2, 1), LENGTHS, 16, torch.float16)
    grad_out, grad_mass, grad_lse = gradients_given(tensors, ("out", "mass", "lse"))
    plain = kernel_gradients(device, tensors, (grad_out, grad_mass, grad_lse), 0.25)
    strided = (
        torch.nn.functional.pad(grad_out, (1, 2))[..., 1:17],
        grad_mass.transpose(1, 2).contiguous().transpose(1, 2),
        grad_lse.repeat_interleave(2, dim=2)[..., ::2],
    )
    for a, b in zip(kernel_gradients(device, tensors, strided, 0.25), plain, strict=True):
        assert torch.equal(a, b)
    ones = [torch.ones(()).to(grad.dtype).expand(grad.shape) for grad in (grad_out, grad_mass, grad_lse)]
    solid = [grad.contiguous() for grad in ones]
    expanded = kernel_gradients(device, tensors, ones, 0.25)
    for a, b in zip(expanded, kernel_gradients(device, tensors, solid, 0.25), strict=True):
        assert torch.equal(a, b)


def test_gradients_of_queries_that_see_nothing_may_be_anything(device):
    tensors = case("empty", "holes", (1, 1), LENGTHS, 16, torch.float16)
    given = gradients_given(tensors, ("out", "mass", "lse"))
    clean = kernel_gradients(device, tensors, given, 0.25)
    blind = (tensors["key_start"] >= tensors["key_end"])[:, None]
    assert blind.any()
    garbage = [grad.masked_fill(blind[..., None] if grad.dim() == 4 else blind, float("nan")) for grad in given]
    for a, b in zip(kernel_gradients(device, tensors, garbage, 0.25), clean, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(clean[0][blind.expand(clean[0].shape[:3])].cpu(), torch.zeros(int(blind.sum()), 16).half())


def test_runs_are_bit_identical(device):
    tensors = case("arbitrary", "holes", (2, 1), LENGTHS, 16, torch.float16)
    given = gradients_given(tensors, ("out", "mass", "lse"))
    first = kernel_gradients(device, tensors, given, 0.25)
    for a, b in zip(kernel_gradients(device, tensors, given, 0.25), first, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seen", [128, 140])
def test_scores_of_minus_infinity(device, seen):
    tensors, rows = without_finite_scores(seen, torch.float16)
    given = gradients_given(tensors, ("out", "mass", "lse"))
    actual = kernel_gradients(device, tensors, given, 0.25)
    known = dict(
        zip(
            ("out", "mass", "lse"),
            reference.visual_attention(**bundled(tensors), scale=0.25, softcap=None),
            strict=True,
        )
    )
    expected = reference.visual_attention_backward(*given, **bundled(tensors), **known, scale=0.25, softcap=None)
    assert (actual[0][:, :, rows] == 0).all()
    for gradient, known_gradient in zip(actual, expected, strict=True):
        numbers = ~known_gradient.isnan()
        # Its dK is a sum over all queries, with 0 times their infinities in the first column.
        assert numbers[:, :, -6:, 1:].all()
        torch.testing.assert_close(gradient.cpu()[numbers], known_gradient[numbers], rtol=5e-3, atol=5e-3)
