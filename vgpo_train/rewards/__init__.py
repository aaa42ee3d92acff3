"""Rewards: what a completion earns, by name.

A reward is a function of a completion's text and its sample that returns a float; `register` makes it known.
"""

from vgpo_train.rewards.answers import boxed_answer
from vgpo_train.rewards.builtin import exact_match, format_reward, math_verify, multiple_choice, word_match
from vgpo_train.rewards.mixer import RewardMixer, Rewards
from vgpo_train.rewards.registered import _REWARDS, Reward, get_reward, register  # noqa: F401 - tests restore it

__all__ = [
    "Reward",
    "RewardMixer",
    "Rewards",
    "boxed_answer",
    "exact_match",
    "format_reward",
    "get_reward",
    "math_verify",
    "multiple_choice",
    "register",
    "word_match",
]
