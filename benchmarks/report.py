"""`python benchmarks/report.py RESULTS.json ...`: the tables and pictures of what was measured.

The tables that README.md and docs/dev/performance.md show of these files are made anew, too.

Nothing is written of figures that cannot be reproduced: those of a tree with changes, or of a commit whose tests were
not green.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_bench import TEST_FOLDERS, gpu_test_files
from benchmarks.headlines import fill_pages
from benchmarks.report_text import report_text
from benchmarks.result_file import HEADLINE, Results, read_results
from tests.tools.working_tree import RESULTS, ROOT, read_working_tree

# The tests that say of every kernel measured that its results are right; on a GPU the files of them that run it.
NEEDED = tuple(f"tests/{folder}" for folder in TEST_FOLDERS)
COUNTS = ("passed", "failed", "errors", "skipped", "deselected")
NAMED = 8  # changed files that a refusal lists
RECORDED = ("commit", "dirty", "green", "paths", "device", *COUNTS)


def write_report(files: Sequence[Results], folder: Path) -> Path:
    """Writes `report.md` and its pictures.

    Args:
        files: each a machine.
        folder: is made where it is missing.

    Returns:
        The report's path.
    """
    from benchmarks.report_plots import draw  # which needs matplotlib, as a check does not

    folder.mkdir(parents=True, exist_ok=True)
    figures = {results.path: draw(results, folder) for results in files}
    report = folder / "report.md"
    report.write_text(report_text(files, figures, folder), encoding="utf-8")
    return report


def objections(results: Results) -> list[str]:
    """Returns why a file's figures cannot be reported; each names the file."""
    found = []
    if len(results.commits) > 1:
        found.append(f"entries of several commits: {', '.join(sorted(str(one) for one in results.commits))}")
    elif results.commit is None:
        found.append("no commit: expected a run inside a git checkout")
    if results.dirty and results.commit is not None:
        found.append("measured on a tree with uncommitted changes")
    if results.machine.get("impl", "by device") != "by device" or results.machine.get("interpreter"):
        found.append("VGPO_BENCH_IMPL or TRITON_INTERPRET had other kernels run than those that callers get")
    if wrong := [f"{one['task']}, {one['case']}" for one in results.failed if one["provider"] == HEADLINE]:
        found.append(f"{HEADLINE} itself failed: {'; '.join(wrong)}")
    found += _objections_to_tests(results)
    return [f"{results.path}: {objection}" for objection in found]


def _objections_to_tests(results: Results) -> list[str]:
    tests = results.tests
    if tests is None:
        return ["no record of the tests at that commit: run `make test` before the benchmarks"]
    if lacking := [name for name in RECORDED if name not in tests]:
        return [f"the record of the tests lacks {', '.join(lacking)}"]
    found = []
    if tests["commit"] != results.commit:
        found.append(f"tests ran at {tests['commit']}, the benchmarks at {results.commit}")
    if (tests["device"] == "cpu") != (results.machine["kind"] == "cpu"):
        found.append(f"tests ran on {tests['device']}, the benchmarks on {results.machine['device']}")
    if tests["dirty"]:
        found.append("tests ran on a tree with uncommitted changes")
    if not tests["green"]:
        counts = ", ".join(f"{tests[name]} {name}" for name in COUNTS)
        found.append(f"tests were not green: {counts}")
    needed = (
        NEEDED if results.machine["kind"] == "cpu" else [x for folder in TEST_FOLDERS for x in gpu_test_files(folder)]
    )
    if missing := [path for path in needed if not _covered(path, tests["paths"])]:
        found.append(f"tests did not cover {', '.join(missing)}")
    return found


def _covered(needed: str, paths: Sequence[str]) -> bool:
    return any(path == "." or needed == path or needed.startswith(f"{path}/") for path in paths)


def objections_to_tree(root: Path = ROOT) -> list[str]:
    """Returns why no report can be written from a checkout: what of it is changed, `benchmarks/results/` aside."""
    try:
        changed = read_working_tree(root).changed
    except ValueError as error:
        return [str(error)]
    if not changed:
        return []
    more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
    return [f"{root}: uncommitted changes: {', '.join(changed[:NAMED])}{more}"]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Writes the report, or says on stderr why not.

    Returns:
        0, or 2 where there is anything to object.
    """
    parser = argparse.ArgumentParser(prog="python benchmarks/report.py", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--output", type=Path, default=root / RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="only say whether a report would be written")
    options = parser.parse_args(arguments)
    found, files = objections_to_tree(root), []
    for path in options.results:
        try:
            files.append(read_results(path))
        except ValueError as error:
            found.append(str(error))
    found += [objection for results in files for objection in objections(results)]
    if len({path.stem for path in options.results}) < len(options.results):
        found.append("files of one name: expected each to name its machine, pictures are called after it")
    if found:
        print("No report:", *found, sep="\n  ", file=sys.stderr)
        return 2
    if options.check:
        print("A report would be written.")
    else:
        print(write_report(files, options.output), *fill_pages(files, root), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
