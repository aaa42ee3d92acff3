"""The official recipe against what the published code returned for the same inputs."""

import pytest
import torch

from vgpo_kernels import VGPOConfig, vgpo_weights, visual_focus_score

# What the published code's own order of float32 operations leaves open.
TOLERANCE = 2e-6
SCHEDULES = {"linear": "linear", "exponential": "exponential", "step-function": "step"}


def config_of(options):
    return VGPOConfig.official(
        beta=options["visual_compensation_strength"],
        gamma=1 - options["gated_visual_compensation_start_ratio"],
        kappa=options["visual_attention_threshold"],
        schedule=SCHEDULES[options["visual_compensation_type"]],
        exponent=options["visual_compensation_exponent"],
        step_position=options["visual_compensation_step_ratio"],
        compensation=options["use_visual_compensation"],
        gate=options["use_gated_visual_compensation"],
        intra=options["use_intra_trajectory_reweighting"],
        inter=options["use_inter_trajectory_reweighting"],
    )


@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
def test_official_reproduces_the_vectors(conformance_vectors, impl, device):
    v, meta = conformance_vectors, conformance_vectors.meta
    visual = (v["input_ids"] == meta["image_token_id"]).to(device)
    mask = v["response_mask"].to(device)
    completion = torch.cat([mask.new_zeros(len(mask), meta["prompt_length"]), mask], dim=1)
    focus = visual_focus_score(v["hidden_states"].to(device), visual, completion.bool(), impl=impl)
    focus = focus[:, meta["prompt_length"] :]
    w = vgpo_weights(
        focus,
        mask,
        torch.arange(len(mask), device=device) // meta["group_size"],
        config_of(meta["cfg"]),
        has_visual=visual.any(1),
    )
    weighted = v["advantages"].to(device) * w.token_weights * w.trajectory_weights[:, None]
    found = {
        "focus_score": (focus - focus.min()) / (focus.max() - focus.min()),
        "mean_similarity": focus[visual.any(1)].mean(),
        "normalized_weights": w.normalized,
        "token_factor": w.token_weights,
        "trajectory_factor": w.trajectory_weights,
        "weighted_advantages": weighted,
    }
    for name, value in found.items():
        torch.testing.assert_close(
            value.cpu(), v[name], rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )
