"""What a run will do, and what forbids it, known before a model is loaded."""

import math

from vgpo_train.config import ConfigError, TrainConfig
from vgpo_train.model import layer_count


def total_steps(config: TrainConfig, samples: int) -> int:
    """Returns how many steps the run takes."""
    if config.steps is not None:
        return config.steps
    return max(1, math.floor(config.epochs * samples / config.rollout.prompts))


def check_divisible(config: TrainConfig, world: int) -> None:
    """Raises ConfigError unless every rank gets the same number of rows of every update."""
    rows = config.optim.update_prompts * config.rollout.completions
    if rows % world:
        raise ConfigError(
            f"optim.update_prompts x rollout.completions: expected a multiple of the {world} processes, got {rows}"
        )


def check_layers(config: TrainConfig) -> None:
    """Raises ConfigError unless `focus.layers` are layers of the checkpoint, each given once."""
    layers, count = (
        config.focus.layers,
        layer_count(config.model.path, trust_remote_code=config.model.trust_remote_code),
    )
    if isinstance(layers, str) or count is None:
        return
    for layer in layers:
        if not -count <= layer < count:
            raise ConfigError(f"focus.layers: expected numbers from {-count} to {count - 1}, got {layer}")
    if len({layer % count for layer in layers}) < len(layers):
        raise ConfigError(f"focus.layers: expected each of the {count} layers at most once, got {layers}")
