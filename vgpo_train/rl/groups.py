"""Which rank holds which rows of a step."""

import torch
from torch import Tensor

from vgpo_train.run import distributed


class Groups:
    """The places of a step's rows: every rank holds an equal part of every update.

    A group is the completions of one prompt; its rows may be on two ranks. N rows are those of all ranks.

    Args:
        prompts: prompts of a step, over all ranks.
        completions: of each prompt.
        updates: optimizer steps of a step; N must be a multiple of updates * world.
        rank: this process.
        world: number of processes.
        device: of the rows.

    Attributes:
        ids: (N,) int64, the group of each row, groups side by side.
        own_ids: (N / world,) int64, the group of each of this rank's rows.
    """

    def __init__(
        self, prompts: int, completions: int, updates: int, *, rank: int, world: int, device: torch.device | str
    ) -> None:
        rows = torch.arange(prompts * completions, device=device)
        by_rank = rows.view(updates, world, -1).transpose(0, 1).reshape(world, -1)
        self.ids = rows // completions
        self.own_ids = self.ids[by_rank[rank]]
        self._own_rows = by_rank[rank]
        self._order = by_rank.flatten().argsort()

    def gather(self, own: Tensor | None) -> Tensor | None:
        """Returns the values of all N rows, groups side by side, from each rank's own; a collective, but for None."""
        return None if own is None else distributed.gather_rows(own)[self._order]

    def own(self, values: Tensor | None) -> Tensor | None:
        """Returns this rank's rows of what `gather` returned."""
        return None if values is None else values[self._own_rows]
