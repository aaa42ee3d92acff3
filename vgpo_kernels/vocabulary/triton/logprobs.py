"""Log-probabilities straight from hidden states and head: an online logsumexp over tiles of the vocabulary.

A program owns a block of tokens and a part of the vocabulary. It walks tiles of the vocabulary and, in each, the width
of the hidden states. What it leaves, three numbers a token, a second kernel merges in a fixed order: no logits.

y is a logit, bounded by 1 if there is a soft-cap, and z = score_scale * y is what the softmax is taken of. The distance
to the largest y so far is taken before it is scaled: exact where it counts, whatever the size of the logits.
"""

import functools
import math

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, tanh, target_of, tl, triton, with_unit_columns
from vgpo_kernels._tuning import Tiles, listed, tunable
from vgpo_kernels.vocabulary.backend import Head, Index, Logprobs

LOG2E = math.log2(math.e)
MERGE_BLOCK = 128
# Multiprocessors that the work is cut for: of the usual GPU of each target, so that results depend on shapes alone.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
# Hidden states that a group of blocks may hold: they stay in a second-level cache beside the tiles that pass by.
GROUP_BYTES = 12 << 20
# What a program costs beside its tiles, in tiles.
START = 0.5

_RUN_TIME = [
    *("tokens", "vocabulary", "width_units", "stride_w_units", "stride_bias", "tiles_per_split", "splits", "group"),
]


_TILES = "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages"


@tunable(
    "linear logprobs",
    case="linear logprobs bf16 entropy",
    candidates={
        "sm_80": listed(_TILES, (128, 128, 32, 8, 4), (128, 128, 32, 4, 4), (128, 64, 64, 4, 3), (256, 64, 64, 8, 3)),
        "sm_90": listed(_TILES, (256, 128, 64, 8, 3), (256, 128, 32, 8, 4), (256, 64, 64, 8, 4), (128, 128, 64, 8, 4)),
        "sm_100": listed(
            _TILES, (128, 128, 128, 8, 3), (128, 128, 64, 8, 6), (128, 128, 64, 8, 3), (256, 64, 64, 8, 4)
        ),
        "sm_120": listed(_TILES, (128, 128, 32, 8, 4), (128, 64, 64, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3)),
        "gfx942": listed(_TILES, (128, 128, 32, 8, 2), (128, 64, 32, 4, 2), (128, 64, 64, 4, 2), (128, 128, 64, 4, 2)),
    },
)
def linear_tiles(itemsize: int, target: str, *, unit: int, softcap: bool) -> Tiles:
    """Returns the tiles of a target: BLOCK_M tokens by BLOCK_N of the vocabulary, BLOCK_K of the width at a time.

    On sm_90 the product is 256 by 128: with as many elements the other way around, a row's maximum keeps too many
    registers busy, and smaller ones want more of the second-level cache than it gives.
    """
    # tanh takes registers beside the logits: of vectors on sm_100, of scalars, where masks live, on AMD.
    words = {"gfx942": 16, "sm_100": 64}.get(target, 128) if softcap else 128
    if itemsize == 4 or unit == 1:  # products without tensor cores, or an address an element
        columns = 16 if unit == 1 else 32
        tiles = {"BLOCK_M": 64, "BLOCK_N": min(words, 64), "BLOCK_K": columns, "num_warps": 8, "num_stages": 2}
        # Without `maxnreg` ptxas spills rather than take more than 128 registers.
        return tiles if target == "gfx942" else tiles | {"maxnreg": 255}
    rows = 256 if target == "sm_90" else 128
    # On sm_120 a wider step leaves no register beside its fragments.
    columns, stages = {"sm_80": (64, 3), "sm_120": (32, 4), "gfx942": (64, 2)}.get(target, (64, 4))
    return {"BLOCK_M": rows, "BLOCK_N": words, "BLOCK_K": columns, "num_warps": 8, "num_stages": stages}


