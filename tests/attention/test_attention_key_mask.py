"""What a mask comes to: the kernel against torch's code, and how many launches a call takes."""

import pytest
import torch
from dense_attention import inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import vgpo_kernels as vgpo
from vgpo_kernels.attention import intervals as masks
from vgpo_kernels.attention.intervals import MaskRule

pytest.importorskip("triton")

from vgpo_kernels.attention.triton import make_mask
from vgpo_kernels.attention.triton.query_blocks import find_query_blocks

B, LENGTHS = 2, (37, 50)
Lq, Lk = LENGTHS


def shown(*, left: tuple[int, int], right: tuple[int, int], holes: tuple[int, ...] = ()) -> Tensor:
    position = torch.arange(Lk)
    mask = (position >= torch.tensor(left)[:, None]) & (position < Lk - torch.tensor(right)[:, None])
    mask[:, list(holes)] = False
    return mask


PADDED = shown(left=(9, 0), right=(0, 4), holes=(12, 13, 30))
NOTHING_SEEN = shown(left=(50, 0), right=(0, 50))
START, END = (torch.randint(-9, 70, (B, Lq + 9), generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
CACHES = torch.tensor([37, 49])
RULES = {
    "causal": {"causal": True},
    "everything": {},
    "window": {"causal": True, "window": 5},
    "window on both sides": {"window": 5},
    "a window beyond int32": {"causal": True, "window": 2**40},
    "left padding": {"causal": True, "key_mask": shown(left=(3, 19), right=(0, 0))},
    "right padding": {"key_mask": shown(left=(0, 0), right=(2, 25)).long()},
    "holes": {"causal": True, "window": 20, "key_mask": PADDED},
    "nothing seen": {"causal": True, "key_mask": NOTHING_SEEN},
    "packed": {"causal": True, "cu_seqlens": torch.tensor([0, 7, 7, 20, 37]), "first_query": 0},
    "packed, with a start and an end": {"cu_seqlens": torch.tensor([3, 7, 30]).int(), "first_query": 0, "window": 4},
    "cache": {"causal": True, "cache_lengths": CACHES, "key_mask": PADDED, "window": 6},
    "intervals": {"key_start": START[:, :Lq].long(), "key_end": (END[:, :Lq] * 2**30)},
    "intervals, part of them": {"key_start": START[:, 4 : Lq + 4], "key_end": END[:, 9:].int(), "key_mask": PADDED},
    "intervals, cache": {"key_start": START[:, :Lq].int(), "key_end": END[:, :Lq], "cache_lengths": CACHES.int()},
}


def rule_of(name: str, device: str) -> MaskRule:
    given = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in RULES[name].items()}
    return MaskRule(**({"lengths": LENGTHS, "first_query": Lk - Lq} | given))


@pytest.mark.parametrize("name", RULES)
def test_the_kernel_makes_what_torch_makes(name: str, device: str) -> None:
    rule = rule_of(name, device)
    bounds = [x.clamp(0, Lk).int() for x in masks.build(rule, B, torch.device(device))]
    ids = torch.randint(-3, 9, (B, Lk), device=device)
    visual = torch.rand(B, Lk, device=device) < 0.5
    for segments, keys, expected in (
        (True, ids, masks.segments(ids, rule.key_mask).clamp(min=-1).int()),
        (True, ids.to(torch.int8).mT.contiguous().mT, masks.segments(ids, rule.key_mask).clamp(min=-1).int()),
        (False, visual, masks.key_kinds(visual, rule.key_mask)),
        (False, visual.double(), masks.key_kinds(visual, rule.key_mask)),
    ):
        made, *found = make_mask(rule, keys, segments)
        assert made.dtype == expected.dtype
        assert torch.equal(made, expected)
        for one, other in zip(found, bounds, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", RULES)
def test_blocks_of_queries_are_found_with_the_same_intervals(name: str, device: str) -> None:
    rule = rule_of(name, device)
    bounds = [x.clamp(0, Lk).int() for x in masks.build(rule, B, torch.device(device))]
    o_q = torch.arange(Lq, device=device)
    for keys in (torch.rand(B, Lk, device=device) < 0.4, torch.randint(-1, Lk, (B, 21), device=device)):
        found = find_query_blocks(keys, rule, 16, 16)
        assert torch.equal(found.key_start, bounds[0])
        assert torch.equal(found.key_end, bounds[1])
        wanted = masks.positions(keys, rule.key_mask, Lk)
        for row in range(B):
            positions = found.positions[row]
            if found.slots is None:
                assert torch.equal(positions, wanted[row].int())
            else:
                known = wanted[row][wanted[row] >= 0].int()
                assert torch.equal(positions[: len(known)], known)
                assert (positions[len(known) :] == -1).all()
                slots = torch.full((Lk,), -1, dtype=torch.int32, device=device)
                slots[known.long()] = torch.arange(len(known), dtype=torch.int32, device=device)
                assert torch.equal(found.slots[row], slots)
            n_lists = -(-len(positions) // 16)
            for block, some in enumerate(positions.split(16)):
                some = some[some >= 0][:, None]
                sees = (bounds[0][row] <= some) & (some < bounds[1][row])  # [positions, Lq]
                n_cut, n_full = found.counts[row * n_lists + block].tolist()
                cut, full = found.entries[row * n_lists + block]
                visited = torch.cat([cut[:n_cut], full[:n_full]])
                assert len(visited.unique()) == len(visited)
                # Every query that sees a position is in a block that is visited; blocks taken whole are seen whole.
                assert set((o_q[sees.any(0)] // 16).tolist()) <= set(visited.tolist())
                for whole in full[:n_full].tolist():
                    assert sees[:, whole * 16 : whole * 16 + 16].all()
                    assert whole * 16 + 16 <= Lq


def test_the_operator_is_well_formed(device: str) -> None:
    keys, bounds = torch.ones(B, Lk, dtype=torch.int64, device=device), torch.tensor([0, 9, 37], device=device)
    arguments = (keys, True, PADDED.to(device), bounds, None, None, None, Lq, 0, True, 5)
    torch.library.opcheck(torch.ops.vgpo.attention_prologue.default, arguments)


def test_one_graph_serves_every_length_and_the_kernel_is_in_it(device: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def calls(q: Tensor, k: Tensor, ids: Tensor, key_mask: Tensor, lengths: Tensor) -> list[Tensor]:
        options = {"key_mask": key_mask, "window": 7, "impl": "triton"}
        decoded = vgpo.visual_attention_decode(q[:, :, -1:], k, k, ids, lengths, **options)
        lse = vgpo.visual_attention(q, k, k, ids, **options).lse
        mass = vgpo.attention_mass(q, k, lse, ids, 2, query_range=(1, q.shape[2]), **options)
        return [*decoded, lse, mass, vgpo.attention_column_sum(q, k, lse, ids == 1, reduction="mean", **options)]

    compiled = torch.compile(calls, fullgraph=True, dynamic=True, backend=counter)
    for Lk in (40, 50):
        q, k, _ = (x.to(device) for x in inputs(B, (4, 2), (Lk - 10, Lk), 16))
        ids = torch.arange(Lk, device=device).expand(B, -1) % 2
        arguments = (q, k, ids, PADDED[:, :Lk].to(device).contiguous(), torch.tensor([Lk, 20], device=device))
        torch.testing.assert_close(compiled(*arguments), calls(*arguments))
    assert counter.frame_count == 1
    assert sum(str(node.target).startswith("vgpo.attention_prologue") for node in counter.graphs[0].graph.nodes) == 3


def test_values_are_checked_when_debugging(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.to(device) for x in inputs(1, (2, 2), (4, 4), 16))
    monkeypatch.setenv("VGPO_DEBUG", "1")
    bounds = torch.zeros(1, 4, dtype=torch.int64, device=device), torch.full((1, 4), 2**32 + 1, device=device)
    with pytest.raises(ValueError, match="intervals: expected key_end of at most 4, got 4294967297"):
        vgpo.visual_attention(q, k, v, torch.ones(1, 4, device=device), intervals=bounds, impl="triton")
    ids = torch.full((1, 4), 2**32, device=device)
    with pytest.raises(ValueError, match="segment_ids: expected -1 or less than num_segments = 2, got 4294967296"):
        vgpo.attention_mass(q, k, torch.zeros(1, 2, 4, device=device), ids, 2, impl="triton")
