"""What a GPU is worth, by stages, each step a process of its own: `scripts/gpu_bench.sh OUT [STAGE...]` starts it.

Of the standard library alone, so that neither a fault of the GPU nor a missing package ends this process.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_steps import GRACE, STOPPED, Clocks, Outcome, Step, run, stop_at_signals

ROOT = Path(__file__).resolve().parents[1]
MOST_FILES = 8  # that OUT holds; those beyond `FILES` go into rest.tar
FILES = ("summary.txt", "clocks.csv", "tests.json", "small.json", "peers.json", "paper.json", "tiles.json")
# Folders of tests of what a GPU runs, the shortest first; files of these kinds say nothing about a GPU.
TEST_FOLDERS = ("weights", "focus", "attention", "policy_loss", "vocabulary")
NOT_OF_GPUS = ("native", "reference", "errors", "arguments", "memory", "targets", "trl")
# The benchmarks by task, the most valuable first, and seconds for ours and all that is not compiled.
TASKS = {
    "mass": ("test_attention.py::test_attention_mass", 40),
    "forward": ("test_attention.py::test_attention_with_mass", 55),
    "backward": ("test_attention.py::test_attention_backward", 45),
    "decode": ("test_decode.py::test_decode", 30),
    "column": ("test_attention.py::test_attention_column_sum", 40),
    "logits": ("test_policy_loss.py::test_logits_policy_loss", 40),
    "linear-logprobs": ("test_hidden_loss.py::test_linear_logprobs", 40),
    "linear-loss": ("test_hidden_loss.py::test_linear_policy_loss", 50),
    "focus": ("test_focus.py::test_focus", 40),
    "weights": ("test_weights.py::test_weights", 40),
    "selective": ("test_policy_loss.py::test_selective_logprobs", 25),
    "logprobs-loss": ("test_policy_loss.py::test_policy_loss", 25),
    "step": ("test_training_step.py::test_training_step", 70),
}
NOTHING_COMPILED = ("weights", "step")
# Kernels by the names of `tune.py`, those with the largest expected gain first.
TILES = {
    "attention forward": 80,
    "attention dq": 80,
    "attention mass": 60,
    "attention split": 40,
    "linear logprobs": 60,
    "attention dkdv": 60,
    "attention column": 40,
    "focus cosine": 25,
    "focus prototype": 25,
    "logits": 30,
    "attention preprocess": 15,
    "weights token": 15,
    "weights group": 15,
}


@dataclass(frozen=True)
class Call:
    """What holds for all steps of a call.

    Args:
        out: where files are left.
        earlier: the OUT of earlier calls.
        parts: a folder for what the steps leave.
        trial: there is no GPU; the smallest sizes try the script itself.
        tested: the tests run in this call, and the benchmarks take their record.
    """

    out: Path
    earlier: tuple[Path, ...]
    parts: Path
    trial: bool
    tested: bool = False

    def find(self, name: str) -> Path:
        """Returns a JSON file of this call's folder, or of the first of the earlier ones that has it whole."""
        folders = (self.out, *self.earlier)
        found = (folder / name for folder in folders if self.tested or read(folder / name) is not None)
        return next(found, self.out / name)


