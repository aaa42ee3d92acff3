"""Attention with its mass on visual keys: the kernel against dense attention, on what breaks such kernels."""

import pytest
import torch
from attention_checks import DTYPES, MASKS, bundled, case, check_forward, on, without_finite_scores

from vgpo_kernels.attention import reference
from vgpo_kernels.attention.intervals import KeyMask
from vgpo_kernels.attention.triton import forward
from vgpo_kernels.attention.triton.key_blocks import find_keys

# The row takes two tiles of queries and two of keys, and queries are more than the splitting kernel takes.
LENGTHS = (70, 140)


def attend(device, tensors, scale=None, softcap=None, **options):
    scale = tensors["q"].shape[-1] ** -0.5 if scale is None else scale
    return forward.visual_attention(**bundled(on(device, tensors)), scale=scale, softcap=softcap, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(device, mask, dtype):
    tensors = case(mask, "image", (1, 1), LENGTHS, 16, dtype)
    check_forward(attend(device, tensors), tensors)


@pytest.mark.parametrize("kind", ["none", "all", "scattered", "holes"])
@pytest.mark.parametrize("mask", ["causal", "arbitrary"])
def test_every_kind_of_key(device, mask, kind):
    tensors = case(mask, kind, (1, 1), LENGTHS, 16, torch.float16)
    results = attend(device, tensors)
    check_forward(results, tensors)
    if kind == "none":
        assert torch.equal(results[1], torch.zeros_like(results[1]))


@pytest.mark.parametrize(
    ("D", "dtype"),
    [
        (64, torch.float16),  # exactly a tile
        (72, torch.float16),  # a tile cut after whole vectors
        (80, torch.float32),
        (96, torch.float16),
        (100, torch.float32),  # cut within a vector, so that rows are laid out anew
        (128, torch.float16),
        (256, torch.float16),
        (289, torch.float16),  # tiles of wide heads, cut within a vector
        (512, torch.float16),
    ],
)
def test_every_head_size(device, D, dtype):
    tensors = case("causal", "image", (1, 1), (66, 66), D, dtype)
    check_forward(attend(device, tensors), tensors)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (7, 1)])
def test_groups_of_heads(device, heads):
    tensors = case("left", "image", heads, (66, 40), 16, torch.float16)
    check_forward(attend(device, tensors), tensors)


@pytest.mark.parametrize("lengths", [(65, 1), (129, 129), (66, 300)])
def test_lengths_at_the_edges_of_tiles(device, lengths):
    # One key; one query and one key more than whole tiles; many more keys than queries.
    tensors = case("full" if lengths[1] == 1 else "causal", "scattered", (1, 1), lengths, 16, torch.float16)
    check_forward(attend(device, tensors), tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(device, dtype):
    tensors = case("window", "holes", (1, 1), LENGTHS, 32, dtype)
    # Scores of a size that the cap bends.
    check_forward(attend(device, tensors, 1.0, 3.0), tensors, scale=1.0, softcap=3.0)


@pytest.mark.parametrize(("D", "dtype", "lengths"), [(384, torch.float16, (19, 35)), (512, torch.float32, (17, 19))])
def test_wide_heads_in_groups_with_a_window_and_a_softcap(device, D, dtype, lengths):
    tensors = case("window", "holes", (2, 1), lengths, D, dtype)
    check_forward(attend(device, tensors, 0.2, 3.0), tensors, scale=0.2, softcap=3.0)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 4.0])
def test_any_scale(device, scale):
    tensors = case("causal", "image", (1, 1), LENGTHS, 16, torch.float32)
    check_forward(attend(device, tensors, scale), tensors, scale=scale)


