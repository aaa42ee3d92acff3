"""Which rank holds which rows, and that all of them come back in one order."""

import pytest
import torch

from vgpo_train.rl.groups import Groups
from vgpo_train.run import distributed


def _groups(rank: int) -> Groups:
    # Three prompts of four completions over two ranks: each update's middle group is split between them.
    return Groups(6, 4, 2, rank=rank, world=2, device="cpu")


def test_ranks_share_every_update_equally() -> None:
    first, second = (_groups(rank).own_ids.tolist() for rank in (0, 1))
    assert first == [0, 0, 0, 0, 1, 1, 3, 3, 3, 3, 4, 4]
    assert second == [1, 1, 2, 2, 2, 2, 4, 4, 5, 5, 5, 5]


def test_gathered_rows_stand_group_by_group_and_go_back_to_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [_groups(rank) for rank in (0, 1)]
    own = [torch.stack([groups.own_ids, torch.arange(12) + 100 * rank], 1) for rank, groups in enumerate(ranks)]
    monkeypatch.setattr(distributed, "gather_rows", lambda rows: torch.cat(own) if rows is not None else None)
    for rank, groups in enumerate(ranks):
        whole = groups.gather(own[rank])
        assert torch.equal(whole[:, 0], groups.ids)
        assert whole[4:8, 1].tolist() == [4, 5, 100, 101], "within a group, the rows of the first rank come first"
        assert torch.equal(groups.own(whole), own[rank])
        assert groups.gather(None) is groups.own(None) is None
