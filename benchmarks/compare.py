"""`python benchmarks/compare.py COMMITTED.json NEW.json`: whether ours fell behind its peers since the committed run.

Peers are measured beside ours in each run, so that ratios to them can be compared across machines; times cannot. They
are noisy all the same: what fell is said loudly and fails nothing.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.result_file import BOUND, PEER, Results, read_results

FALL = 0.25
BANNER = "!" * 100


@dataclass(frozen=True)
class Change:
    """How many times longer than ours a peer takes, in two runs; None in the one without it."""

    room: str
    case: str
    provider: str
    before: float | None
    after: float | None

    @property
    def kept(self) -> float | None:
        """What is left of the ratio, as a factor."""
        return None if self.before is None or self.after is None else self.after / self.before

    def fell(self, allowed: float) -> bool:
        """Whether the ratio lost more than the allowed share."""
        return self.kept is not None and self.kept < 1 - allowed

    def __str__(self) -> str:
        before, after = (f"{ratio:.2f}x" if ratio else "none" for ratio in (self.before, self.after))
        kept = "" if self.kept is None else f" ({100 * (self.kept - 1):+.0f}%)"
        return f"{self.room} | {self.case} | {self.provider}: {before} -> {after}{kept}"


def ratios(results: Results) -> dict[tuple[str, str, str], float]:
    """Returns how many times longer than ours each peer and each bound takes, by room, case and provider."""
    return {
        (group.room, group.case, entry.provider): ratio
        for group in results.groups
        for entry in group.entries
        if entry.role in (PEER, BOUND) and (ratio := group.ratio(entry)) is not None
    }


def changes(before: Results, after: Results) -> list[Change]:
    """Returns how each ratio changed, the largest fall first.

    Ratios of the earlier file are missed only at levels (small, paper) that the later one has.
    """
    old, new = ratios(before), ratios(after)
    wanted = _names(before, _levels(after))
    keys = [key for key in dict.fromkeys([*old, *new]) if key in new or key in wanted]
    found = [Change(*key, old.get(key), new.get(key)) for key in keys]
    return sorted(found, key=lambda x: (x.kept is None, x.kept or 0))


def vanished(before: Results, after: Results) -> list[tuple[str, str, str]]:
    """Returns the entries, ours among them, that the later file should have and lacks."""
    return sorted(_names(before, _levels(after)) - _names(after, _levels(after)))


def added(before: Results, after: Results) -> list[tuple[str, str, str]]:
    """Returns the entries that the earlier file lacks."""
    return sorted(_names(after, _levels(after)) - _names(before, _levels(before)))


def _levels(results: Results) -> set[str]:
    return {level for entry in results.entries for level in entry.facts["levels"]}


def _names(results: Results, levels: set[str]) -> set[tuple[str, str, str]]:
    return {(x.room, x.case, x.provider) for x in results.entries if levels.intersection(x.facts["levels"])}


def differences(before: Results, after: Results) -> list[str]:
    """Returns what of the machine, its settings and its packages is not the same."""
    facts = [results.machine | results.entries[0].facts["versions"] for results in (before, after)]
    names = dict.fromkeys([*facts[0], *facts[1]])
    pairs = {name: tuple(one.get(name, "none") for one in facts) for name in names}
    return [f"{name}: {old} -> {new}" for name, (old, new) in pairs.items() if old != new]


def report(before: Results, after: Results, allowed: float) -> list[str]:
    """Returns the lines to print: all ratios, what vanished or is new, and last and loudest what fell."""
    found = changes(before, after)
    lines = [f"How many times longer than ours, {before.path.name} -> {after.path.name}:"]
    lines += [f"  {change}" for change in found]
    differing = differences(before, after)
    if differing:
        lines += ["What else differs, and may change ratios alone:", *(f"  {line}" for line in differing)]
    for title, names in (("Vanished", vanished(before, after)), ("New", added(before, after))):
        lines += [f"{title}:", *(f"  {' | '.join(name)}" for name in names)] if names else []
    return lines + _warnings([change for change in found if change.fell(allowed)], allowed)


def _warnings(fallen: Sequence[Change], allowed: float) -> list[str]:
    if not fallen:
        return [f"No ratio fell by more than {allowed:.0%}."]
    title = f"FELL BEHIND: {len(fallen)} of our ratios to peers are more than {allowed:.0%} below the committed ones"
    annotated = (
        [f"::warning title=Benchmarks::{change}" for change in fallen] if os.environ.get("GITHUB_ACTIONS") else []
    )
    return [BANNER, title, *(f"  {change}" for change in fallen), BANNER, *annotated]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints how ratios changed.

    Returns:
        0 whatever fell, or 2 where a file cannot be read.
    """
    parser = argparse.ArgumentParser(prog="python benchmarks/compare.py", description=__doc__.splitlines()[0])
    parser.add_argument("committed", type=Path, metavar="COMMITTED.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument(
        "--fall", type=float, default=FALL, metavar="SHARE", help="that is too much (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if not 0 < options.fall < 1:
        parser.error(f"--fall: expected a share between 0 and 1, got {options.fall}")
    try:
        before, after = read_results(options.committed), read_results(options.new)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(*report(before, after, options.fall), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
