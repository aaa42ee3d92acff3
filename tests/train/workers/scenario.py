"""The batch that both the two processes and the test beside them compute with."""

from vgpo_kernels import PolicyLossConfig

LEARNING_RATE = 1.0
# The first five rows are those of rank 0; rank 1 has two of text alone, and runs out of micro-batches first.
KINDS, FIRST_RANK = "pdptptt", 5
LENGTHS = [5, 1, 9, 2, 7, 3, 4]
LOSSES = {
    "grpo": PolicyLossConfig(loss_type="grpo"),
    "bnpo": PolicyLossConfig(loss_type="bnpo"),
    "dr_grpo": PolicyLossConfig(loss_type="dr_grpo", max_completion_length=9),
    "dapo": PolicyLossConfig(loss_type="dapo"),
    "cispo": PolicyLossConfig(loss_type="cispo", epsilon_high=5.0),
}
