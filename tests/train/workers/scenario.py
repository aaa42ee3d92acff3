"""What both the two processes and the test beside them compute with: a batch, losses, factors on the advantages."""

import torch

from vgpo_kernels import PolicyLossConfig

LEARNING_RATE = 1.0
# The first five rows are those of rank 0; rank 1 has two of text alone, and runs out of micro-batches first.
KINDS, FIRST_RANK = "pdptptt", 5
LENGTHS = [5, 1, 9, 2, 7, 3, 4]
HEAD_ROWS = ([0, 1, 3], [2, 4, 5])  # with and without a picture on both ranks
LOSSES = {  # one for each thing that a loss is divided by over ranks: rows, tokens of a micro-batch, of an update
    "grpo": PolicyLossConfig(loss_type="grpo"),
    "bnpo": PolicyLossConfig(loss_type="bnpo"),
    "dapo": PolicyLossConfig(loss_type="dapo"),
}


def factors(rows: dict[str, torch.Tensor], step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token (B, T) and trajectory weights (B,) that differ for every row, whatever rows stand beside it.

    Args:
        rows: group_ids (B,), completion_mask, old_logps, focus (B, T), has_visual and rewards (B,).
        step: what the algorithm is told.
    """
    lengths = rows["completion_mask"].sum(1)
    token = 1 - 0.01 * rows["old_logps"] + 0.1 * rows["focus"]
    trajectory = 1 + 0.1 * rows["group_ids"] + 0.01 * lengths + 0.2 * rows["has_visual"] + 0.05 * rows["rewards"]
    return token, trajectory + 0.3 * step
