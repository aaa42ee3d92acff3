"""Adds up the gradients of many equal micro-batches in bfloat16."""

import torch

from vgpo_train.config import TrainConfig
from vgpo_train.model.engine import build_policy

MICRO_BATCHES = (1, 64)  # a sum of 64 equal gradients in bfloat16 is 0.2% short


def gradient_norms(config: TrainConfig) -> dict[int, float]:
    """Returns the norm of the mean gradient over so many equal micro-batches, of a policy that learns nothing."""
    config.optim.lr, config.optim.max_grad_norm = 1e-12, 0.0
    engine = build_policy(config, 10)
    head = engine.module.get_output_embeddings()
    engine.module.forward = lambda states: head(states)  # one layer of the policy takes the time of one
    states = torch.linspace(-1, 1, 128, dtype=torch.bfloat16).expand(3, 128)
    norms = {}
    for count in MICRO_BATCHES:
        for number in range(count):
            engine.set_gradient_accumulation_boundary(number == count - 1)
            engine.backward(engine(states).float().logsumexp(-1).mean() / count)
        engine.step()
        norms[count] = float(engine.get_global_grad_norm())
    return norms
