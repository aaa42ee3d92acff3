"""Launches the Triton kernels of the weights: tokens first, then each trajectory within its group."""

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, target_of
from vgpo_kernels.weights.config import VGPOConfig
from vgpo_kernels.weights.triton.groups import group_options, group_tiles, weights_group_kernel
from vgpo_kernels.weights.triton.tokens import token_options, token_tiles, weights_token_kernel

__all__ = ["compile_cases", "weights"]


def weights(
    focus: Tensor,
    completion_mask: Tensor,
    group_ids: Tensor,
    has_visual: Tensor,
    advantages: Tensor | None,
    config: VGPOConfig,
    source: str,
    warmup: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns token weights (B, T), trajectory weights (B,), normalized (B, T), gate (B, T), score (B,)."""
    batch, length = focus.shape
    mask = completion_mask.view(torch.uint8) if completion_mask.dtype == torch.bool else completion_mask
    token = torch.empty((batch, length), dtype=torch.float32, device=focus.device)
    normalized, score = torch.empty_like(token), token.new_empty(batch)
    gate = torch.empty_like(token, dtype=torch.bool)
    group_score = torch.empty_like(score, dtype=torch.float64)
    weights_token_kernel[(batch,)](
        focus_ptr=focus,
        mask_ptr=mask,
        visual_ptr=has_visual.view(torch.uint8),
        advantage_ptr=focus if advantages is None else advantages,
        token_ptr=token,
        normalized_ptr=normalized,
        gate_ptr=gate.view(torch.uint8),
        score_ptr=score,
        group_score_ptr=group_score,
        length=length,
        stride_focus_b=focus.stride(0),
        stride_focus_t=focus.stride(1),
        stride_mask_b=mask.stride(0),
        stride_mask_t=mask.stride(1),
        stride_visual=has_visual.stride(0),
        stride_advantage=0 if advantages is None else advantages.stride(0),
        strength=warmup,
        **token_options(config, source, advantages is not None),
        **token_tiles(target_of(focus)),
    )
    if not config.inter:
        return token, torch.ones_like(score), normalized, gate, score
    trajectory = torch.empty_like(score)
    weights_group_kernel[(batch,)](
        group_score_ptr=group_score,
        group_ptr=group_ids,
        advantage_ptr=focus if advantages is None else advantages,
        trajectory_ptr=trajectory,
        batch=batch,
        stride_group=group_ids.stride(0),
        stride_advantage=0 if advantages is None else advantages.stride(0),
        strength=warmup,
        **group_options(config, advantages is not None),
        **group_tiles(target_of(focus)),
    )
    return token, trajectory, normalized, gate, score


_TOKEN_SIGNATURE = {
    **{"focus_ptr": "*fp32", "mask_ptr": "*u8", "visual_ptr": "*u8", "advantage_ptr": "*fp32"},
    **{"token_ptr": "*fp32", "normalized_ptr": "*fp32", "gate_ptr": "*u8", "score_ptr": "*fp32"},
    **{"group_score_ptr": "*fp64", "length": "i32"},
    **{"stride_focus_b": "i32", "stride_focus_t": "i32", "stride_mask_b": "i32", "stride_mask_t": "i32"},
    **{"stride_visual": "i32", "stride_advantage": "i32", "strength": "fp32"},
}
_GROUP_SIGNATURE = {
    **{"group_score_ptr": "*fp64", "group_ptr": "*i64", "advantage_ptr": "*fp32", "trajectory_ptr": "*fp32"},
    **{"batch": "i32", "stride_group": "i32", "stride_advantage": "i32", "strength": "fp32"},
}


def compile_cases() -> list[CompileCase]:
    """Returns the kernels of the recipes that have some, and of the other schedules."""
    configs = {name: VGPOConfig.from_recipe(name) for name in ("paper", "balanced")}
    configs["step"] = VGPOConfig.balanced(schedule="step", warmup_steps=100)
    configs["exponential"] = VGPOConfig.balanced(schedule="exponential", preserve_mean=False, negative_strength=0.5)
    cases = []
    for name, config in configs.items():
        signed = config.negative_strength != 1
        token = token_options(config, "similarity", signed)
        cases += [
            CompileCase(f"weights_token[{name}]", weights_token_kernel, _TOKEN_SIGNATURE, token, tiles=token_tiles),
            CompileCase(
                f"weights_group[{name}]",
                weights_group_kernel,
                _GROUP_SIGNATURE,
                group_options(config, signed),
                tiles=group_tiles,
            ),
        ]
    return cases
