"""Looks into the kernel that is farthest from the machine's ceiling: `python -m benchmarks.worst FOLDER ...`.

The folders hold `small.json` or `paper.json` of a run of the benchmarks; the first that has a file gives it. With ncu
on the PATH the kernel's call is profiled into the first folder; registers and shared memory are printed in any case.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import tune_timing
from benchmarks.harness.cases import OURS as OUR_PROVIDER
from benchmarks.report import read_run
from vgpo_kernels import _compile, _tuning

FILES = ("small.json", "paper.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what is worst and what its kernels take; returns 1 where a part of that fails, 2 without results."""
    parser = argparse.ArgumentParser(prog="worst.py", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--call", nargs=2, metavar=("TASK", "CASE"), help="only make that call, for a profiler")
    options = parser.parse_args(arguments)
    if options.call:
        call(*options.call)
        return 0
    entry = worst(entries(options.folders))
    if entry is None:
        named = ", ".join(map(str, options.folders))
        print(f"{named}: expected entries of ours in {' or '.join(FILES)}, found none", file=sys.stderr)
        return 2
    print(f"{entry.task} | {entry.case}: {entry.roofline / entry.median:.1%} of the machine's ceiling")
    compiled = resources(entry.task)
    profiled = profile(entry, options.folders[0] / "worst.ncu-rep") if torch.cuda.is_available() else 0
    return int(bool(compiled or profiled))


def entries(folders: Sequence[Path]) -> list[Any]:
    """Returns the entries of the files that there are; one that cannot be read says so and is left out."""
    found = []
    for name in FILES:
        path = next((folder / name for folder in folders if (folder / name).exists()), None)
        if path is None:
            continue
        try:
            found += read_run(path).cases.itertuples()
        except ValueError as error:
            print(error, file=sys.stderr)
    return found


def worst(found: Iterable[Any]) -> Any | None:
    """Returns the entry of ours with the lowest fraction of the ceiling; sweeps and whole training steps aside."""
    ours = (entry for entry in found if entry.role == "ours" and entry.axis is None and entry.task != "training step")
    return min(ours, key=lambda entry: entry.roofline / entry.median, default=None)


def call(task_name: str, case_name: str) -> None:
    """Makes a task's call twice, the second time for a profiler that waits for the start of its range."""
    device = torch.device("cuda", 0)
    task = tune_timing.task_named(task_name)
    inputs = task.inputs(task.case(case_name, device.type), device)
    task.providers[OUR_PROVIDER].run(inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    task.providers[OUR_PROVIDER].run(inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profile(entry: Any, report: Path) -> int:
    """Writes ncu's report of the entry's call and prints it; returns ncu's exit status, 0 where it is not installed."""
    ncu = shutil.which("ncu")
    if ncu is None:
        print("ncu is not on the PATH: no profile")
        return 0
    this = [sys.executable, __file__, str(report.parent), "--call", entry.task, entry.case]
    # By default ncu locks the clocks, which a shared GPU forbids.
    options = ["--set", "full", "--clock-control", "none", "--profile-from-start", "off"]
    options += ["--force-overwrite", "--export", str(report)]
    status = subprocess.run([ncu, *options, *this]).returncode
    return status or subprocess.run([ncu, "--import", str(report), "--page", "details"]).returncode


def resources(task_name: str) -> int:
    """Prints what the task's tunable kernels compile to for the GPU here, or all kernels where it has none."""
    from vgpo_kernels._triton import target_of

    device = "cuda" if torch.cuda.is_available() else "cpu"
    configs = _tuning.configs()
    names = {configs[kernel].case for kernel, task in tune_timing.TASK_OF.items() if task == task_name}
    cases = _compile.all_cases()
    kernels = [case.kernel for case in cases if case.name in names]
    wanted = [case for case in cases if case.kernel in kernels] or cases
    target = target_of(torch.empty(0, device=device))
    return _compile.run(argparse.Namespace(target=[target], kernel=None, json=None), wanted)


if __name__ == "__main__":
    sys.exit(main())
