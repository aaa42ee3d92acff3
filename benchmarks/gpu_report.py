"""`python -m benchmarks.gpu_report FOLDER ...`: what `scripts/gpu_bench.sh` left, beside predictions.

Made from these files alone. It names card, clocks, power, versions and commit, and refuses nothing: red tests, changed
files and an unknown commit are said in its first lines. Figures for other pages come from `report.py`, which refuses.
"""

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.predictions import DEVICE, PEAKS, PREDICTIONS, Prediction
from benchmarks.report import (
    ABSENT,
    Run,
    case_table,
    entry_table,
    left_out,
    percent_text,
    read_run,
    seconds_text,
    table,
)

UNJUDGED = "not judged"
STEP = re.compile(r"(?P<name>\w+/[^:]+?) +\d+ +\d+  (?P<result>\S.*)")  # as `gpu_bench` writes it into a summary
SUMMARY_HEAD = ["step", "seconds", "limit", "result"]


@dataclass
class Found:
    """What the folders hold, each kind in the order of the arguments.

    Args:
        results: files of the benchmarks.
        tests: records of tests.
        tiles: results of `tune.py`.
        clocks: seconds of the epoch, MHz of the multiprocessors, watts.
        summaries: what the script said of its steps.
        unreadable: files that are none of these, and why.
    """

    results: list[Run] = field(default_factory=list)
    tests: list[Mapping[str, Any]] = field(default_factory=list)
    tiles: list[Mapping[str, Any]] = field(default_factory=list)
    clocks: list[tuple[float, float, float]] = field(default_factory=list)
    summaries: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def find(paths: Iterable[Path]) -> Found:
    """Reads files and the files of folders, each by its content."""
    found = Found()
    files = (one for path in paths for one in (sorted(path.iterdir()) if path.is_dir() else [path]))
    for path in files:
        try:
            if path.suffix == ".json":
                _sort(path, found)
            elif path.name == "clocks.csv":
                found.clocks += clocks_of(path.read_text(encoding="utf-8"))
            elif path.name == "summary.txt":
                found.summaries.append(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            found.unreadable.append(str(error))
    return found


def _sort(path: Path, found: Found) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if "green" in content:
        found.tests.append(content)
    elif "timed" in content:
        found.tiles.append(content)
    else:
        found.results.append(read_run(path))


def clocks_of(text: str) -> list[tuple[float, float, float]]:
    """Returns time, clock and power of each line that has them; nvidia-smi may say that it does not know one."""
    rows = []
    for row in csv.DictReader(text.splitlines()):
        try:
            rows.append((float(row["epoch_seconds"]), float(row["sm_mhz"]), float(row["power_w"])))
        except (KeyError, TypeError, ValueError):
            continue
    return rows


def during(clocks: Sequence[tuple[float, float, float]], entry: Any) -> tuple[str, str]:
    """Returns the median clock, with its range, and the median power while an entry's case was timed."""
    when = getattr(entry, "when", None)
    rows = [row for row in clocks if isinstance(when, list) and when[0] <= row[0] <= when[1]]
    if not rows:
        return ABSENT, ABSENT
    sm, watts = ([row[column] for row in rows] for column in (1, 2))
    return f"{statistics.median(sm):.0f} MHz ({min(sm):.0f} to {max(sm):.0f})", f"{statistics.median(watts):.0f} W"


def text(found: Found) -> str:
    """Returns the report."""
    parts = ["# On a GPU\n", "\n".join([*origin(found), *steps(found.summaries)] or ["- **no results**"]) + "\n"]
    if found.results:
        parts += ["## Beside predictions\n", READING, table(PREDICTION_HEAD, prediction_rows(found))]
    parts += tiles_text(found.tiles)
    if found.summaries:
        parts += ["## Steps\n", *(f"```text\n{summary.strip()}\n```\n" for summary in found.summaries)]
    for results in found.results:
        parts += [f"## {results.path.name}\n", case_table(results), entry_table(results), *left_out(results)]
    return "\n".join(parts)


def origin(found: Found) -> list[str]:
    """Says on which machine and of which commit, and everything that is wrong with that."""
    lines = [f"- not read: {why}" for why in found.unreadable]
    for results in found.results:
        facts, machine = results.facts, results.facts["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        commit = "**unknown**" if facts["commit"] in (None, "unknown") else facts["commit"]
        clean = "clean" if facts["source"] == "git" else "not of git"
        state = "**with uncommitted changes**" if facts["dirty"] else clean
        card = machine["device"] if machine["kind"] == "cuda" else "**no GPU**"
        lines.append(
            f"- {results.path.name}: {card}, driver {machine.get('driver') or 'unknown'}, "
            f"CUDA {machine.get('cuda') or 'unknown'}, {machine['cpu']}, {machine['threads']} threads; {versions}; "
            f"commit {commit}, {state}"
        )
    if found.clocks:
        sm, watts = ([row[column] for row in found.clocks] for column in (1, 2))
        lines.append(f"- clocks: {min(sm):.0f} to {max(sm):.0f} MHz, {min(watts):.0f} to {max(watts):.0f} W")
    else:
        lines.append("- clocks: **not noted**")
    for record in found.tests:
        counts = ", ".join(f"{record[name]} {name}" for name in ("passed", "failed", "errors", "skipped"))
        where = f"on {record['device']}, commit {record['commit']}"
        lines.append(f"- tests: {'green' if record['green'] else '**red**'}, {counts}, {where}")
    return lines


def steps(summaries: Iterable[str]) -> list[str]:
    """Returns how many steps did well, which did not, by what came of them, and whether a call was killed."""
    kinds = ("well", "left out", "out of time", "interrupted", "not begun", "failed")
    named: dict[str, list[str]] = {kind: [] for kind in kinds}
    begun, ended = 0, 0
    for line in "\n".join(summaries).splitlines():
        if step := STEP.match(line):
            kind = next((kind for kind in kinds if step["result"].startswith(kind)), "failed")
            named[kind].append(step["name"])
        begun += line.split() == SUMMARY_HEAD
        ended += line.startswith("of ") and line.endswith("did not begin")
    parts = [
        f"{len(names)} {kind}" + (f" ({', '.join(names)})" if kind != "well" else "")
        for kind, names in named.items()
        if names
    ]
    killed = f"; **{begun - ended} of {begun} calls did not end by themselves**" if ended < begun else ""
    return [f"- steps: {', '.join(parts)}{killed}"] if begun else []


READING = (
    f"The peak is that of an {DEVICE}: {PEAKS['flops'] / 1e12:.0f} TFLOP/s of bf16 products, {PEAKS['bytes'] / 1e12} "
    "TB/s. The ceiling is what a large product or a large copy reached in the same process. Predictions are made from "
    f"compiled code; a figure is held to them on an {DEVICE} alone.\n"
)
PREDICTION_HEAD = (
    *("kernel", "case", "file", "time", "rate", "of the peak", "predicted", "of the ceiling", "predicted", "is"),
    *("clock", "power", "note"),
)


def prediction_rows(found: Found) -> list[list[str]]:
    """Returns a row for each prediction and each case that shows it, or one that says that none does."""
    rows = []
    for prediction in PREDICTIONS:
        measured = [
            (results, entry)
            for results in found.results
            if prediction.by_call
            for entry in results.cases.itertuples()
            if (entry.task, entry.provider) == (prediction.task, prediction.provider)
        ]
        rows += [_prediction_row(prediction, *one, found.clocks) for one in measured]
        if not measured:
            why = "not measured" if prediction.by_call else "a profiler shows it"
            row = dict.fromkeys(range(len(PREDICTION_HEAD)), ABSENT)
            row |= {0: prediction.task, 6: _range(prediction, 1), 9: why, 12: prediction.note}
            rows.append(list(row.values()))
    return rows


def _prediction_row(
    prediction: Prediction, results: Run, entry: Any, clocks: Sequence[tuple[float, float, float]]
) -> list[str]:
    peak = PEAKS[prediction.bound]
    name, unit, unit_name = {"flops": ("tflops", 1e12, "TFLOP/s"), "bytes": ("gbs", 1e9, "GB/s")}[prediction.bound]
    rate, ceiling = getattr(entry, prediction.bound) / entry.median, entry.ceilings[name] * unit
    share = rate / peak
    verdict = "below" if share < prediction.low else "above" if share > prediction.high else "as predicted"
    judged = DEVICE in results.facts["machine"]["device"]
    return [
        *(entry.task, entry.case, results.path.name, seconds_text(entry.median), f"{rate / unit:.3g} {unit_name}"),
        *(percent_text(share), _range(prediction, 1)),
        *(percent_text(rate / ceiling), _range(prediction, peak / ceiling) if judged else ABSENT),
        verdict if judged else UNJUDGED,
        *during(clocks, entry),
        prediction.note,
    ]


def _range(prediction: Prediction, times: float) -> str:
    return f"{100 * times * prediction.low:.0f} to {100 * times * prediction.high:.0f}%"


def tiles_text(files: Iterable[Mapping[str, Any]]) -> list[str]:
    """Says of each kernel whose tiles were timed how the best compare with the present choice."""
    rows = []
    for file in files:
        kernels = dict.fromkeys(result["kernel"] for result in file["results"])
        for kernel in kernels:
            tried = [result for result in file["results"] if result["kernel"] == kernel]
            wrong = sum(result["error"] is not None for result in tried)
            timed = [result for result in tried if result["ratios"]]
            if not timed:
                rows.append([kernel, ABSENT, ABSENT, ABSENT, f"none of {len(tried)} timed, {wrong} refused"])
                continue
            best = min(timed, key=lambda result: statistics.geometric_mean(result["ratios"].values()))
            present = next((result["tiles"] for result in timed if result["present"]), {})
            ratios = ", ".join(f"{case.split(':')[0]}: {ratio:.3f}" for case, ratio in best["ratios"].items())
            rows.append(
                [kernel, _tiles(present), _tiles(best["tiles"]), ratios, f"{len(timed)} timed, {wrong} refused"]
            )
    head = ("kernel", "present tiles", "best tiles", "best's time over the present's, by case", "candidates")
    return ["## Tiles\n", table(head, rows)] if rows else []


def _tiles(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or ABSENT


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report, or writes it; returns 2 if there is nothing to report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="FOLDER", help="that gpu_bench.sh wrote to, or files")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    options = parser.parse_args(arguments)
    found = find(options.paths)
    if not (found.results or found.tests or found.tiles or found.summaries):
        named = ", ".join(map(str, options.paths))
        print(f"{named}: expected files of scripts/gpu_bench.sh, found none", *found.unreadable, file=sys.stderr)
        return 2
    if options.output is None:
        print(text(found))
    else:
        options.output.write_text(text(found) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
