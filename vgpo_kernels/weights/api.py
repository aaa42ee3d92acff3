"""The public function: checks its arguments and calls the operator."""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from vgpo_kernels.weights import ops
from vgpo_kernels.weights.checks import check_arguments
from vgpo_kernels.weights.config import VGPOConfig

_OPTIONS = tuple(field.name for field in dataclasses.fields(VGPOConfig))


class VGPOWeights(NamedTuple):
    """What `vgpo_weights` returns; detached, float32 (float64 for float64 scores) but for the gate.

    Args:
        token_weights: (B, T) 1 + psi; 1 at padding.
        trajectory_weights: (B,) 1 + phi.
        normalized: (B, T) compensated scores, min-max over each row; 0 at padding and in constant rows.
        gate: (B, T) bool, whether a token is compensated.
        score: (B,) a trajectory's score within its group.
    """

    token_weights: Tensor
    trajectory_weights: Tensor
    normalized: Tensor
    gate: Tensor
    score: Tensor


def vgpo_weights(
    focus: Tensor,
    completion_mask: Tensor,
    group_ids: Tensor,
    config: VGPOConfig,
    *,
    source: str = "similarity",
    has_visual: Tensor | None = None,
    step: int | None = None,
    advantages: Tensor | None = None,
    impl: str | None = None,
) -> VGPOWeights:
    """Weighs tokens and trajectories by how much they look at the image.

    The weighted advantage is `advantages[:, None] * w.token_weights * w.trajectory_weights[:, None]`.
    Rows of a group belong in one call, whatever their order; only `official` depends on the order of
    the rows and on the rest of the micro-batch. Masked tokens are skipped wherever they are: positions
    count valid tokens.

    Args:
        focus: (B, T) floating; cosines, or attention mass in [0, 1]. Never read where it is masked, nor
            in rows without a visual token.
        completion_mask: (B, T) bool, or numbers 0 and 1; which tokens were generated.
        group_ids: (B,) integers; which prompt a row answers. Any labels in any order.
        config: the recipe.
        source: "similarity" for cosines, "attention" for attention mass.
        has_visual: (B,) bool, whether a row has a visual token, as `visual_mask.any(1)` says. None: the rows whose
            focus is not 0 at every valid token, since both sources give exactly 0 without a visual token. Pass it
            if a row with an image can have such a focus, as by attention in a layer whose window ends behind it.
        step: optimisation step from 0, needed when `config.warmup_steps` is above 0: the factors have
            the strength min(1, step / warmup_steps).
        advantages: (B,) floating, needed when `config.negative_strength` is not 1.
        impl: "triton", "native" or "reference"; None chooses by device. The recipe `official` (any config whose
            `without_kernels` is not None) has the reference only, which None chooses for it on every device.

    Returns:
        VGPOWeights. A row with one valid token, or with the same focus at every token, has token weights 1.
        A row without a valid or without a visual token has both weights 1 and stays out of its group's
        statistics. A group whose scores are equal has trajectory weights 1. `official` treats all rows
        alike: see `VGPOConfig.corners`.

    Raises:
        ValueError: a wrong shape or device, an empty batch, an unknown source, a missing `step` or
            `advantages`; on CPUs, on the reference and under VGPO_DEBUG=1 also a mask with values other than 0 and 1,
            a score that is NaN or infinite, and a NaN among the advantages if `config.negative_strength` is
            not 1. Unchecked, the kernels take any mask value but 0 as valid and a NaN advantage as not
            negative; a row with a bad score has NaN factors and stays out of all statistics.
        TypeError: a wrong type or dtype.
        RuntimeError: `impl` cannot run here, or has no kernel for the config.

    Example:
        >>> import torch
        >>> focus, mask = torch.tensor([[0.0, 0.4, 0.2], [0.1, 0.1, 0.9]]), torch.ones(2, 3)
        >>> w = vgpo_weights(focus, mask, torch.tensor([7, 7]), VGPOConfig.paper(compensation=False))
        >>> w.token_weights
        tensor([[0.5000, 1.5000, 1.0000],
                [0.6667, 0.6667, 1.6667]])
        >>> w.trajectory_weights
        tensor([0.5000, 1.5000])

    The formulas are those of VGPO (arXiv 2604.09349), written out in `docs/algorithm.md`.
    """
    check_arguments(focus, completion_mask, group_ids, config, source, has_visual, step, advantages)
    options = {name: getattr(config, name) for name in _OPTIONS}
    return VGPOWeights(
        *ops.weights(
            focus.detach(),
            completion_mask.detach(),
            group_ids,
            has_visual,
            advantages.detach() if advantages is not None and config.negative_strength != 1 else None,
            source=source,
            step=step if config.warmup_steps > 0 else None,
            impl=impl,
            **options,
        )
    )
