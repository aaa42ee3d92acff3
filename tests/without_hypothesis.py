"""Stands in for hypothesis if it is not installed: property tests are skipped, the other tests of their files run."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest


class _Anything:
    """A strategy, or what makes one."""

    def __call__(self, *_: Any, **__: Any) -> "_Anything":
        return self

    def __getattr__(self, name: str) -> "_Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    __or__ = __call__


class _StandIn(ModuleType):
    """A module that gives a strategy for every name it was not given."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # torch.compile asks each module that it skips for its file

    def __getattr__(self, name: str) -> Any:
        return getattr(_Anything(), name)


def given(*_: Any, **__: Any) -> pytest.MarkDecorator:
    """Skips the test."""
    return pytest.mark.skip(reason="hypothesis is not installed")


def settings(*_: Any, **__: Any) -> Any:
    """Leaves the test as it is."""
    return lambda test: test


def install() -> bool:
    """Puts the stand-in in hypothesis' place if that is not installed; returns whether it did."""
    if importlib.util.find_spec("hypothesis") is not None:
        return False
    hypothesis, strategies = _StandIn("hypothesis"), _StandIn("hypothesis.strategies")
    hypothesis.given, hypothesis.settings, hypothesis.strategies = given, settings, strategies
    sys.modules |= {"hypothesis": hypothesis, "hypothesis.strategies": strategies}
    return True
