"""How `gpu_bench` runs a step: a process of its own, until its limit, with the GPU's clocks noted beside it."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

GRACE = 15  # seconds that a step has to write what it has, from the interrupt to the end
TAIL = 8  # lines of a failed step that the end of the summary shows
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "utilization.gpu")
CLOCKS_HEAD = ("epoch_seconds", "step", "sm_mhz", "memory_mhz", "power_w", "power_limit_w", "celsius", "utilization")
PYTEST_END = re.compile(r"=+ (.* in [\d.]+s.*?) =+$")  # the last line of a session: its counts
STOPPED: list[str] = []  # signals that end the call before its time


def stop_at_signals() -> None:
    """Has SIGINT, SIGTERM or SIGHUP end the step that runs and begin no other; all is written as at the deadline.

    A background job ignores SIGINT, and its children would, too; one of nohup goes on ignoring SIGHUP.
    """
    hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    for number in (signal.SIGINT, signal.SIGTERM, *hung_up):
        signal.signal(number, lambda number, _: STOPPED.append(signal.Signals(number).name))


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name: STAGE/STEP.
        command: what it runs.
        seconds: about how long it takes at most on the GPU that the stages were planned for; its share of a call.
        environment: variables on top of those of the call.
        part: the JSON that it leaves, one of the parts of its stage's file.
        left_out: why it is not run, or None.
    """

    name: str
    command: Sequence[str]
    seconds: int
    environment: Mapping[str, str] = field(default_factory=dict)
    part: Path | None = None
    left_out: str | None = None

    @property
    def stage(self) -> str:
        return self.name.split("/")[0]


@dataclass(frozen=True)
class Outcome:
    """What came of a step: whether it did well, the word for it, and the last lines of what it printed."""

    well: bool
    result: str
    lines: Sequence[str] = ()


def run(step: Step, limit: float, log: Path) -> Outcome:
    """Runs a step in a process group of its own and adds what it prints to the log.

    After `limit` seconds, or once the call is `STOPPED`, the group is interrupted, so that pytest writes what it has,
    and `GRACE` seconds later killed.
    """
    with log.open("ab") as file:
        file.write(f"\n==> {step.name}: {' '.join(step.command)}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            step.command, stdout=file, stderr=file, env=os.environ | step.environment, start_new_session=True
        )
        try:
            end = time.monotonic() + limit
            while process.poll() is None and time.monotonic() < end and not STOPPED:
                time.sleep(0.05)
            if process.returncode is None:
                lines, size = _lines(log, start), log.stat().st_size
                why = f"interrupted by {STOPPED[0]}" if STOPPED else "out of time"
                _end(process)
                # What follows the interrupt tells of it alone, but for what pytest says of tests that failed before.
                failed = [line for line in _lines(log, size) if line.startswith(("FAILED ", "ERROR "))]
                return Outcome(False, f"{why}{_last(_running(lines) or lines)}", [*failed[:TAIL], *lines[-TAIL:]])
        finally:
            _signal(process, signal.SIGKILL)  # also what the step has left behind
    lines = _lines(log, start)
    last = _last(lines)
    if process.returncode < 0:
        return Outcome(False, f"killed by {signal.Signals(-process.returncode).name}{last}", lines[-TAIL:])
    if process.returncode:
        return Outcome(False, f"failed ({process.returncode}){last}", lines[-TAIL:])
    counts = PYTEST_END.match(lines[-1]) if lines else None
    return Outcome(True, f"well: {counts[1]}" if counts else "well")  # all skipped is well, too


def _lines(log: Path, start: int) -> list[str]:
    """Returns the lines that are not blank from a place of the log on."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _last(lines: Sequence[str]) -> str:
    return ": " + PYTEST_END.sub(r"\1", lines[-1]) if lines else ", without a word"


def _running(lines: Sequence[str]) -> list[str]:
    """Returns the tests that workers of pytest-xdist began and did not end; without workers the last line names it."""
    ended = {match[1] for line in lines if (match := re.match(r"\[gw\d+\] \[[ \d]+%\] [A-Z]+ (.*)", line))}
    running = [line for line in lines if line.startswith("tests/") and line not in ended]
    return ["; ".join(running)] if ended and running else []


def _end(process: subprocess.Popen) -> None:
    _signal(process, signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


class Clocks:
    """Notes the GPU's clocks and power twice a second, by nvidia-smi, which reads them and changes nothing."""

    def __init__(self, path: Path) -> None:
        self.step = ""
        self._path = path
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Clocks":
        smi = shutil.which("nvidia-smi")
        if smi is None:
            return self
        command = [smi, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits", "--id=0", "-lms", "500"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        new = not self._path.exists()
        file = self._path.open("a", encoding="utf-8")
        if new:
            print(*CLOCKS_HEAD, sep=",", file=file, flush=True)
        self._thread = threading.Thread(target=self._note, args=(self._process.stdout, file), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._thread.join()

    def _note(self, lines: IO[str], file: IO[str]) -> None:
        with file:
            for line in lines:
                values = [value.strip() for value in line.split(",")]
                print(f"{time.time():.2f}", self.step, *values, sep=",", file=file, flush=True)
