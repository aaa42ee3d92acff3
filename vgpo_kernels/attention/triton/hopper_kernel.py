"""The Gluon kernel of `hopper_forward`: one warp group copies keys and values, two take turns with products."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from vgpo_kernels.attention.triton.key_blocks import (
    HOLE_BLOCK,
    MIXED_BLOCK,
    VISUAL_BLOCK,
    cut_steps,
    cut_tile,
    row_intervals,
    tile_ranges,
)

# Queries of a warp group of consumers; a program has two.
ROWS = gl.constexpr(64)
# Rows of values that the producer copies together where keys are hidden: those of a swizzled tile of shared memory.
COPIED_ROWS = gl.constexpr(8)
_LARGEST = gl.constexpr(2147483647)
# Blocks of keys looked at together for holes, one a thread.
_HOLES = gl.constexpr(128)
NUMBERS = ("Hq", "group", "Lq", "Lk", "stride_vb_units", "stride_vh_units", "stride_vl_units")

# Triton 3.7 and newer call it by another name and keep the old one as an error.
_copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _tile(step, tiles, BLOCK_N: gl.constexpr):
    """Where the tile of a step begins, and whether it is a cut one; these come first."""
    begin, whole_begin, whole_end, cuts, _ = tiles
    cut = step < cuts
    first = gl.where(cut, cut_tile(step, begin, whole_begin, whole_end, BLOCK_N), whole_begin + (step - cuts) * BLOCK_N)
    return first, cut


@gluon.jit
def _key_tiles(p_start, p_end, p_kind, first_query, Lq, BLOCK_N: gl.constexpr):
    """Tiles of keys that the queries of a program see, as `_tile` takes them; at least one."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_m = first_query + gl.arange(0, 2 * ROWS, LAYOUT)
    b_start, b_end = row_intervals(p_start, p_end, o_m, Lq)
    m_seen = b_start < b_end
    begin, whole_begin, whole_end, end = tile_ranges(
        gl.min(gl.where(m_seen, b_start, _LARGEST), axis=0),
        gl.max(gl.where(m_seen, b_end, 0), axis=0),
        gl.max(gl.where(m_seen, b_start, 0), axis=0),
        gl.min(gl.where(m_seen, b_end, _LARGEST), axis=0),
        BLOCK_N,
        BLOCK_N,
    )
    b_holes = gl.full([_HOLES], 0, gl.int32, LAYOUT)
    for block in range(whole_begin // BLOCK_N, whole_end // BLOCK_N, _HOLES):
        o_b = block + gl.arange(0, _HOLES, LAYOUT)
        b_kind = gl.load(p_kind + o_b, mask=o_b < whole_end // BLOCK_N, other=0)
        b_holes = gl.maximum(b_holes, (b_kind == HOLE_BLOCK).to(gl.int32))
    whole_end = gl.where(gl.max(b_holes, axis=0) != 0, whole_begin, whole_end)
    cuts = cut_steps(begin, whole_begin, whole_end, end, BLOCK_N)
    # Without a cut tile the first is taken for one; without a key too, which makes sums of 0.
    whole_begin = gl.where(cuts == 0, gl.minimum(whole_begin + BLOCK_N, whole_end), whole_begin)
    cuts = gl.maximum(cuts, 1)
    return begin, whole_begin, whole_end, cuts, cuts + (whole_end - whole_begin) // BLOCK_N


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    v_desc,
    places,
    shared,
    tiles,
    p_v,
    p_weight,
    stride_vl,
    Lk,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copies the queries, then keys and values of each tile into slots that both consumers have left."""
    row, head, kv_head, first_query = places
    q_shared, k_shared, v_shared, q_full, full, empty, _ = shared
    D: gl.constexpr = q_shared.shape[2]
    KEYS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    mbarrier.expect(q_full, 2 * ROWS * D * 2)
    for group in gl.static_range(2):
        b_q = q_shared.index(group).reshape([1, 1, ROWS, D])
        _copy_tile(q_desc, [row, head, first_query + group * ROWS, 0], q_full, b_q)
    for step in range(tiles[4]):
        first, cut = _tile(step, tiles, BLOCK_N)
        slot = step % STAGES
        parity = (step // STAGES & 1) ^ 1
        mbarrier.wait(empty.index(slot), parity)
        mbarrier.expect(full.index(slot), BLOCK_N * D * 2)
        _copy_tile(k_desc, [row, kv_head, first, 0], full.index(slot), k_shared.index(slot).reshape([1, 1, BLOCK_N, D]))
        hidden = 0
        if cut:
            o_n = first + gl.arange(0, BLOCK_N, KEYS)
            hidden = gl.max(((gl.load(p_weight + o_n) < 0) & (o_n < Lk)).to(gl.int32), axis=0)
        v_full = full.index(STAGES + slot)
        mbarrier.wait(empty.index(STAGES + slot), parity)
        if hidden != 0:
            # Values that no query sees may be NaN, which a probability of 0 does not take away.
            o_d = gl.arange(0, D, gl.SliceLayout(0, COPY))
            for part in gl.static_range(BLOCK_N // COPIED_ROWS):
                o_n = first + part * COPIED_ROWS + gl.arange(0, COPIED_ROWS, gl.SliceLayout(1, COPY))
                m_n = gl.load(p_weight + o_n) >= 0
                p_tile = p_v + o_n.to(gl.int64)[:, None] * stride_vl + o_d[None, :]
                b_v = gl.load(p_tile, mask=m_n[:, None], other=0.0)
                v_shared.index(slot).slice(part * COPIED_ROWS, COPIED_ROWS, 0).store(b_v)
            hopper.fence_async_shared()
            mbarrier.arrive(v_full, count=1)
        else:
            mbarrier.expect(v_full, BLOCK_N * D * 2)
            _copy_tile(v_desc, [row, kv_head, first, 0], v_full, v_shared.index(slot).reshape([1, 1, BLOCK_N, D]))


@gluon.jit
def _softmax(b_s, b_max, b_sum, inner):
    """Probabilities of a tile, the running maximum and sum, the tile's sum, and what rescales earlier sums."""
    b_larger = gl.maximum(b_max, gl.max(b_s, axis=1) * inner)  # [BM]
    # Queries without a finite score yet subtract 0: two infinities would make NaN.
    b_shift = gl.where(b_larger == -float("inf"), 0.0, b_larger)
    b_p = gl.exp2(b_s * inner - b_shift[:, None])  # [BM, BN]
    b_rescale = gl.exp2(b_max - b_shift)  # [BM]
    b_part = gl.sum(b_p, axis=1)  # [BM]
    return b_p, b_larger, b_sum * b_rescale + b_part, b_part, b_rescale


@gluon.jit
def _whole_mass(b_p, b_part, p_weight, p_kind, first):
    """Mass [BM] of a whole tile: its sum if all keys are visual, 0 if none is, else key by key."""
    BLOCK_N: gl.constexpr = b_p.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    kind = gl.load(p_kind + first // BLOCK_N)
    if kind == MIXED_BLOCK:
        b_weight = gl.load(p_weight + first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT)))
        b_mass = gl.sum(b_p * b_weight[None, :], axis=1)
    else:
        b_mass = gl.where(kind == VISUAL_BLOCK, b_part, 0.0)
    return b_mass


@gluon.jit
def _add_values(b_acc, b_rescale, b_left, v_shared, full, step, IS_ASYNC: gl.constexpr):
    """The output so far, rescaled, with the products of a step's probabilities and values on top."""
    STAGES: gl.constexpr = v_shared.shape[0]
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, v_shared.shape[2], 16])
    slot = step % STAGES
    mbarrier.wait(full.index(STAGES + slot), step // STAGES & 1)
    b_acc = b_acc * gl.convert_layout(b_rescale, gl.SliceLayout(1, OUTPUT))[:, None]
    return hopper.warpgroup_mma(b_left, v_shared.index(slot), b_acc, is_async=IS_ASYNC)


@gluon.jit
def _consume(
    GROUP: gl.constexpr, outputs, shared, tiles, masks, inner, first_query, row_head, Lq, BLOCK_N: gl.constexpr
):
    """Attends with half of a program's queries: the products of a tile's scores and those of the values before it."""
    out_ptr, mass_ptr, lse_ptr = outputs
    p_start, p_end, p_weight, p_kind = masks
    q_shared, k_shared, v_shared, q_full, full, empty, turns = shared
    begin, whole_begin, whole_end, cuts, steps = tiles
    WITH_MASS: gl.constexpr = mass_ptr is not None
    D: gl.constexpr = q_shared.shape[2]
    dtype: gl.constexpr = q_shared.dtype
    STAGES: gl.constexpr = k_shared.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUTPUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    o_m = first_query + GROUP * ROWS + gl.arange(0, ROWS, SCORE_ROWS)
    b_start, b_end = row_intervals(p_start, p_end, o_m, Lq)
    b_zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    b_acc = gl.zeros([ROWS, D], gl.float32, OUTPUT)
    b_left = gl.zeros([ROWS, BLOCK_N], dtype, LEFT)
    b_max = gl.full([ROWS], -float("inf"), gl.float32, SCORE_ROWS)
    b_sum = gl.full([ROWS], 0.0, gl.float32, SCORE_ROWS)
    b_mass = b_sum
    b_rescale = b_sum
    b_q = q_shared.index(GROUP)
    mbarrier.wait(q_full, 0)
    # Cut tiles, and the first where none is: few, so their products are waited for, which leaves registers for masks.
    for step in range(0, cuts):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        b_s = hopper.warpgroup_mma(b_q, k_shared.index(slot).permute([1, 0]), b_zero, use_acc=False)  # [BM, BN]
        mbarrier.arrive(empty.index(slot), count=1)
        if step > 0:
            b_acc = _add_values(b_acc, b_rescale, b_left, v_shared, full, step - 1, False)
            mbarrier.arrive(empty.index(STAGES + (step - 1) % STAGES), count=1)
        first = cut_tile(step, begin, whole_begin, whole_end, BLOCK_N)
        o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))  # [BN]
        b_weight = gl.load(p_weight + first + o_n)  # [BN]
        m_inside = ((b_start - first)[:, None] <= o_n[None, :]) & (o_n[None, :] < (b_end - first)[:, None])
        b_s = gl.where(m_inside & (b_weight >= 0)[None, :], b_s, -float("inf"))
        b_p, b_max, b_sum, b_part, b_rescale = _softmax(b_s, b_max, b_sum, inner)
        if WITH_MASS:
            b_mass = b_mass * b_rescale + gl.sum(b_p * b_weight[None, :], axis=1)
        b_left = gl.convert_layout(b_p.to(dtype), LEFT)
    for step in range(cuts, steps):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), step // STAGES & 1)
        # While the products of one group run, the other has its softmax.
        mbarrier.wait(turns.index(GROUP), (step - cuts) & 1)
        b_s = hopper.warpgroup_mma(b_q, k_shared.index(slot).permute([1, 0]), b_zero, use_acc=False, is_async=True)
        b_acc = _add_values(b_acc, b_rescale, b_left, v_shared, full, step - 1, True)
        mbarrier.arrive(turns.index(1 - GROUP), count=1)
        b_s = hopper.warpgroup_mma_wait(1, deps=[b_s])
        mbarrier.arrive(empty.index(slot), count=1)
        b_p, b_max, b_sum, b_part, b_rescale = _softmax(b_s, b_max, b_sum, inner)
        b_acc = hopper.warpgroup_mma_wait(0, deps=[b_acc])
        mbarrier.arrive(empty.index(STAGES + (step - 1) % STAGES), count=1)
        if WITH_MASS:  # here, where the products before no longer hold registers
            first = whole_begin + (step - cuts) * BLOCK_N
            b_mass = b_mass * b_rescale + _whole_mass(b_p, b_part, p_weight, p_kind, first)
        b_left = gl.convert_layout(b_p.to(dtype), LEFT)
    b_acc = _add_values(b_acc, b_rescale, b_left, v_shared, full, steps - 1, False)

    # The sum is tested, not the maximum, which ignores NaN: NaN that a query sees must reach the output.
    m_seen = (b_start < b_end) & (b_sum != 0.0)
    b_inverse = 1.0 / gl.where(m_seen, b_sum, 1.0)
    b_lse = (b_max + gl.log2(gl.where(m_seen, b_sum, 1.0))) * 0.6931471805599453
    o_row = row_head.to(gl.int64) * Lq
    gl.store(lse_ptr + o_row + o_m, gl.where(m_seen, b_lse, -float("inf")), mask=o_m < Lq)
    if WITH_MASS:
        gl.store(mass_ptr + o_row + o_m, gl.where(m_seen, b_mass * b_inverse, 0.0), mask=o_m < Lq)
    # Rows of 0 are selected: their products may be NaN.
    b_inverse = gl.convert_layout(gl.where(m_seen, b_inverse, 0.0), OUTPUT_ROWS)[:, None]
    b_out = gl.where(b_inverse == 0.0, 0.0, b_acc * b_inverse).to(out_ptr.dtype.element_ty)
    o_m = first_query + GROUP * ROWS + gl.arange(0, ROWS, OUTPUT_ROWS)
    o_d = gl.arange(0, D, gl.SliceLayout(0, OUTPUT))
    gl.store(out_ptr + (o_row + o_m)[:, None] * D + o_d[None, :], b_out, mask=(o_m < Lq)[:, None])


