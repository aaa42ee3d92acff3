"""Weighs several rewards into one."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_train.data import Sample
from vgpo_train.rewards.pool import RewardPool
from vgpo_train.rewards.registered import get_reward

logger = logging.getLogger(__name__)

_SHOWN = 120  # characters of a completion in an error message
_TOTAL = "weighted total"


class Rewards(NamedTuple):
    """What B completions earned, on the CPU."""

    total: Tensor  # (B,) fp32, the weighted sum
    accuracy: Tensor  # (B,) fp32, the reward that counts as being right
    named: dict[str, Tensor]  # (B,) fp32 of each reward, before its weight
    failures: int  # rewards that raised, took too long, ended their process or are not finite; each counts as 0


class RewardMixer:
    """Weighs several rewards into one; each of them runs in other processes (`RewardPool`).

    Args:
        weights: weight of each reward, by name; one of weight 0 is reported but does not count.
        accuracy: the reward that counts as being right.
        timeout: seconds that one reward may take for one completion.
        workers: number of processes; None takes this rank's share of the cores, at most 8.

    Raises:
        ConfigError: a reward that is not registered.
        ValueError: a time limit that is no positive number.
    """

    def __init__(
        self, weights: Mapping[str, float], *, accuracy: str, timeout: float = 5.0, workers: int | None = None
    ) -> None:
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout: expected a positive number of seconds, got {timeout!r}")
        self._weights = dict(weights)
        self._accuracy = accuracy
        rewards = {name: get_reward(name) for name in {**self._weights, accuracy: 0.0}}
        self._pool = RewardPool(rewards, timeout=timeout, workers=workers)
        self._reported: set[tuple[str, str]] = set()

    def __call__(self, completions: Sequence[str], samples: Sequence[Sample]) -> Rewards:
        """Rewards each completion; a reward that fails counts as 0, is logged once a sample and counted."""
        if len(completions) != len(samples):
            raise ValueError(f"expected a sample a completion, got {len(completions)} and {len(samples)}")
        failures = 0
        named = {}
        for name, outcomes in self._pool.run(completions, samples).items():
            for completion, sample, outcome in zip(completions, samples, outcomes, strict=True):
                if outcome.error is not None:
                    self._report(name, completion, sample, outcome.error)
                    failures += 1
            named[name] = torch.tensor([outcome.value for outcome in outcomes], dtype=torch.float32)
        total = sum(
            (weight * named[name].double() for name, weight in self._weights.items()), torch.zeros(len(samples))
        )
        total = total.float()
        for row in (~total.isfinite()).nonzero().flatten().tolist():
            self._report(_TOTAL, completions[row], samples[row], "ValueError: it is not finite in float32")
            failures += 1
            total[row] = 0.0
        return Rewards(total, named[self._accuracy], named, failures)

    def close(self) -> None:
        """Ends the processes that run rewards."""
        self._pool.close()

    def _report(self, name: str, completion: str, sample: Sample, error: str) -> None:
        if (name, sample.id) in self._reported:
            return
        self._reported.add((name, sample.id))
        logger.error(
            "reward %r failed on sample %r and counts as 0: %s; the completion begins %r",
            name,
            sample.id,
            error,
            completion[:_SHOWN],
        )
