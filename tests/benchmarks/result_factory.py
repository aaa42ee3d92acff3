"""Files of results as the benchmarks write them, made from a few figures a test plants."""

import json
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + 34 * "0"
MACHINE = {
    **{"device": "A processor", "kind": "cpu", "driver": None, "cpu": "A processor", "threads": 2},
    **{"impl": "by device", "interpreter": False, "busy": 0.01},
}


def entry(
    task: str,
    provider: str,
    role: str,
    median: float,
    *,
    case: str = "one case",
    length: int | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """One entry; `length` makes it a point of a sweep over T."""
    case, axis = (case, None) if length is None else (f"T {length}", ["T", length])
    work = {"flops": 1e8, "bytes": 1e7, "roofline": 1e-3, "bound_by": "flops"}
    names = {"task": task, "case": case, "levels": ["small"], "axis": axis, "provider": provider, "role": role}
    rest = {"memory": 1_000_000, "median": median, "iqr": median / 50, "rounds": 20}
    return names | work | {"ceilings": {"tflops": 0.1, "gbs": 10.0}} | rest | facts


def green_tests(**changes: Any) -> dict[str, Any]:
    """What a green `make test` leaves."""
    counts = {"passed": 900, "failed": 0, "errors": 0, "skipped": 3, "deselected": 0}
    record = {"commit": COMMIT, "dirty": False, "green": True, "paths": ["tests"], "device": "cpu", "torch": "2.13.0"}
    return record | counts | changes


def write_results(path: Path, entries: list[dict[str, Any]], **changes: Any) -> Path:
    """Writes a file of these entries, of a clean commit whose tests were green unless `changes` says otherwise."""
    origin = {"machine": MACHINE, "versions": {"torch": "2.13.0"}, "commit": COMMIT, "dirty": False, "source": "git"}
    rest = {"tests": green_tests(), "skipped": [], "failed": [], "not_reached": []}
    path.write_text(json.dumps(origin | rest | {"entries": entries} | changes))
    return path
