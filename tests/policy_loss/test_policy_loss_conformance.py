"""The policy loss against the conformance vectors of the code published with VGPO."""

import pytest
import torch

from vgpo_kernels.policy_loss import PolicyLossConfig, policy_loss

TOLERANCE = 2e-6
AVERAGES = {"token": "bnpo", "seq": "grpo"}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("impl", ["reference", "triton", "native"])
def test_official_loss_and_gradient(conformance_vectors, average, impl, device):
    vectors = {name: array.to(device) for name, array in conformance_vectors.arrays.items()}
    meta = conformance_vectors.meta
    config = PolicyLossConfig.official().replace(loss_type=AVERAGES[average])
    assert (config.epsilon_low, config.epsilon_high) == (meta["clip_low"], meta["clip_high"])
    assert config.clip_ratio_dual == meta["clip_dual"]

    def run(beta: float):
        logps = vectors["logps"].clone().requires_grad_()
        output = policy_loss(
            logps,
            vectors["old_logps"],
            vectors["advantages"],
            vectors["response_mask"],
            ref_logps=vectors["ref_logps"],
            token_weights=vectors["token_factor"],
            trajectory_weights=vectors["trajectory_factor"],
            config=config.replace(beta=beta),
            impl=impl,
        )
        output.loss.backward()
        return output.loss.detach(), logps.grad

    def assert_near(actual, name):
        torch.testing.assert_close(actual, vectors[f"{name}_{average}"], rtol=0.0, atol=TOLERANCE)

    loss, gradient = run(meta["kl_coef"])
    assert_near(loss, "loss")
    assert_near(gradient, "grad_logps")
    policy_part, _ = run(0.0)
    assert_near(policy_part, "pg_loss")
    with_whole_kl, _ = run(1.0)
    assert_near(with_whole_kl - policy_part, "kl_loss")
