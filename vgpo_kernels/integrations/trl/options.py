"""The options and arguments of TRL's GRPO trainer that `VGPOTrainer` refuses, with the reason, and its loss."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vgpo_kernels.policy_loss.config import LOSS_TYPES, PolicyLossConfig


class _Option(NamedTuple):
    """A field of GRPOConfig and the values under which its loss is a `policy_loss`."""

    name: str
    accepts: Callable[[Any], bool]
    expected: str
    reason: str


_OPTIONS = (
    _Option(
        "loss_type",
        lambda value: value in LOSS_TYPES,
        f"one of {', '.join(map(repr, LOSS_TYPES))}",
        "policy_loss has no other, and none defines how weights enter it",
    ),
    _Option(
        "use_liger_kernel",
        lambda value: not value,
        "False",
        "Liger patches the model when training starts, and its fused losses drop token weights; "
        "model_init_kwargs={'use_kernels': True} brings kernels for the layers",
    ),
    _Option(
        "cast_lm_head_to_fp32",
        lambda value: not value,
        "False",
        "it replaces the head's forward, which is replaced here; logits are accumulated in fp32 as it is",
    ),
    _Option(
        "top_entropy_quantile",
        lambda value: value == 1.0,
        "1.0",
        "it drops tokens, whatever their weight, by an entropy that is known only once the loss is computed",
    ),
    _Option(
        "entropy_coef",
        lambda value: value == 0.0,
        "0.0",
        "an entropy bonus is not weighted, and its gradient is not computed",
    ),
    _Option(
        "use_adaptive_entropy",
        lambda value: not value,
        "False",
        "an entropy bonus is not weighted, and its gradient is not computed",
    ),
    _Option(
        "off_policy_mask_threshold",
        lambda value: value is None,
        "None",
        "it drops rows, whatever their weight, by log-probabilities that are known only once the loss is computed",
    ),
)

_ARGUMENTS = {
    "tools": "a conversation of several turns has tokens and images in its completion that the policy did not generate",
    "environment_factory": "an environment answers with tokens and images that the policy did not generate",
    "rollout_func": "a custom rollout may mask tokens and bring pictures that are not those of the prompt",
}


def check_options(args: Any) -> None:
    """Raises ValueError, with the reason, if a GRPOConfig asks for a loss that is not computed here.

    Args:
        args: the GRPOConfig.
    """
    for option in _OPTIONS:
        value = getattr(args, option.name)
        if not option.accepts(value):
            raise ValueError(f"{option.name}: expected {option.expected}, got {value!r}: {option.reason}")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError, with the reason, if an argument of the trainer goes beyond single-turn completions.

    Args:
        arguments: of GRPOTrainer, by name.
    """
    for name, reason in _ARGUMENTS.items():
        value = arguments.get(name)
        if value:
            raise ValueError(f"{name}: expected None, got {value!r}: {reason}")
    if getattr(arguments.get("peft_config"), "is_prompt_learning", False):
        raise ValueError(
            f"peft_config: expected adapters inside the layers, got {type(arguments['peft_config']).__name__}: "
            "learnt prompts add states that are no token of the sequence"
        )


def loss_config(args: Any) -> PolicyLossConfig:
    """Returns the policy loss that a GRPOConfig describes.

    Raises:
        ValueError, TypeError: a value that the policy loss does not take; the message names the option.
    """
    if args.loss_type == "cispo" and args.epsilon_high is None and args.epsilon < 1.0:
        raise ValueError(
            "epsilon_high: expected the largest ratio itself, at least 1, with loss_type 'cispo', got None, for which "
            f"TRL takes epsilon={args.epsilon}: set epsilon_high, such as 5.0"
        )
    is_cispo = args.loss_type == "cispo"  # without a lower bound
    if not is_cispo and not 0.0 <= args.epsilon <= 1.0:
        raise ValueError(
            f"epsilon: expected a number from 0 to 1 with loss_type {args.loss_type!r}, got {args.epsilon}; "
            "epsilon_high may be larger"
        )
    return PolicyLossConfig(
        loss_type=args.loss_type,
        importance_sampling_level=args.importance_sampling_level,
        epsilon_low=PolicyLossConfig.epsilon_low if is_cispo else args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        delta=args.delta,
        beta=args.beta,
        max_completion_length=args.max_completion_length,
        kl_importance_weighted=bool(args.use_bias_correction_kl),
    )
