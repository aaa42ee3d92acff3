"""Log-probabilities, entropy, KL and the policy loss from logits (..., V) or hidden states and a head's weight (V, D).

Public: what `__all__` names. `hidden_*` starts at hidden states, `logits_*` at logits.
Log-probabilities are float32, made of float32 logits (`matmul.py`); near 0 they are right to the rounding of 1 + rest
(`triton/row_passes.py`, `reference.py`).
"""

from vgpo_kernels.vocabulary.hidden_api import linear_logprobs, linear_policy_loss, linear_visual_dependency
from vgpo_kernels.vocabulary.logits_api import logits_policy_loss, selective_logprobs
from vgpo_kernels.vocabulary.results import LinearLogprobs

__all__ = [
    "LinearLogprobs",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_visual_dependency",
    "logits_policy_loss",
    "selective_logprobs",
]
