"""Reads the JSON that a run of the benchmarks leaves, and compares the entries of a case."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS, PLAIN, PEER, BOUND = "ours", "ours, plain", "peer", "bound"  # roles
HEADLINE = "vgpo_kernels"  # what callers get who choose nothing: ratios are to it, not to the fastest of ours


@dataclass(frozen=True)
class Entry:
    """One provider of one case: seconds, bytes, and the rest of what was written of it.

    Args:
        spread: interquartile range over the median, None of fewer than three rounds.
        memory: peak bytes beyond inputs and results, None where it was not measured.
        facts: all of `extra_info`.
    """

    room: str
    case: str
    provider: str
    role: str
    median: float
    spread: float | None
    memory: float | None
    facts: Mapping[str, Any]

    @property
    def floor(self) -> float:
        """The least seconds that the counted work takes on this machine."""
        return self.facts["floor"]

    @property
    def of_ceiling(self) -> float:
        return self.floor / self.median

    @property
    def axis(self) -> str | None:
        """Name of the size that varies, None outside a sweep."""
        return self.facts["axis"]["name"] if self.facts.get("axis") else None

    @property
    def size(self) -> float:
        """Value of the size that varies, in a sweep."""
        return self.facts["axis"]["value"]


@dataclass(frozen=True)
class Group:
    """The entries of one case of one room, which were measured in turns."""

    room: str
    case: str
    entries: tuple[Entry, ...]

    @property
    def ours(self) -> Entry | None:
        """The entry that ratios are to, None where it was not measured."""
        return next((x for x in self.entries if x.provider == HEADLINE), None)

    @property
    def plain(self) -> Entry | None:
        """Our plain torch."""
        return next((x for x in self.entries if x.role == PLAIN), None)

    @property
    def best_peer(self) -> Entry | None:
        """The fastest peer."""
        return min((x for x in self.entries if x.role == PEER), key=lambda x: x.median, default=None)

    @property
    def leanest_peer(self) -> Entry | None:
        """The peer that takes the least memory."""
        known = [
            (x.memory, place, x) for place, x in enumerate(self.entries) if x.role == PEER and x.memory is not None
        ]
        return min(known)[-1] if known else None

    def ratio(self, entry: Entry | None) -> float | None:
        """How many times longer than ours an entry takes; None where either was not measured."""
        return entry.median / self.ours.median if entry and self.ours else None

    def memory_ratio(self, entry: Entry | None) -> float | None:
        """How many times the memory of ours an entry takes; None where either is unknown or ours takes none."""
        if entry is None or entry.memory is None or self.ours is None or not self.ours.memory:
            return None
        return entry.memory / self.ours.memory

    @property
    def in_sweep(self) -> bool:
        return self.entries[0].axis is not None


@dataclass(frozen=True)
class Results:
    """One file: what was measured on one machine at one commit.

    Args:
        commit: None if it is unknown, as in a copy without .git, or not the same for all.
        dirty: False only where all entries, and the run at its end, say that the tree was clean.
        known_to_git: whether git said so; a copy without git's files is taken for clean.
        commits: those that entries name, and the run at its end.
        tests: the record of the test session that was embedded.
        skipped: room, case, provider, reason of what could not run.
        failed: the same of what was wrong, ours or a peer.
        not_reached: room, case, provider of what an interrupted run did not come to.
    """

    path: Path
    commit: str | None
    dirty: bool
    known_to_git: bool
    commits: frozenset[str | None]
    tests: Mapping[str, Any] | None
    groups: tuple[Group, ...]
    skipped: tuple[Mapping[str, str], ...]
    failed: tuple[Mapping[str, str], ...]
    not_reached: tuple[Mapping[str, str], ...]

    @property
    def machine(self) -> Mapping[str, Any]:
        return self.groups[0].entries[0].facts["machine"]

    @property
    def versions(self) -> Mapping[str, str]:
        return self.groups[0].entries[0].facts["versions"]

    @property
    def entries(self) -> list[Entry]:
        return [entry for group in self.groups for entry in group.entries]


# What pytest-benchmark calls a commit where git knows of none; a copy's may be named otherwise.
UNVERSIONED = frozenset({None, "unknown", "unversioned"})


def read_results(path: Path) -> Results:
    """Reads the file of a run.

    Raises:
        ValueError: it cannot be read, is not JSON, holds no entry, or holds one that these benchmarks did not write.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected the JSON of a run of the benchmarks: {error}") from error
    if not isinstance(content, dict) or not content.get("benchmarks"):
        raise ValueError(f"{path}: expected the JSON of a run of the benchmarks, found no entry in it")
    entries = [_entry(path, one) for one in content["benchmarks"]]
    at_end = content.get("commit_info", {}).get("id")
    commits = frozenset(entry.facts["commit"] for entry in entries) | {at_end}.difference(UNVERSIONED)
    return Results(
        path=path,
        commit=next(iter(commits)) if len(commits) == 1 and not commits & UNVERSIONED else None,
        dirty=bool(content.get("changed_meanwhile")) or any(entry.facts["dirty"] is not False for entry in entries),
        known_to_git=all(entry.facts.get("commit_from") == "git" for entry in entries),
        commits=commits,
        tests=content.get("tests"),
        groups=_grouped(entries),
        **{name: tuple(content.get(name, ())) for name in ("skipped", "failed", "not_reached")},
    )


def _entry(path: Path, one: Mapping[str, Any]) -> Entry:
    try:
        facts, stats = one["extra_info"], one["stats"]
        memory = facts.get("memory")
        for needed in ("machine", "versions", "commit", "dirty", "floor", "bound_by", "achieved", "levels"):
            facts[needed]
        return Entry(
            room=facts["task"],
            case=facts["case"],
            provider=facts["provider"],
            role=facts["role"],
            median=stats["median"],
            spread=stats["iqr"] / stats["median"] if stats["rounds"] > 2 else None,
            memory=memory and memory["peak_extra_bytes"],
            facts=facts,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: entry {one.get('name')!r} is not one of these benchmarks: {error} missing"
        ) from error


def _grouped(entries: Iterable[Entry]) -> tuple[Group, ...]:
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.room, entry.case), []).append(entry)
    return tuple(Group(room, case, tuple(several)) for (room, case), several in found.items())
