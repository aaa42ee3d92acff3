"""The formulas of `docs/algorithm.md` in float64, a row and a group at a time, sharing nothing with the package."""

import math
from fractions import Fraction

import numpy as np


def rho_of(cosines, config, source, low, high):
    if source == "attention":
        return cosines
    if config.focus_scale == "affine":
        return (cosines + 1) / 2
    return (cosines - low) / (high - low) if high > low else np.zeros_like(cosines)


def schedule(p, config):
    if config.schedule == "linear":
        return p
    if config.schedule == "exponential":
        return p**config.exponent
    return 1.0 if p >= config.step_position else 0.0


def floored(count, share, config):
    """floor(count * share), with the share as the decimal that is meant or as the float64 next to it."""
    return math.floor(count * (share if config.tail_rounding == "exact" else float(share)))


def gate_of(scores, config):
    n = len(scores)
    if not config.compensation:
        return np.zeros(n, dtype=bool)
    if not config.gate:
        return np.ones(n, dtype=bool)
    gamma, kappa = Fraction(repr(config.gamma)), Fraction(repr(config.kappa))
    first = floored(n, 1 - gamma, config) + 1
    tail = scores[first - 1 :]
    if len(tail) == 0:
        return np.zeros(n, dtype=bool)
    threshold = sorted(tail, reverse=True)[max(1, floored(len(tail), kappa, config)) - 1]
    return np.array([t >= first and scores[t - 1] >= threshold for t in range(1, n + 1)])


def minmax(x):
    return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else np.zeros_like(x)


def project(x, low, high):
    """Solves mean(clip(x + shift, low, high)) = 1 exactly: the mean is linear between its kinks."""
    kinks = np.sort(np.concatenate([low - x, high - x]))
    means = np.array([np.clip(x + kink, low, high).mean() for kink in kinks])
    after = int(np.searchsorted(means, 1.0))
    if after == 0:
        shift = kinks[0]
    else:
        rise = means[after] - means[after - 1]
        shift = kinks[after - 1] + (1.0 - means[after - 1]) / rise * (kinks[after] - kinks[after - 1])
    return np.clip(x + shift, low, high)


def factors(normalized, clamp, preserve_mean):
    x = 1 + normalized - normalized.mean()
    if clamp is None or (preserve_mean and x.min() >= clamp[0] and x.max() <= clamp[1]):
        return x
    return project(x, *clamp) if preserve_mean else np.clip(x, *clamp)


def weights(focus, mask, group_ids, config, source="similarity", has_visual=None, advantages=None, warmup=1.0):
    """Returns token weights, trajectory weights, normalized, gate, score as float64 (bool) arrays."""
    focus, mask = np.asarray(focus, dtype=np.float64), np.asarray(mask) != 0
    batch, length = focus.shape
    sees = np.ones(batch, dtype=bool) if has_visual is None else np.asarray(has_visual)
    neutral = config.corners == "neutral"
    cosines = np.where(mask & sees[:, None], focus, 0.0)
    low, high = cosines.min(), cosines.max()

    token, normalized = np.ones((batch, length)), np.zeros((batch, length))
    gate, score, in_group = np.zeros((batch, length), dtype=bool), np.zeros(batch), np.ones(batch, dtype=bool)
    strength = np.full(batch, warmup)
    for i in range(batch):
        if advantages is not None and advantages[i] < 0:
            strength[i] *= config.negative_strength
        n = int(mask[i].sum())
        if neutral and (n == 0 or not sees[i]):
            in_group[i] = False
            continue
        if n == 0:
            continue
        row = cosines[i][mask[i]]
        opened = gate_of(row, config)
        if config.position == "one_based":
            positions = [t / n for t in range(1, n + 1)]
        else:
            positions = [t / max(n - 1, 1) for t in range(n)]
        lift = np.array([config.beta * schedule(p, config) for p in positions])
        w = rho_of(row, config, source, low, high) * (1 + opened * lift)
        x = minmax(w)
        if neutral and row.max() == row.min():
            x = np.zeros_like(x)
        gate[i][mask[i]], normalized[i][mask[i]] = opened, x
        if config.intra:
            token[i][mask[i]] = 1 + strength[i] * (factors(x, config.token_clamp, config.preserve_mean) - 1)
        scored = x if config.trajectory_score.startswith("normalized") else w
        score[i] = scored.mean() if config.trajectory_score.endswith("mean") else math.fsum(scored)

    trajectory = np.ones(batch)
    if config.inter:
        for members in groups(np.asarray(group_ids), in_group, config):
            x = minmax(score[members])
            factor = factors(x, config.trajectory_clamp, config.preserve_mean)
            trajectory[members] = 1 + strength[members] * (factor - 1)
    return token, trajectory, normalized, gate, score


def groups(group_ids, in_group, config):
    """The row numbers of each group."""
    if config.grouping == "ids":
        found = [np.flatnonzero((group_ids == label) & in_group) for label in np.unique(group_ids)]
    else:
        cuts = np.flatnonzero(np.diff(group_ids) != 0) + 1
        found = [run[in_group[run]] for run in np.split(np.arange(len(group_ids)), cuts)]
    return [members for members in found if len(members)]
