"""Algorithms: token and trajectory weights from a scored rollout.

A new one is a class with `wants` and `weigh`, registered by name; the trainer needs no change.
"""

from typing import ClassVar, Protocol

from vgpo_kernels import vgpo_weights
from vgpo_train.config import ConfigError, TrainConfig
from vgpo_train.registry import Registry
from vgpo_train.rl.types import ScoredRollout, Weighting

SCORES = frozenset({"focus"})  # of both sources: scores beyond log-probabilities, computed on demand


class Algorithm(Protocol):
    """What the trainer needs of an algorithm."""

    wants: ClassVar[frozenset[str]]  # the SCORES that it needs

    def __init__(self, config: TrainConfig) -> None: ...

    def weigh(self, rollout: ScoredRollout, step: int) -> Weighting:
        """Returns the factors on the advantages of a whole rollout."""
        ...


_ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm")
register = _ALGORITHMS.register


def build_algorithm(config: TrainConfig) -> Algorithm:
    """Returns the algorithm that `config.algorithm` names, or raises ConfigError with the nearest name."""
    algorithm = _ALGORITHMS.get(config.algorithm)
    unknown = algorithm.wants - SCORES
    if unknown:
        raise ConfigError(
            f"algorithm {config.algorithm!r}: wants {', '.join(sorted(unknown))}, "
            f"but the scoring pass gives {', '.join(sorted(SCORES))}"
        )
    return algorithm(config)


@register("grpo")
class GRPO:
    """Group-relative advantages as they are."""

    wants: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: TrainConfig) -> None:
        pass

    def weigh(self, rollout: ScoredRollout, step: int) -> Weighting:  # noqa: ARG002
        """Returns no factors."""
        return Weighting()


@register("vgpo")
class VGPO:
    """Advantages re-weighted by the visual focus of tokens and trajectories (arXiv 2604.09349)."""

    wants: ClassVar[frozenset[str]] = frozenset({"focus"})

    def __init__(self, config: TrainConfig) -> None:
        self.source = config.focus.source
        self.config = config.vgpo_config()

    def weigh(self, rollout: ScoredRollout, step: int) -> Weighting:
        """Returns the VGPO factors over the whole groups of the rollout."""
        weights = vgpo_weights(
            rollout.focus,
            rollout.completion_mask,
            rollout.group_ids,
            self.config,
            source=self.source,
            has_visual=rollout.has_visual,
            step=step,
            advantages=rollout.advantages,
        )
        metrics = {"gate_fraction": float(weights.gate[rollout.completion_mask].float().mean())}
        return Weighting(weights.token_weights, weights.trajectory_weights, metrics)
