"""Rewards, algorithms and rollout engines that only tests need: registered by name, as a user would."""

import zlib
from dataclasses import replace

import torch
from scenario import factors

from vgpo_train import rewards
from vgpo_train.rl import algorithms, rollout
from vgpo_train.rl.algorithms import VGPO, ScoredRollout, Weighting
from vgpo_train.rl.rollout import Completions, completion_mask


@rewards.register("even_length")
def even_length(text, sample) -> float:  # noqa: ARG001
    """Right half of the time, whatever the policy has learnt."""
    return float(len(text) % 2 == 0)


@rewards.register("always_one")
def always_one(text, sample) -> float:  # noqa: ARG001
    """Teaches nothing."""
    return 1.0


@rewards.register("fingerprint")
def fingerprint(text, sample) -> float:  # noqa: ARG001
    """Tells completions apart."""
    return zlib.crc32(text.encode()) / 2**32


@rewards.register("has_picture")
def has_picture(text, sample) -> float:  # noqa: ARG001
    """Tells groups apart."""
    return float(bool(sample.images))


@algorithms.register("every_row_its_own")
class EveryRowItsOwn(VGPO):
    """Gives factors that only one row can have."""

    def weigh(self, rollout: ScoredRollout, step: int) -> Weighting:
        return Weighting(*factors(vars(rollout), step))


@algorithms.register("nan_at_second_step")
class NaNAtSecondStep(VGPO):
    """Gives a token weight of NaN once."""

    def weigh(self, rollout: ScoredRollout, step: int) -> Weighting:
        weighting = super().weigh(rollout, step)
        if step != 1:
            return weighting
        poisoned = weighting.token_weights.clone()
        poisoned[:, 0] = float("nan")
        return replace(weighting, token_weights=poisoned)


@rollout.register("dice")
class Dice:
    """Rolls completions without asking the policy."""

    def __init__(self, config, engine, suppressed, pad_token_id, eos_token_ids) -> None:  # noqa: ARG002
        self.length, self.ends = config.max_new_tokens, eos_token_ids

    def session(self):
        """Needs no preparation."""
        return torch.no_grad()

    def generate(self, prompts, *, temperature: float) -> Completions:  # noqa: ARG002
        """Returns random tokens; a row may end early."""
        ids = torch.randint(100, 200, (prompts["input_ids"].shape[0], self.length))
        ids[::2, self.length // 2] = self.ends[0]
        return Completions(ids, completion_mask(ids, self.ends))
