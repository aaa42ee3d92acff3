"""Few queries against many keys: the splitting kernel and its merge against dense attention."""

import pytest
import torch
from attention_checks import DTYPES, MASKS, bundled, case, check_forward, on

from vgpo_kernels.attention.triton import decode, forward, visual_attention


def attend(device, tensors, scale=None, softcap=None):
    q, k = tensors["q"], tensors["k"]
    assert decode.takes(q.shape[2], q.shape[1] // k.shape[1], q.shape[3])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return visual_attention(**bundled(on(device, tensors)), scale=scale, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(device, mask, dtype):
    # Six queries, so that a tile of them is cut; three tiles of keys and a piece.
    tensors = case(mask, "image", (4, 2), (6, 200), 16, dtype)
    check_forward(attend(device, tensors), tensors)


@pytest.mark.parametrize("kind", ["none", "all", "scattered", "holes"])
def test_every_kind_of_key(device, kind):
    tensors = case("causal", kind, (2, 1), (3, 150), 16, torch.float16)
    check_forward(attend(device, tensors), tensors)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (7, 1), (64, 1)])
def test_one_query_of_groups_of_heads(device, heads):
    tensors = case("causal", "holes", heads, (1, 150), 16, torch.float16)
    check_forward(attend(device, tensors), tensors)


@pytest.mark.parametrize(
    ("D", "dtype"),
    [
        (64, torch.float16),
        (72, torch.float16),
        (100, torch.float32),
        (128, torch.float32),
        (256, torch.float16),
        (289, torch.float16),  # wide heads, whose rows no vector divides
        (512, torch.float32),
    ],
)
def test_every_head_size(device, D, dtype):
    tensors = case("causal", "image", (2, 1), (2, 90), D, dtype)
    check_forward(attend(device, tensors), tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(device, dtype):
    tensors = case("window", "holes", (2, 1), (4, 90), 32, dtype)
    check_forward(attend(device, tensors, 1.0, 3.0), tensors, scale=1.0, softcap=3.0)


@pytest.mark.parametrize(("queries", "split"), [(4, True), (5, False)])
def test_wide_heads_take_half_as_many_rows(device, queries, split):
    # Eight heads a group: 32 rows are the most for heads above 256; 40 go to the other kernel.
    assert decode.takes(queries, 8, 320) is split
    tensors = case("window", "holes", (8, 1), (queries, 90), 320, torch.float16)
    results = visual_attention(**bundled(on(device, tensors)), scale=0.2, softcap=3.0)
    check_forward(results, tensors, scale=0.2, softcap=3.0)


@pytest.mark.parametrize("splits", [1, 2, 17, 40])
def test_any_number_of_splits(device, monkeypatch, splits):
    # One part, some, more than the merge holds at once, more than there are tiles; the cache ends in the middle.
    monkeypatch.setattr(decode, "splits", lambda *_: splits)
    tensors = case("right", "image", (2, 1), (3, 700), 16, torch.float16)
    tensors["key_end"].clamp_(max=300)
    tensors |= {name: tensors[name].nan_to_num(0.5) for name in "qkv"}
    tensors["k"][:, :, 300:] = float("nan")
    tensors["v"][:, :, 300:] = float("nan")
    check_forward(attend(device, tensors), tensors)


def test_a_short_cache_in_a_long_buffer(device):
    # 256 keys in a buffer of 4096: most of the parts hold nothing.
    tensors = case("causal", "image", (1, 1), (1, 4096), 16, torch.float16)
    tensors["key_end"].fill_(256)
    short = {name: x[:, :, :256] if name in "kv" else x for name, x in tensors.items()}
    short["key_kinds"] = tensors["key_kinds"][:, :256]
    long = attend(device, tensors)
    check_forward(long, tensors)
    check_forward(attend(device, short), short)


def test_splits_follow_the_shapes():
    assert decode.splits(1, 64, 64, 132) == 1  # one tile
    assert decode.splits(1, 65536, 64, 132) == 264  # two programs a processor
    assert decode.splits(32, 65536, 64, 132) == 8
    assert decode.splits(4096, 65536, 64, 132) == 1  # rows enough


@pytest.mark.parametrize("kv_heads", [4, 8])  # Qwen2.5-VL 7B; 32B and 72B
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("Lk", [2048, 8192, 32768])
def test_all_programs_run_at_once_and_share_evenly(kv_heads, batch, Lk):
    slots, row_heads, tiles = 2 * 132, batch * kv_heads, Lk // 64
    splits = decode.splits(row_heads, Lk, 64, 132)
    assert row_heads * splits <= slots
    # What the last program to end has walked, in tiles, against what it would be on slots that are all busy.
    longest = -(-tiles // splits)
    assert longest <= 1.1 * row_heads * tiles / slots + 1


@pytest.mark.parametrize("layout", ["contiguous", "columns apart", "a column off"])
def test_any_strides(device, layout):
    tensors = case("causal", "image", (2, 1), (3, 100), 16, torch.float32)
    expected = attend(device, tensors)
    for name in "qkv":
        if layout == "contiguous":
            tensors[name] = tensors[name].contiguous()
        elif layout == "columns apart":
            tensors[name] = tensors[name].repeat_interleave(2, dim=3)[..., ::2]
        else:
            tensors[name] = torch.nn.functional.pad(tensors[name], (1, 2))[..., 1:17]
    results = attend(device, tensors)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_both_kernels_agree(device, monkeypatch):
    tensors = case("causal", "holes", (2, 1), (8, 200), 16, torch.float32)
    split = attend(device, tensors)
    monkeypatch.setattr(decode, "takes", lambda *_: False)
    whole = forward.visual_attention(**bundled(on(device, tensors)), scale=0.25, softcap=None)
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_runs_are_bit_identical(device):
    tensors = case("arbitrary", "holes", (2, 1), (4, 300), 16, torch.float16)
    first, second = attend(device, tensors), attend(device, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