@pytest.mark.parametrize("layout", ["contiguous", "columns apart", "a column off"])
def test_any_strides(device, layout):
    tensors = case("packed", "image", (1, 1), LENGTHS, 16, torch.float16)
    expected = attend(device, tensors)
    for name in "qkv":
        if layout == "contiguous":
            tensors[name] = tensors[name].contiguous()
        elif layout == "columns apart":
            tensors[name] = tensors[name].repeat_interleave(2, dim=3)[..., ::2]
        else:  # rows start where 16 bytes do not
            tensors[name] = torch.nn.functional.pad(tensors[name], (1, 2))[..., 1:17]
    results = attend(device, tensors)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_one_row_expanded(device):
    tensors = case("full", "image", (1, 1), LENGTHS, 16, torch.float16)
    tensors |= {name: tensors[name][:1].expand(2, -1, -1, -1) for name in "qkv"}
    check_forward(attend(device, tensors), tensors)


def test_without_the_mass(device):
    tensors = case("causal", "holes", (1, 1), LENGTHS, 16, torch.float32)
    out, mass, lse = attend(device, tensors)
    bare = attend(device, tensors, with_mass=False)
    assert bare[1] is None
    assert torch.equal(bare[0], out)
    assert torch.equal(bare[2], lse)
    assert mass is not None


def test_runs_are_bit_identical(device):
    tensors = case("arbitrary", "holes", (1, 1), LENGTHS, 16, torch.float16)
    first, second = attend(device, tensors), attend(device, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_garbage_values_of_the_keys_change_nothing(device):
    tensors = case("right", "holes", (1, 1), LENGTHS, 16, torch.float32)
    poisoned = attend(device, tensors)
    clean = attend(device, tensors | {name: tensors[name].nan_to_num(7.0) for name in "qkv"})
    assert all(torch.equal(a, b) for a, b in zip(poisoned, clean, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seen", [128, 140])
def test_scores_of_minus_infinity(device, seen, dtype):
    # In whole tiles, alone and after cut ones.
    tensors, rows = without_finite_scores(seen, dtype)
    results = attend(device, tensors)
    expected = reference.visual_attention(**bundled(tensors), scale=0.25, softcap=None)
    for actual, known, nothing in zip(results, expected, (0.0, 0.0, -torch.inf), strict=True):
        torch.testing.assert_close(actual.cpu(), known, rtol=2e-3, atol=2e-3)
        assert (actual[:, :, rows] == nothing).all()


def test_a_tile_of_minus_infinity_before_others(device):
    tensors = case("full", "image", (1, 1), (70, 256), 16, torch.float16)
    tensors["q"][..., 0] = -1.0
    tensors["k"][:, :, :128, 0] = torch.inf
    results = attend(device, tensors)
    expected = reference.visual_attention(**bundled(tensors), scale=0.25, softcap=None)
    for actual, known in zip(results, expected, strict=True):
        torch.testing.assert_close(actual.cpu(), known, rtol=2e-3, atol=2e-3)


def test_what_a_block_of_keys_holds(device):
    start = torch.tensor([[0, 0, 0, 40, 9, 8]], dtype=torch.int32, device=device)
    end = torch.tensor([[8, 20, 16, 48, 9, 30]], dtype=torch.int32, device=device)
    key_kinds = torch.ones(1, 45, dtype=torch.int8, device=device)
    key_kinds[0, 4:16] = 2
    key_kinds[0, 18] = 0
    end.clamp_(max=45)
    keys = find_keys(KeyMask(start, end, key_kinds), 16)
    weight = torch.zeros(48)
    weight[4:16] = 1
    weight[[18, *range(30, 40), 45, 46, 47]] = -1  # hidden, seen by no query, beyond the last
    assert torch.equal(keys.weight[0].cpu(), weight)
    assert keys.kind.tolist() == [[2, 3, 0]]  # visual keys and others, a hole, ordinary keys
    # Queries that see a key of the block: 0 to 5, 1 to 5, 3 alone; tiles that see all of it: 1 to 2, none, none.
    assert keys.queries[0, :, :2].tolist() == [[0, 6], [1, 6], [3, 4]]
    assert keys.queries[0, 0, 2:].tolist() == [1, 3]
    assert all(first >= last for first, last in keys.queries[0, 1:, 2:].tolist())
