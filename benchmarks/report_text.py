"""The Markdown of a report: goals, ratios, one table a case, what was left out, how things grow."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.goals import DEVICE, Verdict, verdicts
from benchmarks.result_file import OURS, Entry, Group, Results
from benchmarks.scaling import MARGIN, Growth, growths

ABSENT = "-"
READING = (
    "Times are medians of calls measured in turns. *Over ours* says how many times longer, or how many times the "
    "memory, an entry takes: above 1 ours is ahead. *Over the floor* is time over the least that the counted work "
    "takes at the rates of a large product and a large copy in the same run, *of the ceiling* its inverse, which may "
    "pass 1 where data fit a cache. *Spread* is the interquartile range over the median. *Extra memory* is the peak "
    "beyond inputs and results. A *bound* does less than the others, as a copy."
)


def seconds_text(value: float | None) -> str:
    """Three digits and a unit."""
    return _scaled(value, ((1, "s"), (1e-3, "ms"), (1e-6, "µs")))


def bytes_text(value: float | None) -> str:
    """Three digits and a decimal unit."""
    return _scaled(value, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))


def rate_text(entry: Entry) -> str:
    """What was reached of the rate that bounds the work."""
    if entry.facts["bound_by"] == "bytes":
        return f"{_digits(entry.facts['achieved']['gbs'])} GB/s"
    return _scaled(entry.facts["achieved"]["tflops"], ((1, "TFLOP/s"), (1e-3, "GFLOP/s"), (1e-6, "MFLOP/s")))


def ratio_text(value: float | None) -> str:
    return ABSENT if value is None else f"{_digits(value)}x"


def percent_text(value: float | None) -> str:
    return ABSENT if value is None else f"{_digits(100 * value)}%"


def _scaled(value: float | None, units: Sequence[tuple[float, str]]) -> str:
    if value is None:
        return ABSENT
    size, unit = next((unit for unit in units if abs(value) >= unit[0]), units[-1])
    return f"{_digits(value / size)} {unit}"


def _digits(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 or value == 0 else f"{value:#.3g}".rstrip(".")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def report_text(
    files: Sequence[Results], figures: Mapping[Path, Mapping[str, Mapping[str, Path]]], folder: Path
) -> str:
    """Writes the report of several files.

    Args:
        files: each a machine.
        figures: pictures by file, title and theme.
        folder: where the report will lie; links are relative to it.
    """
    parts = ["# Benchmarks\n", READING + "\n"]
    for results in files:
        parts += [
            f"## {results.machine['device']}\n",
            _origin(results, folder),
            *failures(results),
            *_ahead(results),
            *sections(results),
            *_figures(results, figures[results.path], folder),
        ]
    return "\n".join(parts)


def sections(results: Results) -> list[str]:
    """Returns the parts on ratios, cases, what was left out and growth, a heading each."""
    return [*_worst_first(results), *_rooms(results), *_left_out(results), *_scaling(results)]


def caption(results: Results) -> str:
    """Where a figure comes from: file, commit, machine."""
    return f"{results.path.name}, commit {str(results.commit)[:10]}, {results.machine['device']}"


def _origin(results: Results, folder: Path) -> str:
    machine, tests = results.machine, results.tests or {}
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    stock = f" Stock attention: the backend `{machine['stock_attention']}`." if machine.get("stock_attention") else ""
    clean = "clean" if results.known_to_git else "in a copy without git's own files, taken for clean"
    return (
        f"Measured in [{results.path.name}]({os.path.relpath(results.path, folder)}) at commit `{results.commit}`, "
        f"{clean}, its tests green ({tests['passed']} passed, {tests['skipped']} skipped, on {tests['device']}). "
        f"{machine['cpu']}, {machine['threads']} threads{driver}.{stock} {versions}.\n"
    )


def _ahead(results: Results) -> list[str]:
    judged = DEVICE in results.machine["device"]
    where = "" if judged else f" The goals are stated for an {DEVICE}; here they are shown and not judged."
    rows = [_verdict_row(verdict) for verdict in verdicts(results)]
    head = ("kernel", "ahead means", "measured, worst case", "case", "met")
    return ["### Ahead\n", f"Furthest behind first.{where}\n", table(head, rows)]


def _verdict_row(verdict: Verdict) -> tuple[str, ...]:
    goal, met = verdict.goal, {True: "yes", False: "**no**", None: "not judged"}[verdict.met]
    if verdict.value is None:
        return goal.room, goal.text, "not measured", "", ""
    return goal.room, goal.text, f"{_digits(verdict.value)}{goal.unit}", verdict.case, met


def _worst_first(results: Results) -> list[str]:
    groups = [(group, group.ours) for group in results.groups if group.ours and not group.in_sweep]
    groups.sort(key=lambda x: (x[0].best_peer is None, x[0].ratio(x[0].best_peer) or x[1].of_ceiling))
    rows = [
        (
            group.room,
            group.case,
            seconds_text(ours.median),
            _named(group.ratio(group.best_peer), group.best_peer),
            ratio_text(group.ratio(group.plain)),
            ratio_text(1 / ours.of_ceiling),
            _named(group.memory_ratio(group.leanest_peer), group.leanest_peer),
        )
        for group, ours in groups
    ]
    head = ("task", "case", "ours", "best peer over ours", "our plain torch over ours", "ours over the floor")
    return ["### Ratios, worst first\n", table((*head, "memory of the leanest peer over ours"), rows)]


def _named(ratio: float | None, entry: Entry | None) -> str:
    return ABSENT if ratio is None or entry is None else f"{ratio_text(ratio)} ({entry.provider})"


def _rooms(results: Results) -> list[str]:
    parts, room = [], None
    for group in results.groups:
        if group.in_sweep:
            continue
        if group.room != room:
            room = group.room
            parts.append(f"### {room[0].upper()}{room[1:]}\n")
        facts = group.entries[0].facts
        ceilings = facts["ceilings"]
        parts.append(
            f"**{group.case}**, {facts['dtype']}. Floor {seconds_text(facts['floor'])}, by {facts['bound_by']}; "
            f"ceilings {_digits(ceilings['tflops'])} TFLOP/s, {_digits(ceilings['gbs'])} GB/s. "
            f"Memory: {facts['memory']['how']}.\n"
        )
        parts.append(_case_table(group))
        parts += _phases(group)
    return parts


def _case_table(group: Group) -> str:
    on_gpu = any("launches" in entry.facts for entry in group.entries)
    head = ["entry", "role", "time", "over ours", "over the floor", "rate", "of the ceiling", "spread", "extra memory"]
    head += ["memory over ours", *(("launches", "with the host") if on_gpu else ())]
    rows = []
    for entry in sorted(group.entries, key=lambda x: (x is not group.ours, x.median)):
        row = [
            f"**{entry.provider}**" if entry.role == OURS else entry.provider,
            entry.role,
            seconds_text(entry.median),
            ratio_text(group.ratio(entry)),
            ratio_text(1 / entry.of_ceiling),
            rate_text(entry),
            percent_text(entry.of_ceiling),
            percent_text(entry.spread),
            bytes_text(entry.memory),
            ratio_text(group.memory_ratio(entry)),
        ]
        if on_gpu:
            row += [str(entry.facts.get("launches") or ABSENT), seconds_text(entry.facts.get("host_seconds"))]
        rows.append(row)
    return table(head, rows)


def _phases(group: Group) -> list[str]:
    """A step's time and peak memory by phase, where a room tells them."""
    phased = [entry for entry in group.entries if entry.facts.get("phases")]
    if not phased:
        return []
    names = list(dict.fromkeys(name for entry in phased for name in entry.facts["phases"]))
    rows = [[entry.provider, *(_phase(entry.facts["phases"].get(name)) for name in names)] for entry in phased]
    return ["By phase, time and peak memory beyond what lived before:\n", table(["entry", *names], rows)]


