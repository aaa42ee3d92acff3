"""The rewards that come with the driver."""

import functools
import logging
import os
import re

from vgpo_train.data import Sample
from vgpo_train.rewards import processes
from vgpo_train.rewards.answers import boxes, final_answer, gold_answer, tidy
from vgpo_train.rewards.equality import same_answer, same_choice
from vgpo_train.rewards.pool import RewardPool
from vgpo_train.rewards.registered import register

logger = logging.getLogger(__name__)

_LIMIT = 5.0  # seconds of one call of math_verify outside of a mixer

_BESIDE_SIGNS = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
_THINK, _END = "<think>", "</think>"


@register("exact_match")
def exact_match(completion: str, sample: Sample) -> float:
    r"""1 if the boxed answer is the sample's, but for case, spaces beside signs, styles, a full stop, \%, \$."""
    answer = final_answer(completion)
    if answer is None:
        return 0.0
    found, wanted = (_BESIDE_SIGNS.sub("", _normal(text)) for text in (answer, gold_answer(sample.answer)))
    return float(found == wanted)


@register("word_match")
def word_match(completion: str, sample: Sample) -> float:
    """Partial credit: the share of words that the boxed answer and the sample's have in the same place."""
    found, wanted = (_normal(text or "").split() for text in (final_answer(completion), gold_answer(sample.answer)))
    same = sum(one == other for one, other in zip(found, wanted, strict=False))
    return same / max(len(found), len(wanted), 1)


@register("multiple_choice")
def multiple_choice(completion: str, sample: Sample) -> float:
    r"""1 if the boxed answer is the sample's letter or letters: A, (A) text, A: text, \text{A} are one, `A dog` not.

    Letters may reach J, and Z if the sample's is beyond J.
    """
    answer = final_answer(completion)
    return float(answer is not None and same_choice(gold_answer(sample.answer), answer))


@register("math_verify")
def math_verify(completion: str, sample: Sample) -> float:
    """1 if the boxed answer means what the sample's does: as mathematics, with its unit, as a choice or in words.

    Called by itself, not by a `RewardMixer`, it runs in a process of its own for 5 seconds at most; then it gives 0.
    """
    if not processes.is_worker():
        (outcome,) = _pool(os.getpid(), _LIMIT).run([completion], [sample])["math_verify"]
        if outcome.error is not None:
            logger.warning("math_verify failed on sample %r and gives 0: %s", sample.id, outcome.error)
        return outcome.value
    answer = final_answer(completion)
    return float(answer is not None and same_answer(gold_answer(sample.answer), answer, sample.problem))


@functools.lru_cache(maxsize=1)
def _pool(_process: int, limit: float) -> RewardPool:
    """Returns the process of calls outside of a mixer; a fork of this process needs another."""
    return RewardPool({"math_verify": math_verify}, timeout=limit, workers=1)


@register("format")
def format_reward(completion: str, _sample: Sample) -> float:
    r"""1 if a completion is `<think>...</think>` and then ends with a box; in linear time."""
    text = completion.lstrip()
    thought, ended, rest = text[len(_THINK) :].partition(_END)
    found = boxes(rest)
    if not (text.startswith(_THINK) and ended and found) or _THINK in thought or _THINK in rest or _END in rest:
        return 0.0
    return float(len("".join(rest[found[-1].end :].split())) <= 2)  # such as a full stop or \]


def _normal(text: str) -> str:
    return (re.sub(r"\\(?=[%$])", "", tidy(text)).strip("$ ") or text.strip()).lower()
