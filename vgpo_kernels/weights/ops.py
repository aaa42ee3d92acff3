"""The operator `vgpo::weights`; its options are the fields of `VGPOConfig`, one by one."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._dispatch import checks_values, choose
from vgpo_kernels._operator import operator_body
from vgpo_kernels._validate import check_mask_values, forbid
from vgpo_kernels.weights.backend import backend
from vgpo_kernels.weights.checks import check_finite, impl_for
from vgpo_kernels.weights.config import VGPOConfig

_SCHEMA_TYPES: dict[Any, str] = {
    float: "float",
    str: "str",
    bool: "bool",
    int: "int",
    tuple[float, float] | None: "float[]?",
}


def _schema() -> str:
    options = ", ".join(f"{_SCHEMA_TYPES[field.type]} {field.name}" for field in dataclasses.fields(VGPOConfig))
    return (
        "(Tensor focus, Tensor completion_mask, Tensor group_ids, Tensor? has_visual, Tensor? advantages, *, "
        f"str source, SymInt? step, str? impl, {options}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )


def _weights(
    focus: Tensor,
    completion_mask: Tensor,
    group_ids: Tensor,
    has_visual: Tensor | None,
    advantages: Tensor | None,
    *,
    source: str,
    step: int | None,
    impl: str | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    config = VGPOConfig(**options)
    impl = impl_for(config, impl)
    if has_visual is None:
        has_visual = _has_focus(focus, completion_mask)
    name, _ = choose(impl, focus.device, focus.dtype)
    if checks_values(impl, focus):
        check_mask_values("completion_mask", completion_mask)
        if name != "native":
            check_finite(focus, completion_mask, has_visual)
        if advantages is not None:
            forbid(advantages.isnan(), "advantages", "no NaN", advantages)
    warmup = 1.0 if step is None else min(1.0, step / config.warmup_steps)
    results = backend(impl, focus.device, focus.dtype).weights(
        focus, completion_mask, group_ids, has_visual, advantages, config=config, source=source, warmup=warmup
    )
    # The CPU kernels read every score: if one is not finite, the result of its row is not.
    if name == "native" and not results[4].isfinite().all():
        check_finite(focus, completion_mask, has_visual)
    return results


weights = torch.library.custom_op("vgpo::weights", operator_body(_weights), mutates_args=(), schema=_schema())


@weights.register_fake
def _weights_fake(focus: Tensor, *_: Tensor | None, **__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = focus.new_empty(focus.shape, dtype=torch.promote_types(focus.dtype, torch.float32))
    rows = tokens.new_empty(focus.shape[:1])
    gate = tokens.new_empty(focus.shape, dtype=torch.bool)
    return tokens, rows, torch.empty_like(tokens), gate, torch.empty_like(rows)


def _has_focus(focus: Tensor, completion_mask: Tensor) -> Tensor:
    """Returns (B,) bool, whether a row has a focus other than 0: without an image both sources give exactly 0."""
    looks = (focus != 0).logical_and_(completion_mask)
    return looks.view(torch.uint8).amax(1) != 0  # a third of the time of any() on a CPU
