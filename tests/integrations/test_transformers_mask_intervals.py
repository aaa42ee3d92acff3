"""Mask functions against the intervals they come to: the map rebuilt from the intervals is transformers' own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as theirs

from vgpo_kernels.integrations.transformers import mask_intervals
from vgpo_kernels.integrations.transformers.mask_intervals import MaskShape

BATCH, LENGTH = 2, 13
PICTURES = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, 1, 1, -1, -1, -1, -1], [-1] * 11 + [0, 0]])
PACKED = torch.tensor([[0] * 4 + [1] * 9, [0] * 12 + [1]])
LEFT = torch.tensor([0, 4])
LEFT_PADDED = torch.arange(LENGTH) >= LEFT[:, None]

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "causal": theirs.causal_mask_function,
    "bidirectional": theirs.bidirectional_mask_function,
    "sliding": theirs.sliding_window_causal_mask_function(3),
    "sliding both ways": theirs.sliding_window_bidirectional_mask_function(2),
    "chunked": theirs.chunked_causal_mask_function(5, LEFT),
    "pictures": theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(PICTURES)),
    "sliding pictures": theirs.and_masks(
        theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(PICTURES)),
        theirs.sliding_window_overlay(4),
    ),
    "packed": theirs.and_masks(theirs.causal_mask_function, theirs.packed_sequence_mask_function(PACKED)),
}


def whole(mask: mask_intervals.KeyIntervals) -> Tensor:
    """Returns (B, Lq, Lk) bool."""
    position = torch.arange(mask.kv_length)
    visible = (position >= mask.key_start[..., None]) & (position < mask.key_end[..., None])
    return visible if mask.usable is None else visible & mask.usable[:, None]


def given(function: Callable[..., Tensor], shape: MaskShape, padding: Tensor | None, use_vmap: bool = False) -> Tensor:
    """Returns transformers' (B, Lq, Lk) bool."""
    return theirs.sdpa_mask(
        *shape, function, attention_mask=padding, allow_is_causal_skip=False, use_vmap=use_vmap, device="cpu"
    )[:, 0]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("padding", [None, LEFT_PADDED, LEFT_PADDED.flip(1)], ids=["full", "left", "right"])
@pytest.mark.parametrize("use_vmap", [False, True], ids=["", "vmap"])
def test_intervals_are_the_mask(function: Callable[..., Tensor], padding: Tensor | None, use_vmap: bool) -> None:
    shape = MaskShape(BATCH, LENGTH, LENGTH)
    mask = mask_intervals.evaluate(function, shape, name="", attention_mask=padding, use_vmap=use_vmap)
    assert torch.equal(whole(mask), given(function, shape, padding, use_vmap))
    assert mask.usable is None  # padding at the edges ends intervals
    assert mask.key_start.dtype == mask.key_end.dtype == torch.int32


