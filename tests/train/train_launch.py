"""Starts a script on two DeepSpeed processes, with a limit on its time, and leaves none of them behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WORKERS = Path(__file__).resolve().parent / "workers"


@dataclass
class Finished:
    """How a launch ended."""

    returncode: int
    output: str


def launch(
    script: Path,
    *arguments: str,
    log: Path,
    timeout: float = 240.0,
    kill_when: Callable[[], bool] | None = None,
    python: str | Path = sys.executable,
) -> Finished:
    """Runs `deepspeed --num_gpus 2 script arguments...` to its end.

    Args:
        script: what each process runs.
        arguments: its arguments.
        log: where its output goes, for reading it after a kill.
        timeout: seconds; a launch that takes longer hangs, and fails the test.
        kill_when: asked all the time; once it says yes, all processes get SIGKILL.
        python: the interpreter, of an environment with the driver's requirements.
    """
    command = [str(python), "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(_free_port())]
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    # The tests compare with one process on the CPU, on a machine with GPUs, too.
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, str(script), *arguments],
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(process, timeout, kill_when, log)
        finally:
            _kill_group(process)
    return Finished(process.returncode, log.read_text(errors="replace"))


def _wait(process: subprocess.Popen, timeout: float, kill_when: Callable[[], bool] | None, log: Path) -> None:
    end = time.monotonic() + timeout
    while process.poll() is None:
        if kill_when is not None and kill_when():
            return
        if time.monotonic() > end:
            tail = log.read_text(errors="replace")[-3000:]
            raise TimeoutError(f"no end after {timeout:.0f} s; the last output:\n{tail}")
        time.sleep(0.05)


def _kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)  # the group outlives its leader while a process of it runs
    except ProcessLookupError:
        return
    finally:
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
