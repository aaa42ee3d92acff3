"""`pytest --record FILE` leaves what a session found, so that a report of measurements tells if tests were green."""

import json
import time
from collections.abc import Generator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.working_tree import WorkingTree, read_working_tree

_COUNTED = {"passed": "passed", "failed": "failed", "errors": "error", "skipped": "skipped", "deselected": "deselected"}
# With pytest-xdist only the workers see what was deselected, so what was asked for counts, too.
_NARROWING = {
    "keyword": "-k",
    "markexpr": "-m",
    "deselect": "--deselect",
    "ignore": "--ignore",
    "ignore_glob": "--ignore-glob",
    "lf": "--last-failed",
    "stepwise": "--stepwise",
    "setuponly": "--setup-only",
    "setupplan": "--setup-plan",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="write what the session found to FILE, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Records in the process that sees all results, not in pytest-xdist's workers."""
    if config.option.record and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(config))


class _Recorder:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._file = config.invocation_params.dir / config.option.record
        # A session that is killed must not leave an earlier one's record.
        self._file.unlink(missing_ok=True)
        self._tree = self._read_tree()
        self._start = time.monotonic()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, Any, Any]:
        result = yield  # other plugins may still change the exit status
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self._record(int(session.exitstatus)), indent=1) + "\n", encoding="utf-8")
        return result

    def _record(self, exit_status: int) -> dict[str, Any]:
        stats = self._config.pluginmanager.getplugin("terminalreporter").stats
        counts = {name: len(stats.get(key, ())) for name, key in _COUNTED.items()}
        narrowed = [flag for option, flag in _NARROWING.items() if getattr(self._config.option, option, None)]
        whole = not counts["deselected"] and not narrowed
        after = self._read_tree()
        return {
            "commit": self._tree.commit,
            # A tree that changed while tests ran was tested in part.
            "dirty": self._tree.dirty or after != self._tree,
            "green": exit_status == 0 and counts["passed"] > 0 and whole,
            **counts,
            "narrowed": narrowed,
            "paths": [self._relative(path) for path in self._config.args],
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - self._start, 1),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def _relative(self, argument: str) -> str:
        """A path as it is called from the root, a test's `::name` kept."""
        path, *name = argument.split("::")
        whole = (self._config.invocation_params.dir / path).resolve()
        root = self._config.rootpath.resolve()
        return "::".join([whole.relative_to(root).as_posix() if whole.is_relative_to(root) else str(whole), *name])

    def _read_tree(self) -> WorkingTree:
        try:
            return read_working_tree(self._config.rootpath)
        except ValueError as error:
            raise pytest.UsageError(f"--record: {error}") from error