# One query a block, blocks that do not divide the length, a single one.
@pytest.mark.parametrize("rows", [1, 4, LENGTH - 1, LENGTH, 1000])
def test_blocks_of_queries_leave_no_edge(rows: int) -> None:
    seen = []

    def function(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = FUNCTIONS["sliding pictures"](batch, head, query, key)
        seen.append(visible.numel())
        return visible

    shape = MaskShape(BATCH, LENGTH, LENGTH)
    limit = rows * BATCH * LENGTH
    mask = mask_intervals.evaluate(function, shape, name="", block_elements=limit)
    assert torch.equal(whole(mask), given(FUNCTIONS["sliding pictures"], shape, None))
    assert max(seen) <= limit
    assert len(seen) == -(-LENGTH // rows)


# Decoding one token, several tokens, and a sliding cache that dropped its first keys.
@pytest.mark.parametrize(
    "shape", [MaskShape(BATCH, 1, 13, 12), MaskShape(BATCH, 4, 13, 9), MaskShape(BATCH, 2, 6, 11, 7)]
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_offsets_of_caches(shape: MaskShape, as_tensor: bool) -> None:
    if as_tensor:
        shape = shape._replace(q_offset=torch.tensor(shape.q_offset))
    for function in (FUNCTIONS["causal"], FUNCTIONS["sliding"]):
        mask = mask_intervals.evaluate(function, shape, name="", attention_mask=LEFT_PADDED)
        assert torch.equal(whole(mask), given(function, shape, LEFT_PADDED))
        assert mask.kv_offset == shape.kv_offset


def test_room_that_a_static_cache_has_left_is_not_seen() -> None:
    shape = MaskShape(BATCH, 3, 20, 0)
    mask = mask_intervals.evaluate(
        FUNCTIONS["causal"], shape, name="", attention_mask=torch.ones(BATCH, 3, dtype=torch.bool)
    )
    assert mask.key_end.tolist() == [[1, 2, 3]] * BATCH
    assert not mask.causal  # the last query does not stand at the last key


def test_keys_masked_in_the_middle_become_holes() -> None:
    padding = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    padding[0, 3:5] = False
    padding[1, 7] = False
    padding[1, :2] = False
    shape = MaskShape(BATCH, LENGTH, LENGTH)
    for function in FUNCTIONS.values():
        mask = mask_intervals.evaluate(function, shape, name="", attention_mask=padding)
        assert mask.usable is not None
        assert torch.equal(whole(mask), given(function, shape, padding))


def test_plain_causal_mask_is_told_apart() -> None:
    shape = MaskShape(BATCH, 5, LENGTH, LENGTH - 5)
    assert mask_intervals.evaluate(FUNCTIONS["causal"], shape, name="").options() == {"causal": True}
    assert not mask_intervals.evaluate(FUNCTIONS["causal"], shape, name="", attention_mask=LEFT_PADDED).causal
    assert not mask_intervals.evaluate(FUNCTIONS["sliding"], shape, name="").causal
    hole = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    hole[:, 4] = False
    assert not mask_intervals.evaluate(FUNCTIONS["causal"], shape, name="", attention_mask=hole).causal


def test_what_is_no_interval_raises_and_names_the_model() -> None:
    def every_other(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((query - key) % 2 == 0)

    with pytest.raises(
        ValueError, match=r"MyConfig is no interval.* query 2 of row 0 sees 2 of the 3 keys from 0 to 2"
    ):
        mask_intervals.evaluate(every_other, MaskShape(BATCH, LENGTH, LENGTH), name="MyConfig")


@pytest.mark.parametrize("holes", [False, True])
def test_encoded_mask_needs_nothing_but_its_numbers(holes: bool) -> None:
    padding = LEFT_PADDED.clone()
    padding[0, 10] = not holes
    shape = MaskShape(BATCH, 4, 11, 9, 2)
    mask = mask_intervals.evaluate(FUNCTIONS["sliding"], shape, name="", attention_mask=padding)
    mask.layers = (1, 27)
    packed = mask_intervals.encode(mask)
    assert mask_intervals.is_encoded(packed)
    assert mask_intervals.decode(packed) is mask
    read = mask_intervals.decode(packed.clone())
    assert read is not mask
    assert torch.equal(whole(read), whole(mask))
    assert (read.layers, read.kv_offset, read.kv_length, read.causal) == ((1, 27), 2, 11, False)
    assert (read.usable is None) == (not holes)
    assert torch.equal(read.dense()[:, 0], whole(mask))


def test_encoded_mask_that_a_model_cut() -> None:
    packed = mask_intervals.encode(
        mask_intervals.evaluate(FUNCTIONS["causal"], MaskShape(BATCH, LENGTH, LENGTH), name="")
    )
    with pytest.raises(
        ValueError, match=r"attention_mask: expected all 32 numbers of .*, got 13: the model cuts its masks"
    ):
        mask_intervals.decode(packed[:, :, :, :LENGTH])


def test_no_mask_of_transformers_is_taken_for_an_encoded_one() -> None:
    for mask in (None, torch.ones(1, 1, 1, 9, dtype=torch.bool), torch.zeros(1, 1, 1, 9), torch.ones(1, 9).int()):
        assert not mask_intervals.is_encoded(mask)


def test_masks_made_whole_by_others() -> None:
    dense = given(FUNCTIONS["pictures"], MaskShape(BATCH, LENGTH, LENGTH), LEFT_PADDED)[:, None]
    additive = torch.where(dense, 0.0, torch.finfo(torch.float32).min)
    for mask in (dense, additive, additive.half().clamp(min=-65504), dense.expand(-1, 4, -1, -1)):
        assert torch.equal(whole(mask_intervals.from_dense(mask, BATCH, "", block_elements=50)), dense[:, 0])
    one_row = mask_intervals.from_dense(dense[:1], BATCH, "")
    assert torch.equal(whole(one_row), dense[:1, 0].expand(BATCH, -1, -1))


def test_masks_made_whole_by_others_that_hold_more() -> None:
    dense = given(FUNCTIONS["causal"], MaskShape(BATCH, LENGTH, LENGTH), None)[:, None]
    by_head = dense.repeat(1, 2, 1, 1)
    by_head[:, 1, 5, 5] = False
    with pytest.raises(ValueError, match="MyAttention: expected one mask for all heads, got one for each of 2"):
        mask_intervals.from_dense(by_head, BATCH, "MyAttention")
    with pytest.raises(ValueError, match="MyAttention: expected a mask of 0 and the smallest number, got a bias"):
        mask_intervals.from_dense(torch.where(dense, -0.5, -torch.inf), BATCH, "MyAttention")
    with pytest.raises(ValueError, match=r"MyAttention: expected a mask \(B, 1, Lq, Lk\) for a batch of 3"):
        mask_intervals.from_dense(dense, 3, "MyAttention")


def test_missing_mask_means_what_it_means_to_sdpa() -> None:
    device = torch.device("cpu")
    causal = mask_intervals.without_mask(MaskShape(1, 3, 3), causal=True, device=device)
    assert causal.key_end.tolist() == [[1, 2, 3]]
    assert causal.causal
    # A static cache being filled: sdpa aligns its causal mask with the first key.
    filling = mask_intervals.without_mask(MaskShape(1, 3, 8), causal=True, device=device)
    assert filling.key_end.tolist() == [[1, 2, 3]]
    assert not filling.causal
    decoding = mask_intervals.without_mask(MaskShape(1, 1, 8), causal=True, device=device)
    assert decoding.key_end.tolist() == [[8]]
    both_ways = mask_intervals.without_mask(MaskShape(1, 3, 3), causal=False, device=device)
    assert both_ways.key_end.tolist() == [[3, 3, 3]]


def test_last_queries_of_a_mask() -> None:
    mask = mask_intervals.evaluate(FUNCTIONS["sliding"], MaskShape(BATCH, LENGTH, LENGTH), name="")
    assert torch.equal(whole(mask.last_queries(2)), whole(mask)[:, -2:])