def gpu_test_files(folder: str) -> list[str]:
    """Returns the files of a folder of tests that a GPU runs kernels in, relative to the root."""
    found = (path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tests" / folder).glob("test_*.py")))
    return [path for path in found if not any(f"_{kind}" in path for kind in NOT_OF_GPUS)]


def smoke(_: Call) -> list[Step]:
    """One case a kernel against float64; the same under compute-sanitizer, if it is found."""
    script = [sys.executable, "benchmarks/smoke.py"]
    blocking = {"CUDA_LAUNCH_BLOCKING": "1"}
    steps = [Step("smoke/kernels", script, 90, blocking)]
    sanitizer = compute_sanitizer()
    missing = None if sanitizer else "compute-sanitizer is not on the PATH, in CUDA_HOME or beside Triton's ptxas"
    # Without torch's cache each tensor is an allocation whose bounds the tool knows.
    checked = blocking | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool, seconds, names in (("memcheck", 170, ()), ("racecheck", 120, ("weights", "policy loss of logits"))):
        command = [sanitizer or "", "--tool", tool, "--error-exitcode", "9", *script, *names, "--dtype", "bfloat16"]
        steps.append(Step(f"smoke/{tool}", command, seconds, checked, left_out=missing))
    return steps


def compute_sanitizer() -> str | None:
    """Returns the path of compute-sanitizer, or None."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    if triton is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=path)


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]


def tests(call: Call) -> list[Step]:
    """The GPU's tests, a process a folder, on workers if pytest-xdist is installed."""
    cores = len(os.sched_getaffinity(0))
    workers = min(8, cores // 2)
    options = ["-v", "--continue-on-collection-errors"]  # the last line of a killed process names the test
    if workers > 1 and importlib.util.find_spec("xdist"):
        options += ["-n", str(workers)]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "600" if call.trial else "60"]
    threads = {"OMP_NUM_THREADS": str(max(1, cores // max(1, workers)))}
    steps = []
    for folder, seconds in zip(TEST_FOLDERS, (50, 50, 160, 50, 130), strict=True):
        part = call.parts / f"tests-{folder}.json"
        command = pytest(*gpu_test_files(folder), *options, "--record", str(part))
        steps.append(Step(f"tests/{folder}", command, seconds, threads, part))
    return steps


def benchmarks(call: Call, stage: str, cases: str, chosen: str, tasks: Iterable[str], times: float) -> list[Step]:
    """One task a process: what the last one leaves cannot fail the next."""
    record = {"VGPO_TESTS_RECORD": str(call.find("tests.json"))}
    steps = []
    for task in tasks:
        node, seconds = TASKS[task]
        part = call.parts / f"{stage}-{task}.json"
        options = ("--benchmark-only", "--cases", "tiny" if call.trial else cases, "--benchmark-json", str(part))
        command = pytest(f"benchmarks/tasks/{node}", "-v", *options, "-k", chosen)
        steps.append(Step(f"{stage}/{task}", command, int(seconds * times), record, part))
    return steps


def small(call: Call) -> list[Step]:
    """The first of the paper's cases: ours and every peer that is not compiled."""
    return benchmarks(call, "small", "small", "not compile and not flex", TASKS, 1)


def peers(call: Call) -> list[Step]:
    """The same cases: ours again, beside torch.compile and FlexAttention."""
    tasks = [task for task in TASKS if task not in NOTHING_COMPILED]
    return benchmarks(call, "peers", "small", "vgpo_kernels or compile or flex", tasks, 2)


def paper(call: Call) -> list[Step]:
    """All of the paper's cases, unusual rows and sweeps, without the compiled peers."""
    return benchmarks(call, "paper", "paper", "not compile and not flex", TASKS, 3)


def tiles(call: Call) -> list[Step]:
    """Candidates of tiles, a process a kernel."""
    steps = []
    for kernel, seconds in TILES.items():
        part = call.parts / f"tiles-{kernel.replace(' ', '-')}.json"
        command = [sys.executable, "benchmarks/tune.py", "--kernel", kernel, "--json", str(part)]
        command += ["--compile-only", "--target", "sm_90"] if call.trial else []
        steps.append(Step(f"tiles/{kernel}", command, seconds, part=part))
    return steps


def worst(call: Call) -> list[Step]:
    """A look into the kernel that is farthest from the machine's ceiling."""
    folders = map(str, (call.out, *call.earlier))
    return [Step("worst/kernel", [sys.executable, "benchmarks/worst.py", *folders], 240)]


STAGES: dict[str, Callable[[Call], list[Step]]] = {
    stage.__name__: stage for stage in (smoke, tests, small, tiles, peers, paper, worst)
}


def main(arguments: Sequence[str]) -> int:
    """Runs the stages asked for; returns 1 if a step failed or did not begin, 2 if nothing can run."""
    deadline = time.monotonic() + float(os.environ.get("BUDGET_SECONDS", "540"))
    out, asked = Path(arguments[0]).resolve(), arguments[1:] or list(STAGES)
    earlier = tuple(Path(folder).resolve() for folder in os.environ.get("EARLIER", "").split(os.pathsep) if folder)
    os.chdir(ROOT)
    tested = any(name.split("/")[0] == "tests" for name in asked)
    try:
        found = probe()
    except ValueError as error:
        print(f"gpu_bench: {error}", file=sys.stderr)
        return 2
    trial = found["device"] is None and os.environ.get("GPU_BENCH_CPU") == "1"
    with tempfile.TemporaryDirectory() as parts:
        call = Call(out, earlier, Path(parts), trial, tested)
        try:
            steps = chosen(call, asked)
            if found["device"] is None and not trial:
                raise ValueError("no GPU is found with torch; GPU_BENCH_CPU=1 tries the script on the CPU")
        except ValueError as error:
            print(f"gpu_bench: {error}", file=sys.stderr)
            return 2
        set_environment()
        stop_at_signals()
        for stage in {step.stage for step in steps}:  # an earlier run's must not pass for this one's
            (out / f"{stage}.json").unlink(missing_ok=True)
        return run_all(steps, out, deadline, describe(found))


def probe() -> dict[str, Any]:
    """Returns versions of torch and Triton and the GPU's name, None if there is no GPU, asked of another process.

    Raises:
        ValueError: they do not load.
    """
    code = (
        "import json, torch, importlib.metadata as m\n"
        "name = torch.cuda.get_device_name() if torch.cuda.is_available() else None\n"
        "print(json.dumps({'device': name, 'torch': torch.__version__, 'triton': m.version('triton')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise ValueError(f"{sys.executable} does not load torch and Triton; PYTHON names another: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def chosen(call: Call, asked: Sequence[str]) -> list[Step]:
    """Returns the steps of the stages and steps asked for, in their order.

    Raises:
        ValueError: there is no such stage or step.
    """
    steps: list[Step] = []
    for name in asked:
        stage = name.split("/")[0]
        if stage not in STAGES:
            raise ValueError(f"STAGE: expected of {', '.join(STAGES)}, got {name!r}")
        found = [step for step in STAGES[stage](call) if name in (stage, step.name)]
        if not found:
            names = ", ".join(step.name for step in STAGES[stage](call))
            raise ValueError(f"STAGE: expected {stage} or one of {names}, got {name!r}")
        steps += found
    return steps


def set_environment() -> None:
    """Gives compilers' caches a place outside OUT that the next call finds, and a copy without .git a commit."""
    cache = Path(tempfile.gettempdir(), f"vgpo-gpu-bench-{os.getuid()}")
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    if not (ROOT / ".git").exists() and not os.environ.get("VGPO_COMMIT"):
        os.environ["VGPO_COMMIT"] = "unknown"


def describe(found: Mapping[str, Any]) -> str:
    """Returns the first line of the summary."""
    named = "of git" if (ROOT / ".git").exists() else os.environ["VGPO_COMMIT"]
    if named == "unknown":
        named = "unknown: there is no .git, and VGPO_COMMIT names none"
    device = found["device"] or "no GPU: the script itself is tried"
    return f"{device}; torch {found['torch']}, Triton {found['triton']}; commit {named}"


def run_all(steps: Sequence[Step], out: Path, deadline: float, title: str) -> int:
    """Runs steps until the deadline, one that fails or is late among them; returns 1 unless all did well."""
    summary, log = out / "summary.txt", out / "log.txt"
    failed: list[tuple[Step, Outcome]] = []
    missed = 0
    with summary.open("a", encoding="utf-8") as file, Clocks(out / "clocks.csv") as clocks:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=file, flush=True)

        say(f"{title}\n{'step':28} {'seconds':>8} {'limit':>8}  result")
        for index, step in enumerate(steps):
            clocks.step, start = step.name, time.monotonic()
            left = deadline - start - GRACE  # the last one ends by the deadline, too
            rest = sum(other.seconds for other in steps[index:] if not other.left_out)
            limit = int(min(left, max(step.seconds, left * step.seconds / rest))) if rest else 0
            if step.left_out:
                outcome, limit = Outcome(True, f"left out: {step.left_out}"), 0
            elif STOPPED or limit < 1:
                why = f"the call was ended by {STOPPED[0]}" if STOPPED else "no time left"
                outcome, missed, limit = Outcome(False, f"not begun: {why}"), missed + 1, 0
            else:
                outcome = run(step, limit, log)
                failed += [] if outcome.well else [(step, outcome)]
            say(f"{step.name:28} {time.monotonic() - start:8.0f} {limit:8}  {outcome.result}")
            if step.part is not None:
                merge(step.part, out / f"{step.stage}.json")
        say(f"of {len(steps)} steps {len(failed)} failed, {missed} did not begin")
        for step, outcome in failed:  # the reason last: of some runs only the end is seen
            say("\n".join(["", *outcome.lines[:-1], f"{step.name}: {outcome.result}"]))
    bundle(out)
    return int(bool(failed or missed))


def merge(part: Path, whole: Path) -> None:
    """Adds what a step left to its stage's file; a step that was killed has left nothing, or half a file."""
    old, new = read(whole), read(part)
    if new is None:
        return
    # By way of a file beside it: a call that is killed leaves no half of this one.
    written = whole.with_suffix(".new")
    written.write_text(json.dumps(new if old is None else merged(old, new), indent=1) + "\n", encoding="utf-8")
    written.replace(whole)


def read(path: Path) -> dict[str, Any] | None:
    """Returns what a JSON file holds, None if there is none or half of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Returns two files of one kind as one: lists follow one another, counts add up, flags hold as for the worse.

    "green" holds if it holds for both, "dirty" and "changed_meanwhile" if for either; all else is the older file's.
    """
    together = dict(old)
    for key, value in new.items():
        if isinstance(value, list):
            together[key] = [*old.get(key, []), *value]
        elif isinstance(value, bool):
            together[key] = (old[key] and value) if key == "green" else (old[key] or value)
        elif isinstance(value, int | float):
            together[key] = old[key] + value
    return together


def bundle(out: Path) -> None:
    """Moves what is beyond `FILES` into rest.tar if OUT holds more files than can be taken from some machines."""
    files = [path for path in out.iterdir() if path.is_file()]
    if len(files) <= MOST_FILES:
        return
    with tarfile.open(out / "rest.tar", "a") as archive:
        for path in sorted(files):
            if path.name not in FILES and path.name != "rest.tar":
                archive.add(path, path.name)
                path.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
