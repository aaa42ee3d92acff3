"""The tiles of the kernels: one choice each, what is worth timing against it, and a way to run with other tiles.

Each family's `configs` holds its choices: functions from a target and the traits of a launch to compile-time arguments
and launch options, with their candidates beside them.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec

LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")

Tiles = dict[str, int]
_Traits = ParamSpec("_Traits")


@dataclass(frozen=True)
class Config:
    """One kernel's tiles, for a tuner.

    Args:
        kernel: its name.
        case: name of the compile case whose types and sizes the candidates are for.
        candidates: by target, the tiles worth timing against those chosen there.
    """

    kernel: str
    case: str
    candidates: Mapping[str, Sequence[Tiles]]


_configs: dict[str, Config] = {}
# Of the process, not of a thread or context: the backward of autograd runs in a thread of its own.
_forced: dict[str, Tiles] = {}


def tunable(
    kernel: str, case: str, candidates: Mapping[str, Sequence[Tiles]]
) -> Callable[[Callable[_Traits, Tiles]], Callable[_Traits, Tiles]]:
    """Decorates the function that chooses a kernel's tiles, so that a tuner finds it and can overrule it.

    Args:
        kernel, case, candidates: as in `Config`.

    Raises:
        ValueError: another kernel has that name.
    """
    if kernel in _configs:
        raise ValueError(f"kernel: {kernel!r} has its tiles already")
    _configs[kernel] = Config(kernel, case, candidates)

    def decorate(choose: Callable[_Traits, Tiles]) -> Callable[_Traits, Tiles]:
        @functools.wraps(choose)
        def chosen(*args: _Traits.args, **kwargs: _Traits.kwargs) -> Tiles:
            tiles = choose(*args, **kwargs)
            return _in_place_of(tiles, kernel) if kernel in _forced else tiles

        return chosen

    return decorate


def _in_place_of(chosen: Tiles, kernel: str) -> Tiles:
    """Returns the tiles forced on the kernel, once they are known to name the arguments that those chosen name."""
    expected, got = (set(tiles).difference(LAUNCH_OPTIONS) for tiles in (chosen, _forced[kernel]))
    if got != expected:
        raise ValueError(f"tiles of {kernel!r}: expected {', '.join(sorted(expected))}, got {', '.join(sorted(got))}")
    return dict(_forced[kernel])


def listed(names: str, *rows: tuple[int | None, ...]) -> tuple[Tiles, ...]:
    """Returns the tiles of a table's rows, under the names of its columns; None leaves a launch option alone."""
    return tuple(
        {name: value for name, value in zip(names.split(), row, strict=True) if value is not None} for row in rows
    )


def configs() -> dict[str, Config]:
    """Returns the configs of every family's kernels by name; imports Triton."""
    importlib.import_module("vgpo_kernels._compile").all_cases()
    return dict(_configs)


@contextlib.contextmanager
def chosen_tiles(kernel: str, tiles: Tiles) -> Iterator[None]:
    """Launches a kernel with these tiles inside the context, in every thread, whatever it is launched on.

    Args:
        kernel: a name in `configs()`.
        tiles: compile-time arguments, all that the kernel's own choice names, and launch options.

    Raises:
        ValueError: no kernel has that name; at a launch, the tiles name other arguments than the choice does.

    Example:
        >>> with chosen_tiles("attention mass", {"BLOCK_M": 64, "BLOCK_N": 64}):
        ...     pass
    """
    if kernel not in configs():
        raise ValueError(f"kernel: expected one of {', '.join(map(repr, configs()))}, got {kernel!r}")
    before = _forced.get(kernel)
    _forced[kernel] = tiles
    try:
        yield
    finally:
        del _forced[kernel]
        if before is not None:
            _forced[kernel] = before
