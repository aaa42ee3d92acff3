"""How time and memory grow with a size, fitted over the cases of a sweep."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.result_file import OURS, Entry, Results

MARGIN = 0.15  # of an exponent: what a fit may differ by before growth counts as faster than the floor's


@dataclass(frozen=True)
class Growth:
    """Exponents of one provider over one sweep; None where there are fewer than two positive points.

    Args:
        entries: in the order of the size.
        time, floor: of the median and of the least seconds that the counted work takes.
        memory, bytes: of the peak beyond inputs and results, and of the bytes that must be moved.
    """

    entries: tuple[Entry, ...]
    time: float | None
    floor: float | None
    memory: float | None
    bytes: float | None

    @property
    def too_fast(self) -> list[str]:
        """What of ours grows faster than it must, by more than `MARGIN`."""
        if self.entries[0].role != OURS:
            return []
        pairs = {"time": (self.time, self.floor), "memory": (self.memory, self.bytes)}
        known = {name: (own, least) for name, (own, least) in pairs.items() if own is not None and least is not None}
        return [name for name, (own, least) in known.items() if own - least > MARGIN]


def exponent(points: Iterable[tuple[float, float | None]]) -> float | None:
    """Fits y = c * x ** e by least squares of the logarithms.

    Returns:
        e, or None of fewer than two different x; points that are not positive or not known are left out.
    """
    logs = [(math.log(x), math.log(y)) for x, y in points if y is not None and x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def sweeps(results: Results) -> dict[tuple[str, str, str], list[Entry]]:
    """Returns the entries of each sweep by room, name of the size and provider, in the order of the size."""
    found: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in results.entries:
        if entry.axis is not None:
            found.setdefault((entry.room, entry.axis, entry.provider), []).append(entry)
    return {key: sorted(entries, key=lambda x: x.size) for key, entries in found.items()}


def growths(results: Results) -> list[Growth]:
    """Returns the growth of each provider over each sweep."""
    return [
        Growth(
            tuple(entries),
            time=exponent((x.size, x.median) for x in entries),
            floor=exponent((x.size, x.floor) for x in entries),
            memory=exponent((x.size, x.memory) for x in entries),
            bytes=exponent((x.size, x.facts["work"]["bytes"]) for x in entries),
        )
        for entries in sweeps(results).values()
    ]
