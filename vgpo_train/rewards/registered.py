"""The rewards that are known by name."""

from collections.abc import Callable

from vgpo_train.data import Sample
from vgpo_train.registry import Registry

Reward = Callable[[str, Sample], float]
_REWARDS: Registry[Reward] = Registry("rewards.weights")
register, get_reward = _REWARDS.register, _REWARDS.get
