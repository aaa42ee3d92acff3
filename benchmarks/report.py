"""What a run of the benchmarks found, as Markdown: `python -m benchmarks.report FILE ...`.

`--check` only says whether figures are refused, which are those that cannot be reproduced: of changed files, of a
commit whose tests were not green, of a busy machine. `--against OLD` says which ratios to peers fell since an older
run, and refuses nothing: machines are noisy.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.gpu_bench import TEST_FOLDERS, gpu_test_files

OURS = "vgpo_kernels"  # what the public functions run: ratios are to it
CASE = ["task", "case"]
NAMES = ("task", "case", "provider", "reason")
FALL = 0.25  # of a ratio to a peer
BUSY = 0.2  # of the machine's processors, by other processes
ABSENT = "-"
NEEDED = {*CASE, "provider", "role", "median", "memory", "roofline", "axis"}


@dataclass(frozen=True)
class Run:
    """One file: what was measured on one machine at one commit.

    Args:
        path: of the file.
        facts: all of it but the entries: machine, versions, commit, tests, what was left out.
        entries: a row for each provider of a case, with `ratio`, its time over that of ours in the same case.
    """

    path: Path
    facts: Mapping[str, Any]
    entries: pd.DataFrame

    @property
    def cases(self) -> pd.DataFrame:
        """The entries of cases that are no part of a sweep."""
        return self.entries[self.entries["axis"].isna()]


def read_run(path: Path) -> Run:
    """Reads the file of a run.

    Raises:
        ValueError: it cannot be read, is not JSON, or its entries are not those of the benchmarks.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        entries = pd.DataFrame(facts.pop("entries"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected the JSON of a run of the benchmarks: {error!r}") from error
    if lacking := NEEDED - set(entries):
        raise ValueError(f"{path}: expected entries with {', '.join(sorted(lacking))}")
    ours = entries[entries["provider"] == OURS].set_index(CASE)["median"].rename("ours")
    entries = entries.join(ours, on=CASE)
    return Run(path, facts, entries.assign(ratio=entries["median"] / entries["ours"]))


def best_peers(run: Run) -> pd.DataFrame:
    """Returns ours in each case outside a sweep beside the fastest peer, in `peer`, `peer_median`, `peer_ratio`."""
    peers = run.cases[run.cases["role"] == "peer"]
    best = peers.loc[peers.groupby(CASE)["median"].idxmin()].set_index(CASE)
    best = best[["provider", "median", "ratio"]].set_axis(["peer", "peer_median", "peer_ratio"], axis=1)
    return run.cases[run.cases["provider"] == OURS].join(best, on=CASE).sort_values("peer_ratio")


# What figures look like


def seconds_text(value: float | None) -> str:
    """Three digits and a unit."""
    return _scaled(value, ((1, "s"), (1e-3, "ms"), (1e-6, "µs")))


def bytes_text(value: float | None) -> str:
    """Three digits and a decimal unit."""
    return _scaled(value, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))


def ratio_text(value: float | None) -> str:
    return ABSENT if pd.isna(value) else f"{_digits(value)}x"


def percent_text(value: float | None) -> str:
    return ABSENT if pd.isna(value) else f"{_digits(100 * value)}%"


def _scaled(value: float | None, units: Sequence[tuple[float, str]]) -> str:
    if pd.isna(value):
        return ABSENT
    size, unit = next((unit for unit in units if abs(value) >= unit[0]), units[-1])
    return f"{_digits(value / size)} {unit}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == 0 else f"{value:#.3g}".rstrip(".")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


# The report


def report(run: Run) -> str:
    """Returns the report of a run: where it comes from, ours beside the best peer, every entry, what was left out."""
    return "\n".join([origin(run), case_table(run), entry_table(run), *left_out(run)])


def origin(run: Run) -> str:
    machine, tests = run.facts["machine"], run.facts.get("tests") or {}
    versions = ", ".join(f"{name} {version}" for name, version in run.facts["versions"].items())
    passed = f"{tests.get('passed', 'unknown')} tests passed, {tests.get('failed', 'unknown')} failed"
    state = "changed files" if run.facts["dirty"] else "clean" if run.facts["source"] == "git" else "not of git"
    return (
        f"# {run.path.stem}\n\n{machine['device']}, {machine['threads']} threads; "
        f"commit {run.facts['commit']}, {state}; {passed}; {versions}.\n"
    )


def case_table(run: Run) -> str:
    """The four columns: case, ours, best peer, how many times longer the peer takes; the lowest ratio first."""
    rows = [
        (
            f"{row.task}: {row.case}",
            seconds_text(row.median),
            ABSENT if pd.isna(row.peer) else f"{row.peer}: {seconds_text(row.peer_median)}",
            ratio_text(row.peer_ratio),
        )
        for row in best_peers(run).itertuples()
    ]
    return table(("case", "ours", "best peer", "peer / ours"), rows)


def entry_table(run: Run) -> str:
    """Every entry outside a sweep; "less" marks one that does less than the task."""
    rows = [
        (
            f"{row.task}: {row.case}",
            f"{row.provider} (less)" if row.role == "bound" else row.provider,
            seconds_text(row.median),
            ratio_text(row.ratio),
            percent_text(row.roofline / row.median),
            bytes_text(row.memory),
        )
        for row in run.cases.itertuples()
    ]
    return table(("case", "entry", "time", "time / ours", "of the roofline", "extra memory"), rows)


def left_out(run: Run) -> list[str]:
    """What failed, what could not run here, and what an interrupted run did not come to."""
    return [
        f"{title}:\n\n{table(NAMES, [[one.get(name, '') for name in NAMES] for one in run.facts[key]])}"
        for title, key in (("Failed", "failed"), ("Skipped", "skipped"), ("Not reached", "not_reached"))
        if run.facts.get(key)
    ]


def plot(run: Run, path: Path) -> None:
    """Draws each case's providers by their time over that of ours, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = best_peers(run)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.32 * len(found)), layout="constrained")
    styles = {"peer": ("o", "peer"), "bound": ("|", "does less than the task"), "ours, plain": ("x", "our plain torch")}
    for role, (marker, label) in styles.items():
        entries = run.cases[run.cases["role"] == role].merge(found[CASE].assign(place=range(len(found))), on=CASE)
        axes.scatter(entries["ratio"], entries["place"], marker=marker, label=label, zorder=2)
    axes.axvline(1, color="black", label="ours")
    axes.set_yticks(range(len(found)), [f"{row.task}: {row.case}" for row in found.itertuples()], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"time over ours; {run.path.stem}, commit {str(run.facts['commit'])[:10]}")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


# What is refused, and what fell


def objections(run: Run) -> list[str]:
    """Returns why a file's figures are refused; each names the file."""
    facts, machine, tests = run.facts, run.facts["machine"], run.facts.get("tests") or {}
    on_cpu = machine["kind"] == "cpu"
    needed = ["tests"] if on_cpu else [path for folder in TEST_FOLDERS for path in gpu_test_files(folder)]
    found = {
        "no commit: expected a run inside a git checkout": facts["commit"] in (None, "unknown"),
        "measured with uncommitted changes": facts["dirty"],
        f"the machine was busy: {percent_text(machine.get('busy'))} of its processors": machine.get("busy", 0) > BUSY,
        "VGPO_BENCH_IMPL or TRITON_INTERPRET chose other kernels": machine["impl"] != "by device"
        or machine["interpreter"],
        f"{OURS} itself failed": any(one["provider"] == OURS for one in facts["failed"]),
        "the tests of that commit were not green: run `make test` before": not tests.get("green")
        or tests["dirty"]
        or tests["commit"] != facts["commit"],
        "the tests ran on another device": tests and (tests["device"] == "cpu") != on_cpu,
        "the tests did not cover every kernel": tests and not set(needed) <= set(tests["paths"]),
    }
    return [f"{run.path}: {why}" for why, holds in found.items() if holds]


def falls(run: Run, old: Run) -> list[str]:
    """Returns the peers whose ratio to ours fell by more than `FALL` since an older run, or is missing."""
    before, now = (
        one.entries[one.entries["role"].isin(["peer", "bound"])].set_index([*CASE, "provider"])["ratio"].dropna()
        for one in (old, run)
    )
    ratios = before.to_frame("before").join(now.rename("now"))
    fallen = ratios[~(ratios["now"] >= (1 - FALL) * ratios["before"])]
    return [f"{' | '.join(name)}: {row.before:.2f}x, now {ratio_text(row.now)}" for name, row in fallen.iterrows()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what is asked for; returns 2 if a file is refused or cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of `make bench`")
    parser.add_argument("--check", action="store_true", help="only say whether figures are refused")
    parser.add_argument("--against", type=Path, metavar="OLD", help="only say which ratios to peers fell since OLD")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the first file, too")
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(path) for path in options.files]
        if options.against:
            fallen = [line for run in runs for line in falls(run, read_run(options.against))]
            print(f"{len(fallen)} ratios to peers fell by more than {FALL:.0%} or are missing", *fallen, sep="\n  ")
            return 0
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if found := [why for run in runs for why in objections(run)]:
        print("Refused:", *found, sep="\n  ", file=sys.stderr)
        return 2
    if not options.check:
        print(*map(report, runs), sep="\n")
    if options.plot:
        plot(runs[0], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
