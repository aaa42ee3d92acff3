"""Lets recorders hear when `generate` of a model begins and ends.

follow(model)  # in the recorder's __enter__, once it is among FOLLOWERS
unfollow(model)  # in its __exit__, once it is not
"""

import functools
import types
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vgpo_kernels.integrations.transformers.pictures import described


class Prompt(NamedTuple):
    """What a call of `generate` begins with.

    Args:
        ids: (B, P).
        end_tokens: ids that end a completion.
        described: the arguments that describe the prompts' pictures, where the model takes any; forwards need not get
            them, since generate may encode the pictures beforehand.
    """

    ids: Tensor
    end_tokens: tuple[int, ...]
    described: Mapping[str, Any] = MappingProxyType({})


class Follower(Protocol):
    """Somebody who follows `generate`."""

    def follows(self, module: nn.Module) -> bool:
        """Tells whether the module is one of those that are recorded, and no copy."""

    @property
    def generating(self) -> bool:
        """Whether a call of `generate` is being followed."""

    def begin_generate(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hears the arguments of a call."""

    def end_generate(self, result: Any) -> None:
        """Hears what the call returned; None where it raised."""


# Those who follow now; empty outside of every `with`.
FOLLOWERS: list[Follower] = []


class FollowedGenerate:
    """Stands in for a module's `generate`; a deep copy of the module has one of its own, which nobody follows.

    Args:
        module: whose `generate` it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.replaced = module.__dict__.get("generate")
        functools.update_wrapper(self, self._original())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        followers = [each for each in FOLLOWERS if each.follows(self.module) and not each.generating]
        if not followers:
            return self._original()(*args, **kwargs)
        result = None
        try:
            for follower in followers:
                follower.begin_generate(self.module, args, kwargs)
            result = self._original()(*args, **{"disable_compile": True, **kwargs})
        finally:
            for follower in followers:
                follower.end_generate(result)
        return result

    def _original(self) -> Any:
        cls: Any = type(self.module)
        return self.replaced or types.MethodType(cls.generate, self.module)


def follow(module: nn.Module) -> None:
    """Puts the stand-in there, unless it is."""
    if not isinstance(module.__dict__.get("generate"), FollowedGenerate):
        module.generate = FollowedGenerate(module)  # type: ignore[assignment]


def unfollow(module: nn.Module) -> None:
    """Takes the stand-in away, unless somebody else needs it or has put another in its place."""
    found = module.__dict__.get("generate")
    if not isinstance(found, FollowedGenerate) or any(follower.follows(module) for follower in FOLLOWERS):
        return
    if found.replaced is None:
        del module.generate
    else:
        module.generate = found.replaced


def read_prompt(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt:
    """Returns the prompt and the end tokens of a call of `generate`.

    Raises:
        ValueError: no input_ids, beams, or guidance.
    """
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise ValueError("generate: expected input_ids (B, L) while visual attention is recorded")
    beams = _setting(module, kwargs, "num_beams") or 1
    if beams > 1:
        raise ValueError(f"num_beams: expected 1 while visual attention is recorded (beams change rows), got {beams}")
    guidance = _setting(module, kwargs, "guidance_scale")
    if guidance not in (None, 1):
        raise ValueError(
            "guidance_scale: expected 1 or None while visual attention is recorded (guidance runs a second sequence), "
            f"got {guidance}"
        )
    ends = _setting(module, kwargs, "eos_token_id")
    end_tokens = () if ends is None else tuple(torch.as_tensor(ends).flatten().tolist())
    return Prompt(ids, end_tokens, described(kwargs))


def _setting(module: Any, kwargs: dict[str, Any], name: str) -> Any:
    """Returns a setting as `generate` finds it: an argument, else what the given configuration says, or the model's."""
    if name in kwargs:
        return kwargs[name]
    given = getattr(kwargs.get("generation_config"), name, None)
    return getattr(module.generation_config, name, None) if given is None else given
