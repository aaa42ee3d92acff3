"""What a policy loss is made of: one frozen dataclass, checked when it is made."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from vgpo_kernels._validate import check_choice, check_fields, check_number

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
# The fields in an operator's schema.
SETTINGS_SCHEMA = (
    "str loss_type, str importance_sampling_level, float epsilon_low, float epsilon_high, float? delta, "
    "float? clip_ratio_dual, float beta, int? max_completion_length, float? kl_log_ratio_limit, float? kl_limit, "
    "bool kl_importance_weighted"
)
# The largest number of float32, in which the loss is computed: a larger setting would be infinite there.
_LARGEST = 3.4028234663852886e38


@dataclass(frozen=True)
class PolicyLossConfig:
    """Settings of `policy_loss`; the defaults are those of TRL 1.16.

    Args:
        loss_type: how tokens are averaged, and for "cispo" also what is optimised.
            "grpo": mean over rows of each row's token mean; "bnpo": mean over the batch's tokens;
            "dr_grpo": sum over tokens / (B * max_completion_length); "dapo" and "cispo": sum over tokens /
            num_items_in_batch.
        importance_sampling_level: "token", or "sequence" for one ratio a row, exp of its mean log-ratio
            (GSPO).
        epsilon_low: the ratio of a token with a negative advantage is not followed below 1 - epsilon_low.
            "cispo" does not use it.
        epsilon_high: the ratio of a token with a positive advantage is not followed above 1 + epsilon_high.
            For "cispo" it is the largest ratio itself, at least 1.
        delta: largest ratio of any token (TRL's two-sided clip): min(ratio, delta) where the surrogate is not
            clipped already. None: no limit. Not for "cispo".
        clip_ratio_dual: largest ratio of a token with a negative advantage (dual clip). None: no limit.
            Not for "cispo".
        beta: factor of the KL divergence to the reference policy; 0 leaves it out.
        max_completion_length: longest completion in tokens; only "dr_grpo" reads it, and needs it.
        kl_log_ratio_limit: clamps ref_logps - logps to [-limit, limit] before the KL is formed.
        kl_limit: clamps the KL of a token to [-limit, limit].
        kl_importance_weighted: multiplies the KL of a token, after its clamps, by the importance ratio, which is not
            clipped and has its gradient (`use_bias_correction_kl` of TRL, there True by default).

    Raises:
        TypeError: a number is not a number, max_completion_length not an int, or kl_importance_weighted not a bool.
        ValueError: a field is out of range, above the largest number of float32, or does not go with the loss type;
            the message names it.

    Example:
        >>> config = PolicyLossConfig(loss_type="grpo", epsilon_high=0.28)
        >>> config.replace(beta=0.01).beta
        0.01
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    clip_ratio_dual: float | None = None
    beta: float = 0.0
    max_completion_length: int | None = None
    kl_log_ratio_limit: float | None = None
    kl_limit: float | None = None
    kl_importance_weighted: bool = False

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", self.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
        check_number("epsilon_low", self.epsilon_low, low=0.0, high=1.0)
        check_number("epsilon_high", self.epsilon_high, low=0.0, high=_LARGEST)
        check_number("beta", self.beta, low=0.0, high=_LARGEST)
        _check_optional("delta", self.delta, low=1.0)
        _check_optional("clip_ratio_dual", self.clip_ratio_dual, low=1.0)
        _check_optional("kl_log_ratio_limit", self.kl_log_ratio_limit, low=0.0)
        _check_optional("kl_limit", self.kl_limit, low=0.0)
        if not isinstance(self.kl_importance_weighted, bool):
            raise TypeError(f"kl_importance_weighted: expected True or False, got {self.kl_importance_weighted!r}")
        if self.loss_type == "cispo":
            self._check_cispo()
        self._check_max_completion_length()

    @classmethod
    def official(cls, **fields: Any) -> "PolicyLossConfig":
        """Returns the settings of the code published with VGPO (arXiv 2604.09349), with `fields` changed.

        Clip 0.2 / 0.28, dual clip 3, clamps inside the KL, mean over the batch's tokens; no KL unless `beta`
        is set. Its mean of row means is `official(loss_type="grpo")`.
        """
        return cls(
            loss_type="bnpo",
            epsilon_low=0.2,
            epsilon_high=0.28,
            clip_ratio_dual=3.0,
            kl_log_ratio_limit=20.0,
            kl_limit=10.0,
        ).replace(**fields)

    @property
    def divides_by_num_items(self) -> bool:
        """Whether the sum over tokens is divided by `num_items_in_batch`."""
        return self.loss_type in ("dapo", "cispo")

    def replace(self, **fields: Any) -> "PolicyLossConfig":
        """Returns a copy with `fields` changed, checked again; ValueError names the nearest known field."""
        check_fields(fields, [field.name for field in dataclasses.fields(self)])
        return dataclasses.replace(self, **fields)

    def settings(self) -> dict[str, Any]:
        """Returns the fields by name, as arguments of an operator."""
        return {name: getattr(self, name) for name in _FIELDS}  # torch 2.11 cannot compile vars()

    def log_bounds(self) -> tuple[float, float, float]:
        """Returns the log-ratios between which the surrogate follows the ratio.

        The lowest for negative advantages, the highest for the other ones, the highest for negative ones.
        """
        if self.loss_type == "cispo":
            highest = math.log(self.epsilon_high)
            return -math.inf, highest, highest
        delta = math.inf if self.delta is None else self.delta
        dual = math.inf if self.clip_ratio_dual is None else self.clip_ratio_dual
        lowest = 1.0 - self.epsilon_low
        return (
            math.log(lowest) if lowest > 0.0 else -math.inf,
            math.log(min(delta, 1.0 + self.epsilon_high)),
            math.log(min(dual, max(delta, 1.0 + self.epsilon_high))),
        )

    def _check_cispo(self) -> None:
        if self.epsilon_high < 1.0:
            raise ValueError(
                "epsilon_high: with loss_type 'cispo' it is the largest ratio itself, "
                f"expected a number of at least 1, got {self.epsilon_high!r}"
            )
        for name in ("delta", "clip_ratio_dual"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: expected None with loss_type 'cispo', got {getattr(self, name)!r}")

    def _check_max_completion_length(self) -> None:
        length = self.max_completion_length
        if length is None:
            if self.loss_type == "dr_grpo":
                raise ValueError("max_completion_length: expected an int with loss_type 'dr_grpo', got None")
        elif isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"max_completion_length: expected an int, got {length!r}")
        elif length < 1:
            raise ValueError(f"max_completion_length: expected an int of at least 1, got {length!r}")


def _check_optional(name: str, value: float | None, *, low: float) -> None:
    if value is not None:
        check_number(name, value, low=low, low_open=True, high=_LARGEST)


_FIELDS = tuple(field.name for field in dataclasses.fields(PolicyLossConfig))
