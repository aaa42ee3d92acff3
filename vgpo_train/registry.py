"""Things known by name: algorithms, rollout engines, rewards."""

from collections.abc import Callable
from typing import Generic, TypeVar

from vgpo_train.config import ConfigError, nearest

T = TypeVar("T")
Registered = TypeVar("Registered")


class Registry(Generic[T]):
    """What one option of the configuration chooses among.

    Args:
        option: the option's key, for error messages.
    """

    def __init__(self, option: str) -> None:
        self.option = option
        self._known: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Decorator that makes a class or function known by `name`."""

        def add(registered: Registered) -> Registered:
            self._known[name] = registered  # type: ignore[assignment]
            return registered

        return add

    def get(self, name: str) -> T:
        """Returns what is known by `name`, or raises ConfigError with the nearest name."""
        if name not in self._known:
            names = ", ".join(map(repr, sorted(self._known)))
            raise ConfigError(
                f"{self.option}: expected one of {names}, got {name!r}{nearest(name, sorted(self._known))}"
            )
        return self._known[name]
