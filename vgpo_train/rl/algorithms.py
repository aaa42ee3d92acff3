"""Algorithms: what each wants scored, and how scored rollouts become token and trajectory weights.

Adding one is a class with `wants` and `weigh`, registered by name; the trainer knows no other detail.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor

from vgpo_kernels import vgpo_weights
from vgpo_train.config import ConfigError, TrainConfig
from vgpo_train.registry import Registry

SCORES = frozenset({"focus"})  # from both sources; what the scoring pass can give beyond log-probabilities

SEGMENTS = ("image", "query", "generated")  # what attention goes to: pictures, the rest of the prompt, the completion


@dataclass(frozen=True)
class ScoredRollout:
    """A whole rollout, all ranks' rows together, groups side by side, in the same order on every rank.

    Shapes: B rows, T completion tokens. What nothing asked for is None; `attention` also where the policy's attention
    cannot be recorded.
    """

    group_ids: Tensor  # (B,) int64: which prompt a row answers
    completion_mask: Tensor  # (B, T) bool
    advantages: Tensor  # (B,) fp32
    old_logps: Tensor  # (B, T) fp32
    rewards: Tensor  # (B,) fp32
    accuracies: Tensor  # (B,) fp32: the reward that counts as being right
    focus: Tensor | None = None  # (B, T) fp32: the one that focus.source names
    focus_similarity: Tensor | None = None  # (B, T) fp32: cosine to the mean visual state
    attention: Tensor | None = None  # (B, T, 3) fp32: mass on each of SEGMENTS; the first is a focus
    has_visual: Tensor | None = None  # (B,) bool
    entropy: Tensor | None = None  # (B, T) fp32: of the distributions that the tokens were drawn from


@dataclass(frozen=True)
class Weighting:
    """Factors on the advantages; None means 1."""

    token_weights: Tensor | None = None  # (B, T) fp32
    trajectory_weights: Tensor | None = None  # (B,) fp32
    metrics: dict[str, float] = field(default_factory=dict)


class Algorithm(Protocol):
    """What the trainer asks of an algorithm."""

    wants: ClassVar[frozenset[str]]  # among SCORES

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
    """Advantages re-weighted by how much tokens and trajectories look at the image (arXiv 2604.09349)."""

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
