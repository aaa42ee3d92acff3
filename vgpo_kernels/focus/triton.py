"""The focus score in two Triton kernels: the prototypes, then the cosines to them.

Only states that are visual or in the completion are read, each of them once where a sequence has one
prototype, and nothing of shape (B, L, D) is written.
"""

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, target_of, tl, triton
from vgpo_kernels._tuning import Tiles, listed, tunable
from vgpo_kernels.focus.prototypes import index_prototypes

VECTOR = 8  # elements in the widest load, 16 bytes at two bytes an element
_TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@triton.jit
def _wanted(visual_ptr, index_ptr, row, prototype, o_l, L, GROUPED: tl.constexpr):
    """Which tokens of a row make the prototype, a bool tile of the shape of `o_l`."""
    m_l = o_l < L
    if GROUPED:
        return tl.load(index_ptr + row * L + o_l, mask=m_l, other=-1) == prototype
    return tl.load(visual_ptr + row * L + o_l, mask=m_l, other=0) != 0


@triton.jit
def _columns(o_d, stride_d, UNIT: tl.constexpr):
    """Offsets of columns; whole units lie side by side."""
    return o_d.to(tl.int64) * (stride_d if UNIT == 1 else 1)


@triton.jit(do_not_specialize=["L", "D_units", "stride_b_units", "stride_l_units", "stride_d"])
def prototype_kernel(
    h_ptr,
    visual_ptr,
    index_ptr,
    first_ptr,
    last_ptr,
    mean_ptr,
    count_ptr,
    L,
    D_units,
    stride_b_units,
    stride_l_units,
    stride_d,
    GROUPED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_SEARCH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns a block of columns of one prototype: the mean of its visual states, in fp32."""
    D = D_units * UNIT
    n_blocks = tl.cdiv(D, BLOCK_D)
    prototype = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_d = (tl.program_id(0) % n_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BD]
    m_d = o_d < D
    if GROUPED:
        first_token = tl.load(first_ptr + prototype)
        row = first_token // L
        first = (first_token - row * L).to(tl.int32)
        last = (tl.load(last_ptr + prototype) - row * L).to(tl.int32)
    else:
        row = prototype
        b_first = tl.zeros([BLOCK_SEARCH], tl.int32) + L  # [BS]
        b_last = tl.zeros([BLOCK_SEARCH], tl.int32) - 1  # [BS]
        for start in range(0, L, BLOCK_SEARCH):
            o_s = start + tl.arange(0, BLOCK_SEARCH)  # [BS]
            b_visual = _wanted(visual_ptr, index_ptr, row, prototype, o_s, L, GROUPED)  # [BS]
            b_first = tl.where(b_visual, tl.minimum(b_first, o_s), b_first)
            b_last = tl.where(b_visual, o_s, b_last)
        first = tl.min(b_first, axis=0)
        last = tl.max(b_last, axis=0)

    stride_l = stride_l_units.to(tl.int64) * UNIT
    p_d = h_ptr + row * stride_b_units * UNIT + _columns(o_d, stride_d, UNIT)  # [BD]
    b_sum = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)  # [BL, BD]
    b_count = tl.zeros([BLOCK_L], tl.int32)  # [BL]
    o_l = first + tl.arange(0, BLOCK_L)  # [BL]
    b_wanted = _wanted(visual_ptr, index_ptr, row, prototype, o_l, L, GROUPED)  # [BL]
    # Counted from 0: Triton widens no load whose loop starts at a reduced value.
    for step in range(0, tl.cdiv(last + 1 - first, BLOCK_L)):
        o_l = first + step * BLOCK_L + tl.arange(0, BLOCK_L)
        # Loaded a step ahead, so that the states do not wait for the mask.
        b_next = _wanted(visual_ptr, index_ptr, row, prototype, o_l + BLOCK_L, L, GROUPED)  # [BL]
        b_h = tl.load(
            p_d[None, :] + o_l.to(tl.int64)[:, None] * stride_l,
            mask=b_wanted[:, None] & m_d[None, :],
            other=0.0,
        )  # [BL, BD]
        b_sum += b_h.to(tl.float32)
        b_count += b_wanted.to(tl.int32)
        b_wanted = b_next
    count = tl.sum(b_count, axis=0)
    b_mean = tl.div_rn(tl.sum(b_sum, axis=0), tl.maximum(count, 1).to(tl.float32))  # [BD]
    tl.store(mean_ptr + prototype * D + o_d, b_mean, mask=m_d)
    tl.store(count_ptr + prototype, count, mask=tl.program_id(0) % n_blocks == 0)


@tunable(
    "focus prototype",
    case="focus prototype bf16",
    candidates=dict.fromkeys(
        _TARGETS,
        listed(
            "BLOCK_SEARCH BLOCK_L BLOCK_D num_warps",
            (2048, 64, 64, 4),
            (2048, 64, 64, 8),
            (2048, 64, 128, 4),
            (2048, 128, 32, 4),
            (2048, 256, 64, 8),
        ),
    ),
)
def prototype_tiles(unit: int, itemsize: int) -> Tiles:
    """Returns the prototype kernel's tiles, chosen by registers, not timed.

    64 columns fill a cache line at two bytes an element.
    A tile of 16 KiB (8 rows of D 3584 make 448 programs) keeps enough bytes in flight; longer ones spill.
    Without whole units each element has its own address, so the tile is shorter.
    """
    length = 256 // itemsize if unit == VECTOR else 32
    return {"BLOCK_SEARCH": 2048, "BLOCK_L": length, "BLOCK_D": 64, "num_warps": 4}


@triton.jit
def _root(x):
    """The square root, of a subnormal number, too: a GPU's takes it for 0. An exact one would spill, sm_120."""
    is_small = x < 1.1754943508222875e-38
    return tl.sqrt(tl.where(is_small, x * 18446744073709551616.0, x)) * tl.where(is_small, 2.3283064365386963e-10, 1.0)


@triton.jit
def _cosine(p_h, p_mean, m_t, D, stride_d, UNIT: tl.constexpr, SPREAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosines [BT] of the states at `p_h` [BT, 1] to the prototype at `p_mean`; only rows in `m_t` are read."""
    BLOCK_T: tl.constexpr = m_t.shape[0]
    b_inner = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)  # [BT, BD]
    b_state = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)  # [BT, BD]
    # Read for every token, the mean has the states' layout: to change it costs barriers in the loop.
    b_prototype = tl.zeros([BLOCK_T, BLOCK_D] if SPREAD else [BLOCK_D], tl.float32)  # [BT, BD] or [BD]
    o_rows = tl.zeros([BLOCK_T, 1], tl.int32)  # [BT, 1]
    # No column is walked where no row is wanted.
    D = tl.where(tl.max(m_t.to(tl.int32), axis=0) > 0, D, 0)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)  # [BD]
        m_d = o_d < D
        p_t = p_h + _columns(o_d, stride_d, UNIT)[None, :]  # [BT, BD]
        b_h = tl.load(p_t, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)  # [BT, BD]
        if SPREAD:
            b_mean = tl.load(p_mean + (o_rows + o_d[None, :]), mask=m_d[None, :], other=0.0)  # [BT, BD]
            b_inner += b_h * b_mean
        else:
            b_mean = tl.load(p_mean + o_d, mask=m_d, other=0.0)  # [BD]
            b_inner += b_h * b_mean[None, :]
        b_state += b_h * b_h
        b_prototype += b_mean * b_mean
    norms = _root(tl.sum(b_state, axis=1)) * _root(tl.sum(b_prototype, axis=1 if SPREAD else 0))  # [BT]
    # Of the inner product and the norms, NaN is in both: it stays.
    cosine = tl.where(norms == 0, 0.0, tl.sum(b_inner, axis=1) / norms)  # [BT]
    return tl.clamp(cosine, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["L", "D_units", "stride_b_units", "stride_l_units", "stride_d"])
def cosine_kernel(
    h_ptr,
    completion_ptr,
    begin_ptr,
    end_ptr,
    mean_ptr,
    count_ptr,
    focus_ptr,
    L,
    D_units,
    stride_b_units,
    stride_l_units,
    stride_d,
    GROUPED: tl.constexpr,
    UNIT: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns a block of tokens of one row: their largest cosine to their sequence's prototypes."""
    D = D_units * UNIT
    n_blocks = tl.cdiv(L, BLOCK_T)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_t = (tl.program_id(0) % n_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BT]
    m_l = o_t < L
    m_t = tl.load(completion_ptr + row * L + o_t, mask=m_l, other=0) != 0  # [BT]
    stride_l = stride_l_units.to(tl.int64) * UNIT
    p_h = h_ptr + row * stride_b_units * UNIT + (o_t.to(tl.int64) * stride_l)[:, None]  # [BT, 1]
    if GROUPED:
        b_begin = tl.load(begin_ptr + row * L + o_t, mask=m_t, other=0)  # [BT]
        b_end = tl.load(end_ptr + row * L + o_t, mask=m_t, other=0)  # [BT]
        m_t = b_begin < b_end
        b_focus = tl.full([BLOCK_T], -1.0, tl.float32)  # [BT]
        first = tl.min(tl.where(m_t, b_begin, 2147483647), axis=0)
        last = tl.max(tl.where(m_t, b_end, -1), axis=0)
        for prototype in range(first, last):
            m_p = (b_begin <= prototype) & (prototype < b_end)  # [BT]
            p_mean = mean_ptr + D.to(tl.int64) * prototype
            b_cosine = _cosine(p_h, p_mean, m_p, D, stride_d, UNIT, SPREAD, BLOCK_D)  # [BT]
            b_larger = tl.maximum(b_focus, b_cosine, propagate_nan=tl.PropagateNan.ALL)
            b_focus = tl.where(m_p, b_larger, b_focus)
    else:
        m_t = m_t & (o_t < tl.minimum(tl.load(count_ptr + row), 1) * L)
        b_focus = _cosine(p_h, mean_ptr + row * D, m_t, D, stride_d, UNIT, SPREAD, BLOCK_D)  # [BT]
    tl.store(focus_ptr + row * L + o_t, tl.where(m_t, b_focus, 0.0), mask=m_l)


def cosine_spread(unit: int, target: str) -> int:
    """Returns 1 where the mean is read for every token: not where that spills (sm_120) or takes a load a column."""
    return int(unit == VECTOR and target != "sm_120")


def _cosine_candidates(target: str) -> tuple[Tiles, ...]:
    spread = cosine_spread(VECTOR, target)
    rows = ((4, 256, 4), (4, 512, 4), (16, 256, 8), (8, 512, 8), (4, 256, 2))
    return tuple({**tiles, "SPREAD": spread} for tiles in listed("BLOCK_T BLOCK_D num_warps", *rows))


@tunable(
    "focus cosine",
    case="focus cosine bf16",
    candidates={target: _cosine_candidates(target) for target in _TARGETS},
)
def cosine_tiles(grouped: bool, unit: int, target: str) -> Tiles:
    """Returns the cosine kernel's tiles, chosen by registers, not timed.

    256 divides the usual D; more tokens with the loop over prototypes spill.
    """
    block = 4 if grouped else 8
    return {"BLOCK_T": block, "BLOCK_D": 256, "SPREAD": cosine_spread(unit, target), "num_warps": 4}


def visual_focus_score(
    hidden_states: Tensor,
    visual_mask: Tensor,
    completion_mask: Tensor,
    image_ids: Tensor | None,
    seq_ids: Tensor | None,
) -> Tensor:
    """Returns the (B, L) fp32 focus scores; arguments as in the reference, hidden states not float64."""
    B, L, D = hidden_states.shape
    visual, completion = visual_mask.contiguous(), completion_mask.contiguous()
    group = index = first = last = None
    if image_ids is not None or seq_ids is not None:
        group = index_prototypes(visual, *(ids if ids is None else ids.contiguous() for ids in (image_ids, seq_ids)))
        index = torch.full_like(visual, -1, dtype=torch.int32)
        index.view(-1)[group.tokens] = group.member.int()
        first, last = group.tokens[group.bounds[:-1]], group.tokens[group.bounds[1:] - 1]
    P = B if first is None else len(first)
    mean = hidden_states.new_empty((P, D), dtype=torch.float32)
    count = hidden_states.new_empty((P,), dtype=torch.int32)
    focus = hidden_states.new_empty((B, L), dtype=torch.float32)
    unit = _unit(hidden_states)
    shared = {
        "h_ptr": hidden_states,
        "mean_ptr": mean,
        "count_ptr": count,
        "L": L,
        "D_units": D // unit,
        "stride_b_units": hidden_states.stride(0) // unit,
        "stride_l_units": hidden_states.stride(1) // unit,
        "stride_d": hidden_states.stride(2),
        "GROUPED": group is not None,
        "UNIT": unit,
    }
    tiles = prototype_tiles(unit, hidden_states.element_size())
    prototype_kernel[(P * triton.cdiv(D, tiles["BLOCK_D"]),)](
        visual_ptr=visual,
        index_ptr=index,
        first_ptr=first,
        last_ptr=last,
        **shared,
        **tiles,
    )
    tiles = cosine_tiles(group is not None, unit, target_of(hidden_states))
    cosine_kernel[(B * triton.cdiv(L, tiles["BLOCK_T"]),)](
        completion_ptr=completion,
        begin_ptr=group and group.begin,
        end_ptr=group and group.end,
        focus_ptr=focus,
        **shared,
        **tiles,
    )
    return focus


def _unit(hidden_states: Tensor) -> int:
    """Returns what divides the row strides and D: VECTOR where that is true of contiguous columns, else 1."""
    lengths = (hidden_states.stride(0), hidden_states.stride(1), hidden_states.shape[2])
    whole = hidden_states.stride(2) == 1 and all(length % VECTOR == 0 for length in lengths)
    return VECTOR if whole else 1


def compile_cases() -> list[CompileCase]:
    """Returns both kernels at every dtype, for one prototype a row and several, for aligned and any strides."""
    return [
        case
        for dtype in ("fp32", "bf16", "fp16")
        for grouped in (False, True)
        for unit in (VECTOR, 1)
        for case in _compile_pair(dtype, grouped, unit)
    ]


def _compile_pair(dtype: str, grouped: bool, unit: int) -> list[CompileCase]:
    variant = f"{dtype}{' grouped' if grouped else ''}{'' if unit == VECTOR else ' strided'}"
    shared = {"h_ptr": f"*{dtype}", "mean_ptr": "*fp32", "count_ptr": "*i32"}
    shared |= dict.fromkeys(("L", "D_units", "stride_b_units", "stride_l_units", "stride_d"), "i32")
    flags = {"GROUPED": grouped, "UNIT": unit}
    prototype = {"index_ptr": "*i32", "first_ptr": "*i64", "last_ptr": "*i64"}
    cosine = {"begin_ptr": "*i32", "end_ptr": "*i32"}
    itemsize = 4 if dtype == "fp32" else 2
    return [
        CompileCase(
            f"focus prototype {variant}",
            prototype_kernel,
            shared | {"visual_ptr": "*i1"} | (prototype if grouped else {}),
            flags | ({} if grouped else dict.fromkeys(prototype)),
            tiles=lambda _: prototype_tiles(unit, itemsize),
        ),
        CompileCase(
            f"focus cosine {variant}",
            cosine_kernel,
            shared | {"completion_ptr": "*i1", "focus_ptr": "*fp32"} | (cosine if grouped else {}),
            flags | ({} if grouped else dict.fromkeys(cosine)),
            tiles=lambda target: cosine_tiles(grouped, unit, target),
        ),
    ]
