"""Checks of the arguments: their kinds and shapes from the public function, their values from the operator."""

from torch import Tensor

from vgpo_kernels import _validate
from vgpo_kernels.weights.config import VGPOConfig

SOURCES = ("similarity", "attention")


def check_arguments(
    focus: Tensor,
    completion_mask: Tensor,
    group_ids: Tensor,
    config: VGPOConfig,
    source: str,
    has_visual: Tensor | None,
    step: int | None,
    advantages: Tensor | None,
) -> None:
    """Raises ValueError or TypeError for arguments of a wrong kind; reads no values, for torch.compile."""
    if not isinstance(config, VGPOConfig):
        raise TypeError(f"config: expected a VGPOConfig, got {type(config).__name__}")
    _validate.check_choice("source", source, SOURCES)
    _validate.check_tensor("focus", focus, shape=("B", "T"), dtypes=_validate.FLOATING)
    _validate.check_not_empty("focus", focus)
    rows, device = focus.shape[:1], focus.device
    _validate.check_tensor("completion_mask", completion_mask, shape=focus.shape, dtypes=_validate.MASK, device=device)
    _validate.check_tensor("group_ids", group_ids, shape=rows, dtypes=_validate.INTEGER, device=device)
    if has_visual is not None:
        _validate.check_tensor("has_visual", has_visual, shape=rows, dtypes=_validate.BOOL, device=device)
    if advantages is not None:
        _validate.check_tensor("advantages", advantages, shape=rows, dtypes=_validate.FLOATING, device=device)
    elif config.negative_strength != 1:
        raise ValueError(f"advantages: expected shape (B,) with negative_strength={config.negative_strength}, got None")
    _check_step(step, config)


def _check_step(step: int | None, config: VGPOConfig) -> None:
    if step is None:
        if config.warmup_steps > 0:
            raise ValueError(f"step: expected an int with warmup_steps={config.warmup_steps}, got None")
        return
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step: expected an int, got {type(step).__name__}")
    if step < 0:
        raise ValueError(f"step: expected at least 0, got {step}")


def impl_for(config: VGPOConfig, impl: str | None) -> str | None:
    """Returns `impl`, or "reference" for None and a config without kernels; RuntimeError for kernels that are not."""
    if impl in ("triton", "native") and config.without_kernels is not None:
        raise RuntimeError(
            f"impl={impl!r} has no kernel for {config.without_kernels} (recipe 'official'): "
            "pass impl='reference' or None, which run in plain torch on every device"
        )
    return "reference" if impl is None and config.without_kernels is not None else impl


def check_finite(focus: Tensor, completion_mask: Tensor, has_visual: Tensor) -> None:
    """Raises ValueError, with the first position, for a valid score that is not finite."""
    bad = ~focus.isfinite() & (completion_mask != 0) & has_visual[:, None]
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"focus: expected finite scores at valid positions, got {focus[row, column].item()} "
            f"at row {row}, column {column} ({int(bad.sum())} in all)"
        )
