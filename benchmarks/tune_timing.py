"""What tiles cost on a GPU: the call that launches a kernel, whether it gives the same with others, and its time."""

import importlib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import cases as harness
from benchmarks.harness import memory
from benchmarks.harness.cases import OURS, PLAIN, Case, Task
from benchmarks.harness.measure import cold_copies
from benchmarks.harness.timing import interleaved
from vgpo_kernels._tuning import Tiles, chosen_tiles
from vgpo_kernels.testing import assert_error_budget

# The task whose call launches a kernel.
TASK_OF = {
    "attention mass": "attention mass, given the LSE",
    "attention column": "attention column sum, given the LSE",
    "attention forward": "attention with LSE and mass",
    "attention dkdv": "attention backward with a mass gradient",
    "attention dq": "attention backward with a mass gradient",
    "attention preprocess": "attention backward with a mass gradient",
    "attention split": "attention of one token to a cache",
    "focus prototype": "focus",
    "focus cosine": "focus",
    "weights token": "weights",
    "weights group": "weights",
    "linear logprobs": "log-probs of hidden states",
    "logits": "policy loss of logits",
}
# Of the paper's cases: a small model's and a large one's, short and long prompts.
CASES = ("1: ", "4: ")


class Timing(NamedTuple):
    """Where candidates are timed, those of which target, and for how many seconds each and case."""

    device: torch.device
    target: str
    seconds: float


def task_named(name: str) -> Task:
    """Returns a task of these benchmarks.

    Raises:
        KeyError: none of the modules of `tasks` defines it.
    """
    for path in sorted(Path(__file__).parent.glob("tasks/test_*.py")):
        if name not in harness.TASKS:
            importlib.import_module(f"benchmarks.tasks.{path.stem}")
    return harness.TASKS[name]


def timed_cases(task: Task) -> list[Case]:
    """Returns the paper's cases that tiles are timed at."""
    return [case for case in task.cases if case.kind == "cuda" and case.name.startswith(CASES)]


def checked_case(task: Task) -> Case:
    """Returns the case that float64 takes a moment for."""
    return next(case for case in task.cases if "small" in case.levels and case.kind == "cpu" and case.axis is None)


def objections(kernel: str, task: Task, case: Case, tiles: Mapping[str, Tiles], device: torch.device) -> dict[str, str]:
    """Returns, of the tiles that are wrong, by name, how: their error is above the budget that the first's error sets.

    Args:
        kernel: as `configs` calls it.
        task: whose call launches it.
        case: sizes to check at.
        tiles: by name, the kernel's choice first.
        device: where.
    """
    inputs = task.inputs(case, device)
    exact = results_of(task.providers[PLAIN].run, promoted(inputs))
    present: list[Tensor] = []
    wrong = {}
    for name, values in tiles.items():
        try:
            found = results_of(_with_tiles(kernel, values, task.providers[OURS].run), inputs)
            present = present or found
            for number, results in enumerate(zip(found, present, exact, strict=True)):
                assert_error_budget(f"result {number}", results[0], results[1], results[2].double())
        except Exception as error:  # whatever one does, others may still be worth timing
            wrong[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            if not present:
                break  # nothing to hold the others to
    return wrong


def seconds_of(
    kernel: str, task: Task, case: Case, tiles: Mapping[str, Tiles], timing: Timing
) -> dict[str, list[float]]:
    """Returns the times of the task's call with each of the tiles, in turns, by name; inputs come from a cold cache.

    Raises:
        torch.OutOfMemoryError: the case does not fit the GPU.
    """
    copies = itertools.cycle(cold_copies(task.inputs(case, timing.device), timing.device))
    calls = {name: _with_tiles(kernel, values, _next_of(task, copies)) for name, values in tiles.items()}
    for call in calls.values():  # compiles, which must not count as what a call takes
        call()
    return interleaved(calls, timing.device, timing.seconds)


def _next_of(task: Task, copies: itertools.cycle) -> Callable[[], Any]:
    return lambda: task.providers[OURS].run(next(copies))


def _with_tiles(kernel: str, tiles: Tiles, run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with chosen_tiles(kernel, tiles):
            return run(*arguments)

    return call


def results_of(run: Callable[[Any], Any], inputs: Any) -> list[Tensor]:
    found = (x.detach() for x in memory.tensors_of(run(inputs)))
    return [x if x.is_floating_point() else x.float() for x in found]


def promoted(inputs: Any) -> Any:
    """Returns a NamedTuple of inputs with float64 in place of other floating dtypes."""
    return type(inputs)(*map(_double, inputs))


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)
