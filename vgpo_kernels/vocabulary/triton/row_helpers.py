"""How a program walks a row of logits: whole vectors of 16 bytes wherever the row begins, and its two edges.

Scores are u = x, or tanh(x / softcap); scaled logits are z = u * score_scale. Lanes [R] each take a vector of a tile.
"""

from torch import Tensor

from vgpo_kernels._triton import tanh, tl, triton
from vgpo_kernels._tuning import Tiles

VECTOR = 16  # bytes
# Rows longer than this many bytes are walked by as many threads as there may be.
LONG_ROW = 32768


@triton.jit
def whole_vectors(p_row, vocabulary, VEC: tl.constexpr):
    """How many elements lie before the row's first whole vector, and how many whole vectors it has."""
    ITEM: tl.constexpr = p_row.dtype.element_ty.primitive_bitwidth // 8
    before = ((-p_row.to(tl.int64)) & (VEC * ITEM - 1)).to(tl.int32) // ITEM
    head = tl.minimum(before, vocabulary)
    return head, (vocabulary - head) // VEC


@triton.jit
def first_vector(p_row, head, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the row's first whole vector, of which the compiler learns that vectors begin there if `ALIGNED`."""
    ITEM: tl.constexpr = p_row.dtype.element_ty.primitive_bitwidth // 8
    if ALIGNED:
        return tl.multiple_of(p_row + head, VEC * ITEM)
    return p_row + head


@triton.jit
def edges(head, n_vectors, vocabulary, R: tl.constexpr, VEC: tl.constexpr):
    """Columns [R] of the elements outside of whole vectors, and which of them there are."""
    o_r = tl.arange(0, R)
    o_v = tl.where(o_r < VEC, o_r, head + (n_vectors - 1) * VEC + o_r)
    return o_v, tl.where(o_r < VEC, o_r < head, (o_r < 2 * VEC) & (o_v < vocabulary))


@triton.jit
def tile_columns(tile, R: tl.constexpr, VEC: tl.constexpr):
    """Columns [R, VEC] of a tile, counted from the first whole vector."""
    return (tile * R + tl.arange(0, R))[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def tile_vectors(tile, n_vectors, R: tl.constexpr):
    """Which vectors [R] of a tile lie in the row; the tile itself may lie before or after it."""
    o_r = tile * R + tl.arange(0, R)
    return (o_r >= 0) & (o_r < n_vectors)


@triton.jit
def load_words(p_vectors, tile, n_vectors, POLICY: tl.constexpr, R: tl.constexpr):
    """Words of four bytes [R, 4] of a tile of vectors, anything where there is none."""
    p_words = p_vectors.to(tl.pointer_type(tl.int32)) + (tile * R + tl.arange(0, R))[:, None] * 4 + tl.arange(0, 4)
    return tl.load(p_words, mask=tile_vectors(tile, n_vectors, R)[:, None], eviction_policy=POLICY)


@triton.jit
def unpacked(b_words, DTYPE: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr):
    """Elements in fp32 [R, VEC] of words [R, 4], in which halves are carried from tile to tile two a register."""
    BF16: tl.constexpr = DTYPE.is_bf16()
    if VEC == 4:
        b_x = b_words.to(tl.float32, bitcast=True)
    else:
        if BF16:
            b_low = (b_words << 16).to(tl.float32, bitcast=True)
            b_high = (b_words & -65536).to(tl.float32, bitcast=True)
        else:
            b_low = b_words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            b_high = (b_words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        b_x = tl.reshape(tl.join(b_low, b_high), [R, VEC])
    return b_x


@triton.jit
def scores(b_x, inverse_cap, SOFTCAP: tl.constexpr):
    """Scores of fp32 logits."""
    return tanh(b_x * inverse_cap) if SOFTCAP else b_x


@triton.jit
def finite(b_max):
    """What is subtracted in place of a maximum: of nothing but -inf it is 0."""
    return tl.where(b_max == -float("inf"), 0.0, b_max)


@triton.jit
def bounded(b_log2):
    """Logarithms whose exp2 is the same 0 as before, but 0 * log2(0) is 0 and not NaN."""
    return tl.maximum(b_log2, -200.0)


def softcap_scales(temperature: float, softcap: float | None) -> dict[str, float | bool]:
    """Returns the kernels' arguments `score_scale`, `inverse_cap` and `SOFTCAP`."""
    if softcap is None:
        return {"score_scale": 1.0 / temperature, "inverse_cap": 1.0, "SOFTCAP": False}
    return {"score_scale": softcap / temperature, "inverse_cap": 1.0 / softcap, "SOFTCAP": True}


def vectors_match(x: Tensor, other: Tensor) -> bool:
    """Whether vectors begin at the same columns of each row of both, so that both are walked in whole vectors."""
    width = VECTOR // x.element_size()
    places = [
        [t.data_ptr() // t.element_size(), *(t.stride(d) for d in range(t.dim() - 1) if t.shape[d] > 1)]
        for t in (x, other)
    ]
    return all((a - b) % width == 0 for a, b in zip(*places, strict=True))


def row_tiles(threads: int, vectors: int, target: str) -> Tiles:
    """Returns tiles of `vectors` vectors a thread."""
    return {"R": threads * vectors, "num_warps": threads // (64 if target == "gfx942" else 32)}


def row_candidates(*threads_and_vectors: tuple[int, int]) -> dict[str, tuple[Tiles, ...]]:
    targets = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
    return {target: tuple(row_tiles(*counts, target) for counts in threads_and_vectors) for target in targets}


def row_threads(vocabulary: int, itemsize: int, softcap: bool) -> int:
    """Returns the threads a row: 1024 for a long one, so that few rows share the L2 cache.

    With a soft-cap half as many: on sm_80, tanh takes more than the 64 registers that 1024 threads have each.
    """
    return (512 if softcap else 1024) if vocabulary * itemsize > LONG_ROW else 128
