"""The public function: checks its arguments and calls the operator."""

from torch import Tensor

from vgpo_kernels.focus import ops
from vgpo_kernels.focus.checks import check_arguments


def visual_focus_score(
    hidden_states: Tensor,
    visual_mask: Tensor,
    completion_mask: Tensor,
    *,
    image_ids: Tensor | None = None,
    seq_ids: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Scores how much each completion token looks at the image, from the last hidden states.

    The prototype mu is the mean state of the visual tokens, and token t scores cos(h_t, mu), with h_t the
    state at token t itself. A zero state or a zero prototype scores 0. Sums are made in fp32 (in float64
    for float64 states).

    The scores are constants of the update: the states are detached and no gradient flows through.

    States that are neither visual nor in the completion are never read, so padding may hold anything.
    A NaN in a state that is read becomes a NaN score.

    Args:
        hidden_states: (B, L, D), last-layer states after the final norm, of any strides; float16, bfloat16
            or float32, and float64 on the reference.
        visual_mask: (B, L), which tokens are visual; bool, or numbers 0 and 1.
        completion_mask: (B, L), which tokens were generated; bool, or numbers 0 and 1. No token is both
            visual and generated.
        image_ids: (B, L) integers, the image each visual token belongs to, any numbers from 0 (-1 = none).
            With it there is one prototype an image, and a token scores its largest cosine. Read at visual
            tokens only.
        seq_ids: (B, L) integers for packed rows, usually (1, L): the sequence each token belongs to, any
            numbers from 0, or -1 for padding. Tokens are compared only with prototypes of their own
            sequence.
        impl: "triton", "native" or "reference"; None chooses by device.

    Returns:
        (B, L) float32 (float64 for float64 states) cosines in [-1, 1], and 0 outside the completion and
        in sequences without a visual token.

    Raises:
        TypeError: an argument is no tensor, or of a dtype not listed above.
        ValueError: shapes or devices differ; on CPUs, on the reference and under VGPO_DEBUG=1 also: a mask holds
            anything but 0 and 1, a completion overlaps visual tokens, a visual token has no image, or a
            visual or completion token lies in padding.
        RuntimeError: `impl` cannot run on these tensors.

    Example:
        >>> import torch
        >>> states = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0]]])
        >>> visual = torch.tensor([[True, False, False, False]])
        >>> completion = torch.tensor([[False, False, True, True]])
        >>> visual_focus_score(states, visual, completion)
        tensor([[ 0.0000,  0.0000,  0.7071, -1.0000]])

    Source: VGPO (arXiv 2604.09349), the similarity between a generated token and the visual tokens.
    """
    check_arguments(hidden_states, visual_mask, completion_mask, image_ids, seq_ids)
    return ops.visual_focus_score(
        hidden_states.detach(), visual_mask.detach(), completion_mask.detach(), image_ids, seq_ids, impl
    )
