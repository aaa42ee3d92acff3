"""Files of results as the benchmarks write them, made from a few figures a test plants."""

import json
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + 34 * "0"
MACHINE = {"device": "A processor", "kind": "cpu", "driver": None, "cpu": "A processor", "threads": 2}
CEILINGS = {"tflops": 0.1, "gbs": 10.0}


def entry(
    room: str,
    provider: str,
    role: str,
    seconds: float,
    *,
    case: str = "one case",
    floor: float = 1e-3,
    memory: int = 1_000_000,
    moved: float = 1e7,
    length: int | None = None,
    device: str = "A processor",
    **facts: Any,
) -> dict[str, Any]:
    """One entry; `length` makes it a point of a sweep over T."""
    case = case if length is None else f"{case}, T {length}"
    extra = {
        "task": room,
        "case": case,
        "levels": ["small", "paper"],
        "provider": provider,
        "role": role,
        "dtype": "float32",
        "shapes": {"q": [1, 2, 500, 64]},
        "work": {"flops": floor * CEILINGS["tflops"] * 1e12, "bytes": moved},
        "floor": floor,
        "bound_by": "flops",
        "achieved": {"tflops": floor / seconds * CEILINGS["tflops"], "gbs": moved / seconds / 1e9},
        "ceilings": CEILINGS,
        "memory": {"peak_extra_bytes": memory, "how": "RSS peak of a fresh process over its inputs"},
        "axis": length and {"name": "T", "value": length},
        "machine": MACHINE | {"device": device},
        "versions": {"torch": "2.13.0"},
        "commit": COMMIT,
        "dirty": False,
        "commit_from": "git",
    }
    stats = {"median": seconds, "iqr": seconds / 50, "rounds": 20}
    return {
        "name": f"test[{case}-{provider}]",
        "group": f"{room} | {case}",
        "stats": stats,
        "extra_info": extra | facts,
    }


def green_tests(**changes: Any) -> dict[str, Any]:
    """What a green `make test` leaves."""
    counts = {"passed": 900, "failed": 0, "errors": 0, "skipped": 3, "deselected": 0}
    record = {"commit": COMMIT, "dirty": False, "green": True, "paths": ["tests"], "device": "cpu", "torch": "2.13.0"}
    return record | counts | changes


def write_results(path: Path, entries: list[dict[str, Any]], **changes: Any) -> Path:
    """Writes a file of these entries, of a clean commit whose tests were green unless `changes` says otherwise."""
    commit_info = {"id": COMMIT, "dirty": False}
    content = {"commit_info": commit_info, "benchmarks": entries, "skipped": [], "tests": green_tests()}
    path.write_text(json.dumps(content | changes))
    return path
