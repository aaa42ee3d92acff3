"""What the weights depend on besides the scores: one frozen dataclass and its three recipes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from vgpo_kernels._validate import check_choice, check_fields, check_number, unknown

SCHEDULES = ("linear", "exponential", "step")
TRAJECTORY_SCORES = ("sum", "mean", "normalized_sum", "normalized_mean")
FOCUS_SCALES = ("affine", "batch_minmax")
POSITIONS = ("one_based", "zero_based")
TAIL_ROUNDINGS = ("exact", "float64")
GROUPINGS = ("ids", "consecutive")
CORNERS = ("neutral", "published")

# The values that kernels compute; with another one the weights are computed in plain torch.
KERNEL_FIELDS = {"focus_scale": "affine", "position": "one_based", "grouping": "ids", "corners": "neutral"}

_SWITCHES = ("compensation", "gate", "intra", "inter", "preserve_mean")
_CHOICES = {
    "schedule": SCHEDULES,
    "trajectory_score": TRAJECTORY_SCORES,
    "focus_scale": FOCUS_SCALES,
    "position": POSITIONS,
    "tail_rounding": TAIL_ROUNDINGS,
    "grouping": GROUPINGS,
    "corners": CORNERS,
}


@dataclass(frozen=True)
class VGPOConfig:
    """How focus scores become token and trajectory weights; the defaults are the `paper` recipe.

    Args:
        beta: strength of the compensation, at least 0.
        gamma: share of a trajectory's tokens, counted from its end, that the gate may open for.
        kappa: share of that tail that the gate opens for, at least one token; ties are in.
        schedule: how the compensation grows with the position p: "linear" p, "exponential"
            p ** exponent, "step" 1 from step_position on.
        exponent: of the exponential schedule, above 0.
        step_position: where the step schedule begins, in [0, 1].
        compensation: whether later tokens are compensated at all.
        gate: whether only gated tokens are compensated; otherwise every token is.
        intra: whether tokens are weighted within a trajectory; otherwise token weights are 1.
        inter: whether trajectories are weighted within a group; otherwise their weights are 1.
        trajectory_score: a trajectory's score: "sum" or "mean" of the compensated scores w, or
            "normalized_sum" or "normalized_mean" of their min-max over the trajectory.
        token_clamp: (low, high) bounds of the token weights, around 1, or None.
        trajectory_clamp: (low, high) bounds of the trajectory weights, around 1, or None.
        preserve_mean: whether clamped weights are projected back to mean 1 (the nearest such weights
            within the bounds); otherwise they are cut off.
        negative_strength: factors of rows with a negative advantage become 1 + this * (factor - 1).
        warmup_steps: over how many steps the factors grow from 1 to their full size.
        focus_scale: rho from cosines: "affine" (cos + 1) / 2, or "batch_minmax" over the whole micro-batch
            with padding as 0.
        position: p of the t-th of T tokens: "one_based" t / T, or "zero_based" (t - 1) / (T - 1).
        tail_rounding: the tail starts behind floor(T * (1 - gamma)) tokens, and the gate opens for
            floor(tail * kappa): "exact" for decimal gamma and kappa, or "float64" as float64 multiplies.
        grouping: a group is all rows with one id ("ids"), or a run of neighbouring rows with one id
            ("consecutive").
        corners: rows without a visual token, without a valid token or with constant focus: "neutral"
            weighs them 1 and keeps the first two out of their group's statistics; "published" gives rows
            without a visual token the score 0 and treats all rows alike.

    Raises:
        ValueError: a value outside its range, or an unknown choice; the message names the field.
        TypeError: a value of the wrong type.

    Example:
        >>> VGPOConfig.balanced().replace(beta=0.5).beta
        0.5

    The formulas are those of VGPO (arXiv 2604.09349); `docs/algorithm.md` has all three recipes.
    """

    beta: float = 0.3
    gamma: float = 0.5
    kappa: float = 0.2
    schedule: str = "linear"
    exponent: float = 2.0
    step_position: float = 0.5
    compensation: bool = True
    gate: bool = True
    intra: bool = True
    inter: bool = True
    trajectory_score: str = "sum"
    token_clamp: tuple[float, float] | None = None
    trajectory_clamp: tuple[float, float] | None = None
    preserve_mean: bool = False
    negative_strength: float = 1.0
    warmup_steps: int = 0
    focus_scale: str = "affine"
    position: str = "one_based"
    tail_rounding: str = "exact"
    grouping: str = "ids"
    corners: str = "neutral"

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0)
        check_number("gamma", self.gamma, low=0, high=1)
        check_number("kappa", self.kappa, low=0, high=1)
        check_number("exponent", self.exponent, low=0, low_open=True)
        check_number("step_position", self.step_position, low=0, high=1)
        check_number("negative_strength", self.negative_strength, low=0)
        check_number("warmup_steps", self.warmup_steps, low=0)
        if not isinstance(self.warmup_steps, int):
            raise TypeError(f"warmup_steps: expected an int, got {self.warmup_steps!r}")
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("token_clamp", "trajectory_clamp"):
            object.__setattr__(self, name, _checked_clamp(name, getattr(self, name)))

    @classmethod
    def paper(cls, **fields: Any) -> "VGPOConfig":
        """Returns the recipe of the paper's formulas, with `fields` changed."""
        return cls.from_recipe("paper", **fields)

    @classmethod
    def official(cls, **fields: Any) -> "VGPOConfig":
        """Returns the recipe of the published code, with `fields` changed; it runs in plain torch on every device."""
        return cls.from_recipe("official", **fields)

    @classmethod
    def balanced(cls, **fields: Any) -> "VGPOConfig":
        """Returns the recipe with bounded weights of mean 1, whatever the lengths, with `fields` changed."""
        return cls.from_recipe("balanced", **fields)

    @classmethod
    def from_recipe(cls, recipe: str, **fields: Any) -> "VGPOConfig":
        """Returns the recipe named "paper", "official" or "balanced", with `fields` changed.

        Args:
            recipe: the name.
            fields: values to change.

        Returns:
            the config.

        Raises:
            ValueError: an unknown recipe or field; the message names the nearest known one.

        Example:
            >>> VGPOConfig.from_recipe("balanced", kappa=0.1).token_clamp
            (0.1, 2.0)
        """
        if recipe not in RECIPES:
            raise ValueError(unknown("recipe", recipe, RECIPES))
        check_fields(fields, _field_names())
        return cls(**{**RECIPES[recipe], **fields})

    def replace(self, **fields: Any) -> "VGPOConfig":
        """Returns a copy with `fields` changed; ValueError names the nearest known field."""
        check_fields(fields, _field_names())
        return dataclasses.replace(self, **fields)

    @property
    def tail_start(self) -> float:
        """The share s of a trajectory before its tail: the tail starts behind int(T * s) tokens."""
        return self._share(round(1.0 - self.gamma, 12))

    @property
    def gated_share(self) -> float:
        """The share s of a tail of N tokens that the gate opens for: int(N * s) tokens, at least one."""
        return self._share(float(self.kappa))

    @property
    def without_kernels(self) -> str | None:
        """The first field, as "name='value'", that no kernel computes, so that plain torch runs on every device."""
        fields = (
            f"{name}={getattr(self, name)!r}" for name, value in KERNEL_FIELDS.items() if getattr(self, name) != value
        )
        return next(fields, None)

    def _share(self, share: float) -> float:
        # 100 * 0.29 is 28.999999999999996 in float64, and 29 is meant.
        return share * (1.0 + 1e-12) if self.tail_rounding == "exact" else share


RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "official": {
        "trajectory_score": "normalized_sum",
        "token_clamp": (0.1, 2.0),
        "trajectory_clamp": (0.9, 2.0),
        "focus_scale": "batch_minmax",
        "position": "zero_based",
        "tail_rounding": "float64",
        "grouping": "consecutive",
        "corners": "published",
    },
    "balanced": {
        "trajectory_score": "mean",
        "token_clamp": (0.1, 2.0),
        "trajectory_clamp": (0.5, 2.0),
        "preserve_mean": True,
    },
}


def _checked_clamp(name: str, bounds: Any) -> tuple[float, float] | None:
    if bounds is None:
        return None
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"{name}: expected (low, high) or None, got {bounds!r}")
    for bound in bounds:
        check_number(name, bound)
    low, high = float(bounds[0]), float(bounds[1])
    if not low <= 1.0 <= high:
        raise ValueError(f"{name}: expected low <= 1 <= high, got {bounds!r}")
    return low, high


def _field_names() -> list[str]:
    return [field.name for field in dataclasses.fields(VGPOConfig)]