def _phase(phase: Mapping[str, float] | None) -> str:
    if phase is None:
        return ABSENT
    memory = phase.get("peak_extra_bytes")
    return seconds_text(phase["seconds"]) + ("" if memory is None else f", {bytes_text(memory)}")


def failures(results: Results) -> list[str]:
    """What came to another result or to an error, and what an interrupted run did not come to."""
    parts = []
    if results.failed:
        parts += ["### Failed\n", "Not timed, and no peer of the tables below.\n", _reasons(results.failed)]
    if results.not_reached:
        text = f"The run ended before {len(results.not_reached)} of its entries, which this report lacks.\n"
        parts += ["### Not reached\n", text]
    return parts


def _left_out(results: Results) -> list[str]:
    return ["### Left out\n", _reasons(results.skipped)] if results.skipped else []


def _reasons(entries: Iterable[Mapping[str, str]]) -> str:
    names = ("task", "case", "provider", "reason")
    return table(names, [[one[name] for name in names] for one in entries])


def _scaling(results: Results) -> list[str]:
    found = growths(results)
    if not found:
        return []
    text = (
        f"Exponents e of time ~ size^e and memory ~ size^e, by least squares of logarithms, beside those of the floor "
        f"and of the bytes that must be moved. Ours is flagged where it grows faster by more than {MARGIN}.\n"
    )
    head = ("task", "size", "from, to", "cases", "entry", "time", "floor", "memory", "bytes moved", "grows too fast")
    rows = [_growth_row(growth) for growth in sorted(found, key=lambda x: not x.too_fast)]
    return ["### Scaling\n", text, table(head, rows)]


def _growth_row(growth: Growth) -> list[str]:
    first, last = growth.entries[0], growth.entries[-1]
    fits = [growth.time, growth.floor, growth.memory, growth.bytes]
    return [
        first.room,
        first.axis or "",
        f"{first.size:,}, {last.size:,}",
        str(len(growth.entries)),
        first.provider,
        *(ABSENT if fit is None else f"{fit:.2f}" for fit in fits),
        f"**{' and '.join(growth.too_fast)}**" if growth.too_fast else "",
    ]


def _figures(results: Results, figures: Mapping[str, Mapping[str, Path]], folder: Path) -> list[str]:
    parts = []
    for title, themes in figures.items():
        light, dark = (os.path.relpath(themes[theme], folder) for theme in ("light", "dark"))
        parts.append(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img alt="{title}" src="{light}"></picture>\n\n*{title}. {caption(results)}.*\n'
        )
    return ["### Figures\n", *parts] if parts else []
