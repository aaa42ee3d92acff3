"""`pytest benchmarks --benchmark-only`: which cases run, and how what was measured reaches pytest-benchmark."""

import json
import os
from collections import deque
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import provenance
from benchmarks.harness.cases import LEVELS, Case, Task
from benchmarks.harness.measure import Outcome, measure
from benchmarks.harness.timing import give_memory_back, keep_memory
from tests.tools.working_tree import ROOT

CHOICES = {level: (level,) for level in LEVELS} | {"all": ("small", "paper")}
# A run that leaves the checkout alone names another place for the tests' record.
TESTS_RECORD = Path(os.environ.get("VGPO_TESTS_RECORD", ROOT / ".tests.json"))
pytest_plugins = ["tests.tools.cuda_faults"]

OUTCOMES, SESSION = pytest.StashKey[dict](), pytest.StashKey[pytest.Session]()
SKIPPED, FAILED = pytest.StashKey[list](), pytest.StashKey[list]()
CHECKOUT = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases",
        choices=CHOICES,
        default="small",
        help="small: what ends in minutes on this machine (default); paper: the paper's models, which want a GPU; "
        "all: both; tiny: seconds, to try the benchmarks themselves",
    )


def device() -> torch.device:
    """Returns the GPU where there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES], config.stash[SKIPPED], config.stash[FAILED] = {}, [], []
    keep_memory()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[SESSION], session.config.stash[CHECKOUT] = session, provenance.checkout()


def pytest_report_header() -> list[str]:
    """Says what the figures will depend on, and what a report of them would miss."""
    facts, state = provenance.description(device()), provenance.checkout()
    tests = tests_record(state["commit"])
    green = (
        "no record of its tests (make test leaves one)" if tests is None else f"its tests are green: {tests['green']}"
    )
    kernels = facts["native"] if device().type == "cpu" else "Triton"
    return [
        f"benchmarks: {facts['device']}, {facts['threads']} threads, kernels: {kernels}, busy: {facts['busy']:.0%}",
        f"checkout: {'with uncommitted changes' if state['dirty'] else 'clean'}, {green}",
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes an entry of each provider of each case that `--cases` asks for."""
    marker = metafunc.definition.get_closest_marker("task")
    if marker is None:
        return
    chosen = marker.args[0].chosen(CHOICES[metafunc.config.getoption("cases")], device().type)
    metafunc.parametrize(("case", "provider"), [pytest.param(*one, id=f"{one[0].name}-{one[1]}") for one in chosen])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each entry a clock of its own, which tells pytest-benchmark the times that were measured in turns.

    Main cases come before unusual rows, and these before sweeps: a run that is cut has the most of it.
    """
    items.sort(key=_importance)
    for item in items:
        if item.get_closest_marker("task"):
            item.add_marker(pytest.mark.benchmark(timer=Replay().read))


def _importance(item: pytest.Item) -> int:
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return 0 if case is None or case.providers is None else 1 if case.axis is None else 2


class Replay:
    """A clock that shows what it was given: 0 before a round, its seconds after it."""

    def __init__(self) -> None:
        self.times: deque[float] = deque()

    def read(self) -> float:
        return self.times.popleft()


@dataclass
class Entry:
    """One provider of one case."""

    task: Task
    case: Case
    provider: str
    request: pytest.FixtureRequest
    benchmark: Any

    def measure(self) -> None:
        """Reports what was measured of this provider; the first entry of a case measures all of them."""
        outcome = self._outcome()
        facts, stash = named(self.request.node), self.request.config.stash
        if outcome.skipped is not None:
            stash[SKIPPED].append(facts | {"reason": outcome.skipped})
            pytest.skip(outcome.skipped)
        if outcome.wrong is not None:
            stash[FAILED].append(facts | {"reason": outcome.wrong})
            pytest.fail(f"{self.provider}: {outcome.wrong}", pytrace=False)
        self.benchmark.group = f"{self.task.name} | {self.case.name}"
        self.benchmark.extra_info |= outcome.info
        clock = self.request.node.get_closest_marker("benchmark").kwargs["timer"].__self__
        clock.times.extend(time for seconds in outcome.samples for time in (0.0, seconds))
        self.benchmark.pedantic(lambda: None, rounds=max(1, len(outcome.samples)), iterations=1)

    def _outcome(self) -> Outcome:
        outcomes, module = self.request.config.stash[OUTCOMES], self.request.module.__name__
        group = (self.task.name, self.case.name)
        if (*group, self.provider) not in outcomes:
            found = measure(self.task, self.case, self._selected(), device(), module, timed=not self.benchmark.disabled)
            outcomes |= {(*group, name): outcome for name, outcome in found.items()}
            give_memory_back()
            torch._dynamo.reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return outcomes[(*group, self.provider)]

    def _selected(self) -> list[str]:
        """Returns the providers of this case among the entries that run."""
        items = [item for item in self.request.session.items if item.get_closest_marker("task")]
        return [item.callspec.params["provider"] for item in items if item.callspec.params["case"] is self.case]


def named(item: pytest.Item) -> dict[str, str]:
    """Returns the names of an entry's task, case and provider."""
    case, provider = (item.callspec.params[name] for name in ("case", "provider"))
    return {"task": item.get_closest_marker("task").args[0].name, "case": case.name, "provider": provider}


@pytest.fixture
def entry(request: pytest.FixtureRequest, case: Case, provider: str, benchmark: Any) -> Entry:
    """One provider of one case of the task that marks the test."""
    return Entry(request.node.get_closest_marker("task").args[0], case, provider, request, benchmark)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:  # noqa: ARG001
    """Leaves of each entry what a report needs, and says once where all of them come from."""
    measured = [
        one["extra_info"] | {name: one["stats"][name] for name in ("median", "iqr", "rounds")}
        for one in output_json["benchmarks"]
    ]
    output_json.clear()
    output_json |= record(config, measured)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the same of a session that has measured nothing, of which pytest-benchmark writes no file."""
    file = session.config.getoption("benchmark_json", None)
    if file is not None and not session.config._benchmarksession.benchmarks and hasattr(session, "items"):
        path = file if isinstance(file, Path) else Path(file.name)  # older ones of pytest-benchmark open it
        path.write_text(json.dumps(record(session.config, []), indent=1) + "\n")


def record(config: pytest.Config, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the content of the file: where figures come from, the entries, and those that are missing, and why."""
    skipped, failed, before = config.stash[SKIPPED], config.stash[FAILED], config.stash[CHECKOUT]
    names = ("task", "case", "provider")
    known = {tuple(one[name] for name in names) for one in (*measured, *skipped, *failed)}
    asked = [named(item) for item in config.stash[SESSION].items if item.get_closest_marker("task")]
    return {
        "machine": provenance.description(device()),
        "versions": provenance.versions(),
        **before,
        "dirty": before["dirty"] or provenance.checkout() != before,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "tests": tests_record(before["commit"]),
        "skipped": skipped,
        "failed": failed,
        "not_reached": [one for one in asked if tuple(one.values()) not in known],
        "entries": measured,
    }


def tests_record(commit: str | None) -> dict[str, Any] | None:
    """Returns what the tests of this commit left behind (`make test`), or None if they have not run."""
    if not TESTS_RECORD.exists():
        return None
    found = json.loads(TESTS_RECORD.read_text())
    return found if found.get("commit") == commit else None