@gluon.jit(do_not_specialize=[*NUMBERS, "inner"])
def hopper_forward_kernel(
    q_desc,  # (B, Hq, Lq, D) in boxes of (1, 1, ROWS, D)
    k_desc,  # (B, Hkv, Lk, D) in boxes of (1, 1, BLOCK_N, D), as are the values
    v_desc,
    v_ptr,
    weight_ptr,  # (B, blocks * BLOCK_N) fp32
    kind_ptr,  # (B, blocks) int8
    start_ptr,  # (B, Lq) int32
    end_ptr,  # (B, Lq) int32
    out_ptr,  # (B, Hq, Lq, D) contiguous
    mass_ptr,  # (B, Hq, Lq) fp32 contiguous, or None
    lse_ptr,  # (B, Hq, Lq) fp32 contiguous
    Hq,
    group,
    Lq,
    Lk,
    stride_vb_units,
    stride_vh_units,
    stride_vl_units,
    inner,
    UNIT: gl.constexpr,
    HEAD: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """A program owns two blocks of queries of one head and walks the keys that any of them sees."""
    n_blocks = gl.cdiv(Lq, 2 * ROWS)
    # The last queries first: under a causal mask they see the most keys.
    first_query = (n_blocks - 1 - gl.program_id(0) % n_blocks) * (2 * ROWS)
    row_head = gl.program_id(0) // n_blocks
    row = row_head // Hq
    head = row_head % Hq
    kv_head = head // group
    key_blocks = gl.cdiv(Lk, BLOCK_N)
    p_start = start_ptr + row.to(gl.int64) * Lq
    p_end = end_ptr + row.to(gl.int64) * Lq
    p_kind = kind_ptr + row.to(gl.int64) * key_blocks
    p_weight = weight_ptr + row.to(gl.int64) * key_blocks * BLOCK_N
    p_v = v_ptr + (row.to(gl.int64) * stride_vb_units + kv_head.to(gl.int64) * stride_vh_units) * UNIT
    stride_vl = stride_vl_units.to(gl.int64) * UNIT
    tiles = _key_tiles(p_start, p_end, p_kind, first_query, Lq, BLOCK_N)

    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    q_shared = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD], TILE)
    k_shared = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD], TILE)
    v_shared = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD], TILE)
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    # Slots of keys, then slots of values.
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(q_full, count=1)
    for slot in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    for group_index in gl.static_range(2):
        mbarrier.init(turns.index(group_index), count=1)
    mbarrier.arrive(turns.index(0), count=1)

    shared = (q_shared, k_shared, v_shared, q_full, full, empty, turns)
    places = (row, head, kv_head, first_query)
    outputs = (out_ptr, mass_ptr, lse_ptr)
    masks = (p_start, p_end, p_weight, p_kind)
    gl.warp_specialize(
        [
            (_consume, (0, outputs, shared, tiles, masks, inner, first_query, row_head, Lq, BLOCK_N)),
            (_consume, (1, outputs, shared, tiles, masks, inner, first_query, row_head, Lq, BLOCK_N)),
            (_produce, (q_desc, k_desc, v_desc, places, shared, tiles, p_v, p_weight, stride_vl, Lk, BLOCK_N, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