@functools.lru_cache(maxsize=4096)
def cut(tokens: int, vocabulary: int, row_bytes: int, BLOCK_M: int, BLOCK_N: int, target: str) -> tuple[int, int]:
    """Returns how many blocks of tokens make a group, and how many tiles of the vocabulary a program walks.

    Programs of a group start together, and those of the same part of the vocabulary, side by side, read the same tiles
    of the weight at the same time: from memory once for all of them. A group is as large as its hidden states stay
    cached, and has parts enough for every multiprocessor; of those numbers, the one that keeps them busiest is taken.
    """
    programs = MULTIPROCESSORS[target]
    blocks, tiles = triton.cdiv(tokens, BLOCK_M), triton.cdiv(vocabulary, BLOCK_N)
    most = max(1, GROUP_BYTES // (BLOCK_M * row_bytes))
    group = triton.cdiv(blocks, triton.cdiv(blocks, most))  # groups of one size, but for the last
    fewest = max(1, programs // group)

    def cost(splits: int) -> float:
        return triton.cdiv(blocks * splits, programs) * (triton.cdiv(tiles, splits) + START)

    splits = min((n for n in range(fewest, fewest + 32) if n <= tiles), key=cost, default=tiles)
    return group, triton.cdiv(tiles, splits)


@triton.jit(do_not_specialize=_RUN_TIME)
def linear_logprobs_kernel(
    hidden_ptr,
    offsets_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    chosen_ptr,
    shift_ptr,
    total_ptr,
    weighted_ptr,
    tokens,
    vocabulary,
    width_units,
    stride_w_units,
    stride_bias,
    tiles_per_split,
    splits,
    group,
    inverse_cap,
    scale2,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Leaves max y, sum 2^u and sum u 2^u of BLOCK_M tokens and a part of the vocabulary; u = scale2 (y - max y)."""
    first_block = tl.program_id(0) // (group * splits) * group
    in_group = tl.minimum(tl.cdiv(tokens, BLOCK_M) - first_block, group)
    place = tl.program_id(0) - first_block * splits
    split = place // in_group
    begin = (first_block + place % in_group) * BLOCK_M
    o_m = begin + tl.arange(0, BLOCK_M)  # [BM]
    m_m = o_m < tokens
    b_target = tl.load(targets_ptr + o_m, mask=m_m, other=-1)  # [BM]
    b_target = tl.where((b_target >= 0) & (b_target < vocabulary), b_target, -1).to(tl.int32)

    o_k = tl.arange(0, BLOCK_K)  # [BK]
    o_n = tl.arange(0, BLOCK_N)  # [BN]
    stride_w = stride_w_units.to(tl.int64) * UNIT
    # Beyond the last token the first of `hidden` is read: it exists, and nothing is stored.
    p_hidden = hidden_ptr + (tl.load(offsets_ptr + o_m, mask=m_m, other=0) * UNIT)[:, None] + o_k[None, :]  # [BM, BK]
    o_w = (o_n * stride_w)[:, None] + o_k[None, :]  # [BN, BK]
    width = width_units * UNIT
    tl.assume(width > 0)  # else the one loop below comes with a second one, for no width at all
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(vocabulary, BLOCK_N))

    # Finite, so that a part of nothing but -inf adds 0 to the others.
    b_shift = tl.full([BLOCK_M], -1.0e37, tl.float32)  # [BM]
    b_total = tl.zeros([BLOCK_M], tl.float32)  # [BM]
    b_weighted = tl.zeros([BLOCK_M], tl.float32)  # [BM]
    # One loop out of two: the next tile is on its way while this one's exponentials are made.
    for tile in tl.range(first, last, flatten=True):
        start = tile * BLOCK_N
        m_n = start + o_n < vocabulary
        p_w = weight_ptr + start * stride_w
        b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BM, BN]
        for k in range(0, width, BLOCK_K):
            if EVEN:
                b_h = tl.load(p_hidden + k)  # [BM, BK]
                b_w = tl.load(p_w + k + o_w, mask=m_n[:, None], other=0.0)  # [BN, BK]
            else:
                m_k = (k + o_k < width)[None, :]
                b_h = tl.load(p_hidden + k, mask=m_k, other=0.0)
                b_w = tl.load(p_w + k + o_w, mask=m_n[:, None] & m_k, other=0.0)
            b_y = tl.dot(b_h, tl.trans(b_w), b_y, input_precision="ieee" if IEEE else None)
        if bias_ptr is not None:
            # Beyond the vocabulary every logit is -inf; a soft-cap makes it finite, so then it is so made below.
            beyond: tl.constexpr = 0.0 if SOFTCAP else float("-inf")
            p_bias = bias_ptr + (start + o_n).to(tl.int64) * stride_bias  # [BN]
            b_y += tl.load(p_bias, mask=m_n, other=beyond).to(tl.float32)[None, :]
        if SOFTCAP:
            b_y = tanh(b_y * inverse_cap)
        if SOFTCAP or bias_ptr is None:
            b_y += tl.where(m_n, 0.0, float("-inf"))[None, :]

        # Triton 3.6 does not make one loop of two where a branch comes last.
        b_at = b_target - start  # [BM]
        if tl.max(((b_at >= 0) & (b_at < BLOCK_N)).to(tl.int32), axis=0) != 0:  # few tiles hold a target of the block
            b_chosen = tl.sum(tl.where(b_at[:, None] == o_n[None, :], b_y, 0.0), axis=1)  # [BM]
            # Kept in registers until the end, it would make sm_90 spill.
            tl.store(chosen_ptr + o_m, b_chosen, mask=(b_at >= 0) & (b_at < BLOCK_N))

        b_new = tl.maximum(b_shift, tl.max(b_y, axis=1))  # [BM]
        b_u = (b_y - b_new[:, None]) * scale2  # [BM, BN]
        b_e = tl.exp2(b_u)  # [BM, BN]
        # Bounded, as below, so that 0 times it is 0.
        b_step = tl.maximum((b_shift - b_new) * scale2, -1.0e4)  # [BM]
        b_keep = tl.exp2(b_step)  # [BM]
        if ENTROPY:
            b_weighted = (b_weighted + b_total * b_step) * b_keep
            b_weighted += tl.sum(b_e * tl.maximum(b_u, -1.0e4), axis=1)
        b_total = b_total * b_keep + tl.sum(b_e, axis=1)
        b_shift = b_new

    # From the first token's place: those of o_m are 64 bits wide, kept beside the loop for nothing else.
    o_out = split.to(tl.int64) * tokens + begin + tl.arange(0, BLOCK_M)  # [BM]
    tl.store(shift_ptr + o_out, b_shift, mask=m_m)
    tl.store(total_ptr + o_out, b_total, mask=m_m)
    if ENTROPY:
        tl.store(weighted_ptr + o_out, b_weighted, mask=m_m)


@triton.jit(do_not_specialize=["tokens", "splits"])
def merge_kernel(
    chosen_ptr,
    shift_ptr,
    total_ptr,
    weighted_ptr,
    logps_ptr,
    lse_ptr,
    entropy_ptr,
    tokens,
    splits,
    score_scale,
    scale2,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program merges what the parts of the vocabulary left of BLOCK tokens, in their order."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_m = o_m < tokens
    b_shift = tl.full([BLOCK], -1.0e37, tl.float32)
    o_part = o_m
    for _ in range(0, splits):
        b_shift = tl.maximum(b_shift, tl.load(shift_ptr + o_part, mask=m_m, other=0.0))
        o_part += tokens
    b_total = tl.zeros([BLOCK], tl.float32)
    b_weighted = tl.zeros([BLOCK], tl.float32)
    o_part = o_m
    for _ in range(0, splits):
        b_step = tl.maximum((tl.load(shift_ptr + o_part, mask=m_m, other=0.0) - b_shift) * scale2, -1.0e4)
        b_keep = tl.exp2(b_step)
        b_part = tl.load(total_ptr + o_part, mask=m_m, other=1.0)
        if ENTROPY:
            b_weighted += (tl.load(weighted_ptr + o_part, mask=m_m, other=0.0) + b_part * b_step) * b_keep
        b_total += b_part * b_keep
        o_part += tokens
    # Nothing but -inf has no distribution.
    b_total = tl.where(b_total > 0.0, b_total, float("nan"))
    b_log_total = tl.log(b_total)
    # The distance to the largest first: close to a probability of 1 an LSE would cancel against the logit.
    b_distance = tl.load(chosen_ptr + o_m, mask=m_m, other=0.0) - b_shift
    tl.store(logps_ptr + o_m, b_distance * score_scale - b_log_total, mask=m_m)
    tl.store(lse_ptr + o_m, b_shift * score_scale + b_log_total, mask=m_m)
    if ENTROPY:
        tl.store(entropy_ptr + o_m, b_log_total - b_weighted / b_total * 0.6931471805599453, mask=m_m)


def linear_logprobs(hidden: Tensor, index: Index, head: Head, targets: Tensor, entropy: bool) -> Logprobs:
    """Returns logps, LSE and entropy (None unless asked for), (m,) each.

    Args:
        hidden: (..., D), fp16, bf16 or fp32; read where it lies.
        index: the tokens.
        head: of that dtype.
        targets: (m,) int64; one outside [0, V) reads nothing, its log-probability is NaN.
        entropy: compute the entropy, too.
    """
    weight, bias, temperature, softcap = head
    tokens, (vocabulary, width) = targets.shape[0], weight.shape
    logps = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    lse = torch.empty_like(logps)
    entropies = torch.empty_like(logps) if entropy else None
    if tokens == 0:
        return logps, lse, entropies
    hidden, weight = with_unit_columns(hidden), with_unit_columns(weight)
    unit = _unit(hidden, weight)
    target = target_of(hidden)
    tiles = linear_tiles(hidden.element_size(), target, unit=unit, softcap=softcap is not None)
    row_bytes = width * hidden.element_size()
    group, tiles_per_split = cut(tokens, vocabulary, row_bytes, tiles["BLOCK_M"], tiles["BLOCK_N"], target)
    splits = triton.cdiv(triton.cdiv(vocabulary, tiles["BLOCK_N"]), tiles_per_split)
    shift = logps.new_empty(splits, tokens)
    total = torch.empty_like(shift)
    weighted = torch.empty_like(total) if entropy else None
    chosen = torch.full_like(logps, float("nan"))
    score_scale = (1.0 if softcap is None else softcap) / temperature
    linear_logprobs_kernel[(triton.cdiv(tokens, tiles["BLOCK_M"]) * splits,)](
        hidden_ptr=hidden,
        offsets_ptr=_offsets(hidden, index, unit),
        weight_ptr=weight,
        bias_ptr=bias,
        targets_ptr=targets.contiguous(),
        chosen_ptr=chosen,
        shift_ptr=shift,
        total_ptr=total,
        weighted_ptr=weighted,
        tokens=tokens,
        vocabulary=vocabulary,
        width_units=width // unit,
        stride_w_units=weight.stride(0) // unit,
        stride_bias=0 if bias is None else bias.stride(0),
        tiles_per_split=tiles_per_split,
        splits=splits,
        group=group,
        inverse_cap=1.0 if softcap is None else 1.0 / softcap,
        scale2=score_scale * LOG2E,
        SOFTCAP=softcap is not None,
        ENTROPY=entropy,
        UNIT=unit,
        EVEN=width % tiles["BLOCK_K"] == 0,
        IEEE=hidden.dtype == torch.float32,
        **tiles,
    )
    merge_kernel[(triton.cdiv(tokens, MERGE_BLOCK),)](
        chosen_ptr=chosen,
        shift_ptr=shift,
        total_ptr=total,
        weighted_ptr=weighted,
        logps_ptr=logps,
        lse_ptr=lse,
        entropy_ptr=entropies,
        tokens=tokens,
        splits=splits,
        score_scale=score_scale,
        scale2=score_scale * LOG2E,
        ENTROPY=entropy,
        BLOCK=MERGE_BLOCK,
        num_warps=4,
    )
    return logps, lse, entropies


def _unit(hidden: Tensor, weight: Tensor) -> int:
    """Returns how many elements 16 bytes hold where every row begins and ends at such a piece, else 1."""
    vector = 16 // hidden.element_size()
    steps = [weight.shape[1], weight.stride(0), *hidden.stride()[:-1]]
    whole = all(x.data_ptr() % 16 == 0 for x in (hidden, weight)) and all(step % vector == 0 for step in steps)
    return vector if whole else 1


def _offsets(hidden: Tensor, index: Index, unit: int) -> Tensor:
    """Returns where the tokens at `index` begin, (m,) int64, in units."""
    offsets = torch.zeros_like(index[0])
    for axis, stride in zip(index, hidden.stride(), strict=False):
        offsets.add_(axis, alpha=stride // unit)
    return offsets


def compile_cases() -> list[CompileCase]:
    """Returns the kernel of each dtype, with and without what is optional, and at rows off 16 bytes; the merge."""
    floats = ("chosen_ptr", "shift_ptr", "total_ptr", "weighted_ptr", "logps_ptr", "lse_ptr", "entropy_ptr")
    merged = dict.fromkeys(floats, "*fp32") | {
        "tokens": "i32",
        "splits": "i32",
        "score_scale": "fp32",
        "scale2": "fp32",
    }
    return [
        _compile_case("bf16"),
        _compile_case("bf16", entropy=True),
        _compile_case("bf16", entropy=True, ragged=True),
        _compile_case("bf16", entropy=True, softcap=True, bias=True),
        _compile_case("fp16", bias=True),
        _compile_case("bf16", entropy=True, softcap=True, bias=True, unit=1, ragged=True),
        _compile_case("fp32", entropy=True, softcap=True, bias=True),
        _compile_case("fp32", entropy=True, unit=1, ragged=True),
        CompileCase(
            "linear logprobs merge", merge_kernel, merged, {"ENTROPY": True, "BLOCK": MERGE_BLOCK}, {"num_warps": 4}
        ),
    ]


def _compile_case(
    dtype: str,
    *,
    entropy: bool = False,
    softcap: bool = False,
    bias: bool = False,
    unit: int | None = None,
    ragged: bool = False,
) -> CompileCase:
    itemsize = 4 if dtype == "fp32" else 2
    unit = 16 // itemsize if unit is None else unit
    absent = ["weighted_ptr"] * (not entropy) + ["bias_ptr"] * (not bias)
    signature = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("offsets_ptr", "targets_ptr"), "*i64")
    signature |= dict.fromkeys(("chosen_ptr", "shift_ptr", "total_ptr", "weighted_ptr"), "*fp32")
    signature |= dict.fromkeys(("inverse_cap", "scale2"), "fp32") | dict.fromkeys(_RUN_TIME, "i32")
    constexprs = dict.fromkeys(absent) | {"SOFTCAP": softcap, "ENTROPY": entropy, "UNIT": unit}
    constexprs |= {"EVEN": not ragged, "IEEE": dtype == "fp32"}
    flags = {"entropy": entropy, "softcap": softcap, "bias": bias, "ragged": ragged, "strided": unit == 1}
    return CompileCase(
        " ".join(["linear logprobs", dtype, *(name for name, given in flags.items() if given)]),
        linear_logprobs_kernel,
        {name: kind for name, kind in signature.items() if name not in absent},
        constexprs,
        tiles=lambda target: linear_tiles(itemsize, target, unit=unit, softcap=softcap),
    )
