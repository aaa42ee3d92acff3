"""Rewards: what a completion earns, by name.

A reward is a function of a completion's text and its sample that returns a float; `register` makes it known.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import math_verify as math_verify_library
import torch
from torch import Tensor

from vgpo_train.data import Sample
from vgpo_train.registry import Registry

logger = logging.getLogger(__name__)

Reward = Callable[[str, Sample], float]
_REWARDS: Registry[Reward] = Registry("rewards.weights")
register, get_reward = _REWARDS.register, _REWARDS.get
_SHOWN = 120  # characters of a completion in an error message
_FORMAT = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*\\boxed\{.*\}\s*\S{0,2}\s*", re.DOTALL)
_STYLE = re.compile(r"\\(?:text|math|bold)[a-z]*|[{}$]")
_CHOICE = re.compile(r"\(?\s*([A-Z])\s*(?:\)(?:[.:\s].*)?|[.:].*)?", re.DOTALL | re.IGNORECASE)


class Rewards(NamedTuple):
    """What B completions earned, on the CPU."""

    total: Tensor  # (B,) fp32, the weighted sum
    accuracy: Tensor  # (B,) fp32, the reward that counts as being right
    named: dict[str, Tensor]  # (B,) fp32 of each reward, before its weight
    failures: int  # rewards that raised; each counts as 0


class RewardMixer:
    """Weighs several rewards into one.

    Args:
        weights: weight of each reward, by name; one of weight 0 is reported but does not count.
        accuracy: the reward that counts as being right.
    """

    def __init__(self, weights: Mapping[str, float], *, accuracy: str) -> None:
        self._weights = dict(weights)
        self._accuracy = accuracy
        self._rewards = {name: get_reward(name) for name in {**self._weights, accuracy: 0.0}}
        self._reported: set[tuple[str, str]] = set()

    def __call__(self, completions: Sequence[str], samples: Sequence[Sample]) -> Rewards:
        """Rewards each completion; a reward that raises counts as 0, is logged once a sample and counted."""
        failures = 0
        named = {}
        for name, reward in self._rewards.items():
            values = []
            for completion, sample in zip(completions, samples, strict=True):
                try:
                    values.append(_checked(reward(completion, sample)))
                except Exception as error:  # a user's function may raise anything; the run goes on
                    self._report(name, completion, sample, error)
                    failures += 1
                    values.append(0.0)
            named[name] = torch.tensor(values, dtype=torch.float32)
        total = sum((weight * named[name] for name, weight in self._weights.items()), torch.zeros(len(samples)))
        return Rewards(total, named[self._accuracy], named, failures)

    def _report(self, name: str, completion: str, sample: Sample, error: Exception) -> None:
        if (name, sample.id) in self._reported:
            return
        self._reported.add((name, sample.id))
        logger.error(
            "reward %r failed on sample %r and counts as 0: %s: %s; the completion begins %r",
            name,
            sample.id,
            type(error).__name__,
            error,
            completion[:_SHOWN],
        )


def _checked(value: float) -> float:
    number = float(value)
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"expected a finite number, got {value!r}")
    return number


def boxed_answer(completion: str) -> str | None:
    r"""Returns what the last `\boxed{...}` of a completion holds, braces balanced; None without one."""
    start = completion.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for position in range(begin, len(completion)):
        depth += {"{": 1, "}": -1}.get(completion[position], 0)
        if depth == 0:
            return completion[begin:position].strip()
    return None


@register("exact_match")
def exact_match(completion: str, sample: Sample) -> float:
    """1 where the boxed answer is the sample's, but for case and white space."""
    answer = boxed_answer(completion)
    return float(answer is not None and _normal(answer) == _normal(sample.answer))


@register("word_match")
def word_match(completion: str, sample: Sample) -> float:
    """Partial credit: the share of words that the boxed answer and the sample's have in the same place."""
    found, wanted = (_normal(text or "").split() for text in (boxed_answer(completion), sample.answer))
    same = sum(one == other for one, other in zip(found, wanted, strict=False))
    return same / max(len(found), len(wanted), 1)


@register("multiple_choice")
def multiple_choice(completion: str, sample: Sample) -> float:
    r"""1 where the boxed answer is the letter of the sample's: A, (A) text, A: text, \text{A} are one, `A dog` not."""
    answer = boxed_answer(completion)
    return float(answer is not None and _letter(answer) == _letter(sample.answer) is not None)


@register("math_verify")
def math_verify(completion: str, sample: Sample) -> float:
    """1 where the boxed answer equals the sample's as mathematics (math-verify: LaTeX, fractions, sets, units).

    Raises outside the main thread: the time limit is a signal, and without one a single completion can hang a run.
    """
    answer = boxed_answer(completion)
    if answer is None:
        return 0.0
    gold = boxed_answer(sample.answer) or sample.answer
    parsed = [math_verify_library.parse(f"\\boxed{{{text}}}") for text in (gold, answer)]
    return float(math_verify_library.verify(*parsed))


@register("format")
def format_reward(completion: str, _sample: Sample) -> float:
    r"""1 where a completion is `<think>...</think>` and then ends with `\boxed{...}`."""
    return float(_FORMAT.fullmatch(completion) is not None)


def _normal(text: str) -> str:
    return " ".join(text.strip().strip("$").lower().split())


def _letter(text: str) -> str | None:
    match = _CHOICE.fullmatch(_STYLE.sub("", text).strip())
    return match.group(1).upper() if match else None
