"""Peers as they are measured: what torch would do quietly is not done."""

import pytest
import torch
from torch import Tensor

from benchmarks.harness.cases import compiled
from benchmarks.peers import attention as peers
from vgpo_kernels import attention_with_lse


def twice(x: Tensor) -> Tensor:
    return x * 2


def test_a_function_is_never_run_uncompiled_in_the_name_of_torch_compile():
    settings = {"recompile_limit": 2, "fail_on_recompile_limit_hit": False}
    with torch._dynamo.config.patch(settings):
        torch._dynamo.reset()
        compiled_twice = compiled.__wrapped__(twice, backend="eager")
        for length in (2, 3):
            compiled_twice(torch.ones(length))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            compiled_twice(torch.ones(4))
        torch._dynamo.reset()  # as the benchmarks do after each case
        assert torch.equal(compiled_twice(torch.ones(4)), torch.full((4,), 2.0))
    torch._dynamo.reset()


def test_two_lses_of_padded_rows_are_those_of_each_row():
    """One row has lost a part of its image to padding, another all of it."""
    torch.manual_seed(0)
    q, k = torch.randn(3, 4, 5, 8), torch.randn(3, 2, 16, 8)
    padding = torch.arange(16) < torch.tensor([0, 2, 7])[:, None]
    _, lse = attention_with_lse(q, k, k, key_mask=~padding)
    sequences = torch.zeros(3, 16, dtype=torch.int32).masked_fill(padding, -1)
    segments = torch.where((torch.arange(16) < 6) & ~padding, 0, -1).int()
    found = peers.two_lse_mass(q, k, lse, [[(0, 6)], [(2, 6)], [(7, 6)]])
    torch.testing.assert_close(found, peers.eager_mass(q, k, sequences, segments, 1))


def test_maps_of_wanted_keys_are_columns_of_the_map():
    """Where keys are wanted that some queries do not see, and not side by side."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8)
    _, lse = attention_with_lse(q, k, k)
    sequences = torch.zeros(2, 9, dtype=torch.int32)
    keys = torch.tensor([0, 1, 0, 0, 0, 1, 0, 1, 1], dtype=torch.bool).expand(2, 9)
    found = peers.map_column_sum(q, k, lse, sequences, keys)
    torch.testing.assert_close(found, peers.eager_column_sum(q, k, sequences, keys))
