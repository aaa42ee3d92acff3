"""Tries the tiles in the kernels' `configs`: `python -m benchmarks.tune [--kernel NAME] [--compile-only]`.

Every candidate is compiled ahead of time, which needs no GPU. On a GPU, those that compile well are held to the present
choice's error against float64, then timed in turns with it: the whole call that launches the kernel, at the paper's
cases 1 and 4.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import tune_timing
from benchmarks.harness import provenance as machine
from benchmarks.tune_timing import Timing
from vgpo_kernels import _compile, _tuning
from vgpo_kernels._compile import Attempt, Row

WRONG = "WRONG: "


@dataclass
class Result:
    """What came of tiles on a target.

    Args:
        attempt: the tiles.
        present: they are the kernel's choice there.
        row: what they compile to.
        error: why they were not timed, or None.
        seconds: median by case, empty where nothing was timed.
        ratios: of those to the present choice's; below 1 is faster.
    """

    attempt: Attempt
    present: bool
    row: Row
    error: str | None
    seconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def order(self) -> tuple[float, bool]:
        """Sorts the best first, the present choice before its equals, what was not timed last."""
        return (statistics.geometric_mean(self.ratios.values()) if self.ratios else float("inf"), not self.present)

    def record(self) -> dict[str, Any]:
        """Returns what is written to a file."""
        usage = {name: getattr(self.row, name) for name in _compile.COLUMNS}
        names = {"kernel": self.attempt.config.kernel, "target": self.attempt.target, "tiles": self.attempt.tiles}
        rest = {"error": self.error, "seconds": self.seconds, "ratios": self.ratios}
        return {**names, "present": self.present, **usage, **rest}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table a kernel and target; returns 1 where the present choice fails or a result is wrong."""
    options = parser().parse_args(arguments)
    if found := _compile.obstacle():
        print(found, file=sys.stderr)
        return 2
    configs = [config for name, config in _tuning.configs().items() if options.kernel in (None, name)]
    timing = _timing(options.seconds) if torch.cuda.is_available() and not options.compile_only else None
    if timing is None:
        print(f"Compiled only: {'so asked for' if options.compile_only else 'there is no GPU'}.")
    targets = options.target or ([timing.target] if timing else list(_compile.TARGETS))
    results: list[Result] = []
    for kernel_results in tuned(configs, targets, timing, options.jobs):
        print(table(kernel_results), flush=True)
        results += kernel_results
        if options.json:  # at every step: a run that is cut short keeps what it found
            options.json.write_text(json.dumps(report(results, timing), indent=1) + "\n")
    return int(any(failed(result, compile_only=timing is None) for result in results))


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    made = argparse.ArgumentParser(prog="tune.py", description=__doc__)
    made.add_argument("--kernel", choices=_tuning.configs(), metavar="NAME", help="one kernel, as `configs` calls it")
    made.add_argument("--target", nargs="+", choices=_compile.TARGETS, help="default: the GPU's, or without one all")
    made.add_argument("--compile-only", action="store_true", help="time nothing; fail where a candidate spills")
    made.add_argument("--seconds", type=float, default=0.5, metavar="N", help="to time each candidate and case for")
    made.add_argument("--jobs", type=int, default=_compile.usable_cores(), metavar="N", help="processes that compile")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    return made


def _timing(seconds: float) -> Timing:
    from vgpo_kernels._triton import target_of

    device = torch.device("cuda", 0)
    return Timing(device, target_of(torch.empty(0, device=device)), seconds)


def failed(result: Result, *, compile_only: bool) -> bool:
    """Whether the run has found a fault: one candidate less is none, unless that is all that was asked."""
    return result.error is not None and (compile_only or result.present or result.error.startswith(WRONG))


def tuned(
    configs: Sequence[_tuning.Config], targets: Sequence[str], timing: Timing | None, jobs: int
) -> Iterator[list[Result]]:
    """Yields the results of each kernel on each target, the best first."""
    groups = [_compile.attempts(config, target) for config, target in itertools.product(configs, targets)]
    rows = _compile.attempted_rows([attempt for group in groups for attempt in group], jobs)
    if timing is not None:
        rows = iter(list(rows))  # nothing compiles while the clock runs
    for group in groups:
        results = [
            Result(attempt, present=not index, row=row, error=row.error)
            for index, (attempt, row) in enumerate(zip(group, rows, strict=False))
        ]
        if timing is not None and group[0].target == timing.target:
            time_them(results, timing)
        yield sorted(results, key=lambda result: result.order)


def time_them(results: Sequence[Result], timing: Timing) -> None:
    """Fills in the times of one kernel's results, the present choice's first, or why there are none."""
    if results[0].error is not None:
        return
    kernel = results[0].attempt.config.kernel
    task = tune_timing.task_named(tune_timing.TASK_OF[kernel])
    running = {str(index): result for index, result in enumerate(results) if result.error is None}
    tiles = {name: result.attempt.tiles for name, result in running.items()}
    wrong = tune_timing.objections(kernel, task, tune_timing.checked_case(task), tiles, timing.device)
    for name, why in wrong.items():
        running[name].error = f"{WRONG}{why}"
        del tiles[name]
    if results[0].error is not None:
        return
    for case in tune_timing.timed_cases(task):
        try:
            samples = tune_timing.seconds_of(kernel, task, case, tiles, timing)
        except torch.OutOfMemoryError:
            print(f"{kernel}: out of memory at case {case.name}")
            continue
        medians = {name: statistics.median(times) for name, times in samples.items()}
        for name, median in medians.items():
            running[name].seconds[case.name] = median
            running[name].ratios[case.name] = median / medians["0"]
        torch.cuda.empty_cache()


def table(results: Sequence[Result]) -> str:
    """Returns the results of one kernel on one target as text; a star marks the present choice."""
    attempt = results[0].attempt
    first = next(result for result in results if result.present)
    names = list(dict.fromkeys(name for result in (first, *results) for name in result.attempt.tiles))
    timed = [column for case in first.seconds for column in (f"case {case.split(':')[0]}, ms", "ratio")]
    lines = [["", *names, *_compile.COLUMNS, *timed]]
    for result in results:
        usage = [getattr(result.row, column) for column in _compile.COLUMNS]
        times = [
            text
            for case in first.seconds
            for text in (_number(result.seconds.get(case), 1e3, 4), _number(result.ratios.get(case), 1, 3))
        ]
        cells = ["*" if result.present else "", *map(result.attempt.tiles.get, names), *usage, *times]
        lines.append(["-" if cell is None else str(cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [f"\n{attempt.config.kernel} on {attempt.target}, compiled as {attempt.config.case}"]
    for line, error in zip(lines, ["", *(result.error or "" for result in results)], strict=True):
        text.append("  ".join([*map(str.rjust, line, widths), error]).rstrip())
    return "\n".join(text)


def _number(value: float | None, scale: float, digits: int) -> str | None:
    return None if value is None else f"{value * scale:.{digits}f}"


def report(results: Sequence[Result], timing: Timing | None) -> dict[str, Any]:
    """Returns what is written to a file: all results, the machine, versions and commit."""
    device = torch.device("cpu") if timing is None else timing.device
    facts = {"machine": machine.description(device), "versions": machine.versions(), **machine.checkout()}
    return {**facts, "timed": timing is not None, "results": [result.record() for result in results]}


if __name__ == "__main__":
    sys.exit(main())
