"""How the providers of one case are held to our result, then measured together."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import memory
from benchmarks.harness.cases import OURS, PLAIN, Case, Task, Unavailable
from benchmarks.harness.timing import ceilings, host_seconds, interleaved, launches

PIECE = 1 << 24  # elements that are compared at once


class Objection(NamedTuple):
    """Why a provider is not timed: "skipped", it cannot be, or "wrong"."""

    kind: str
    why: str


@dataclass
class Outcome:
    """What came of one provider: times and what else is said of them, or why there are none."""

    samples: list[float] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None
    wrong: str | None = None


def measure(
    task: Task, case: Case, names: Sequence[str], device: torch.device, module: str, *, timed: bool = True
) -> dict[str, Outcome]:
    """Checks the providers of a case against ours, then measures those that agree, together.

    Args:
        task, case: what is measured.
        names: of the providers wanted.
        device: where.
        module: that defines the task, for the processes that measure memory.
        timed: False only checks.
    """
    torch.manual_seed(0)
    outcomes = {name: Outcome(skipped=task.providers[name].missing(case, device)) for name in names}
    running = [name for name in names if outcomes[name].skipped is None]
    if not running:
        return outcomes
    try:
        inputs = task.inputs(case, device)
        objections = _compared(task, running, inputs, device)
    except Exception as error:  # said by each of them
        return outcomes | {name: _objected(_objection_to(error)) for name in running}
    running = [name for name in running if name not in objections]
    facts = _facts(task, case, device) if timed and running else {}
    for name in running if timed else ():
        outcomes[name].info = facts | {"provider": name, "role": task.providers[name].role}
        try:
            outcomes[name].info["memory"] = _memory(task, case, name, inputs, device, module)
        except Exception as error:
            objections[name] = _objection_to(error)
    outcomes |= {name: _objected(objection) for name, objection in objections.items()}
    running = [name for name in running if name not in objections]
    if not timed:
        return outcomes
    try:
        outcomes |= _timed(task, case, inputs, device, {name: outcomes[name].info for name in running})
    except Exception as error:  # said once by each of them, not met again by the next
        kind, why = _objection_to(error)
        outcomes |= {name: _objected(Objection(kind, f"while timed together: {why}")) for name in running}
    return outcomes


def _objected(objection: Objection) -> Outcome:
    return Outcome(**{objection.kind: objection.why})


def _timed(
    task: Task, case: Case, inputs: Any, device: torch.device, infos: Mapping[str, dict[str, Any]]
) -> dict[str, Outcome]:
    """Times providers in turns; returns what came of each, with what was known of it and what is said of its times."""
    several = cold_copies(inputs, device) if task.rotates else [inputs]
    copies = itertools.cycle(several)
    calls = {name: _call(task.providers[name].run, copies) for name in infos}
    if task.keeps_forward:
        for copy, name in itertools.product(several, infos):
            task.providers[name].run(copy)
    # Sweeps and unusual rows need fewer calls than main cases, tiny cases are for the tests of these benchmarks.
    seconds, least = (task.seconds, task.least) if case.providers is None else (task.seconds / 4, 2)
    seconds = 0.01 if "tiny" in case.levels else seconds
    outcomes, begun = {}, time.time()
    samples_by_name = interleaved(calls, device, seconds, least)
    when = {"when": [begun, time.time()]}  # beside which a GPU's clocks may have been noted
    for name, samples in samples_by_name.items():
        info = infos[name]
        try:
            if device.type == "cuda":
                info |= when | {
                    "host_seconds": host_seconds(calls[name], device, seconds),
                    "launches": launches(calls[name], device),
                }
            if task.details is not None:
                info |= task.details(inputs, name)
            outcomes[name] = Outcome(samples, info)
        except Exception as error:  # of this provider alone
            outcomes[name] = _objected(_objection_to(error))
    return outcomes


def _call(run: Callable[[Any], Any], copies: Iterator[Any]) -> Callable[[], Any]:
    return lambda: run(next(copies))


def _compared(task: Task, names: Sequence[str], inputs: Any, device: torch.device) -> dict[str, Objection]:
    """Returns why some of the providers cannot be timed.

    They do not run, they come to another result than ours, or, of ours, no other result is at hand to compare with.
    """
    half = task.dtype(device) != torch.float32
    expected = _result(task, OURS, inputs)
    if isinstance(expected, Objection):
        return {name: expected._replace(why=f"{OURS}: {expected.why}") for name in names}
    objections, agreeing = {}, []
    # A sweep of ours alone is held to our plain torch, which it does not time.
    alone = PLAIN in task.providers and all(name == OURS or task.providers[name].role == "bound" for name in names)
    for name in [*names, PLAIN] if alone else names:
        if name == OURS:
            continue
        provider, found = task.providers[name], _result(task, name, inputs)
        if isinstance(found, Objection):
            objections[name] = found
        elif provider.role != "bound":
            objection = _difference(found, expected, provider.tolerance or task.tolerance[half])
            if objection is None:
                agreeing.append(name)
            else:
                objections[name] = objection
    wrong = [name for name, objection in objections.items() if objection.kind == "wrong"]
    if OURS in names:
        if PLAIN in wrong or (wrong and not agreeing):
            objections[OURS] = Objection(
                "wrong", f"{PLAIN if PLAIN in wrong else 'every other result'} differs from it"
            )
        elif not agreeing:
            others = "; ".join(f"{name}: {objection.why}" for name, objection in objections.items())
            objections[OURS] = Objection("skipped", f"nothing to compare with{others and f' ({others})'}")
    if alone:
        objections.pop(PLAIN, None)
    return objections


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor], allowed: float) -> Objection | None:
    """Returns what is wrong with results that should be ours."""
    try:
        far = [distance(*pair) for pair in zip(found, expected, strict=False)]
    except Exception as error:
        return _objection_to(error)
    if len(found) == len(expected) and all(there <= allowed for there in far):
        return None
    listed = ", ".join(f"{there:.1e}" for there in far)
    results = f"{len(found)} results for {len(expected)} of {OURS}"
    return Objection("wrong", f"{results}, {listed} of the norm away, {allowed:.0e} may be")


def _objection_to(error: Exception) -> Objection:
    """Returns what an error says of its provider: one that lacks memory or a package is skipped, not failed."""
    if isinstance(error, torch.OutOfMemoryError):
        return Objection("skipped", f"out of memory: {str(error).splitlines()[0]}")
    if isinstance(error, ImportError | Unavailable):
        return Objection("skipped", str(error))
    return Objection("wrong", f"does not run: {type(error).__name__}: {error}")


def _result(task: Task, name: str, inputs: Any) -> list[Tensor] | Objection:
    """Returns what a provider comes to, or why it comes to nothing."""
    try:
        return [x.detach() for x in memory.tensors_of(task.providers[name].run(inputs))]
    except Exception as error:  # whatever it is, the others are still measured
        return _objection_to(error)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference over that of `expected`; infinite where shapes or non-finite values differ."""
    if actual.shape != expected.shape:
        return math.inf
    difference = norm = 0.0
    # In pieces: both in float64 are many times what they are.
    for piece in zip(actual.reshape(-1).split(PIECE), expected.reshape(-1).split(PIECE), strict=True):
        a, b = (x.double() for x in piece)
        finite = b.isfinite()
        if not (torch.where(finite, 0.0, a) == torch.where(finite, 0.0, b)).all():
            return math.inf
        a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
        difference += float((a - b).square().sum())
        norm += float(b.square().sum())
    if not difference:
        return 0.0
    return math.sqrt(difference / norm) if norm and math.isfinite(difference) else math.inf


def cold_copies(inputs: Any, device: torch.device) -> list[Any]:
    """Returns as many copies of a NamedTuple of inputs as its second-level cache cannot hold: no call finds its own.

    On a CPU, and for inputs that are larger than that cache, the inputs alone.
    """
    if device.type != "cuda":
        return [inputs]
    size = max(1, memory.bytes_of(inputs))
    count = 1 + 2 * torch.cuda.get_device_properties(device).L2_cache_size // size
    return [inputs, *(type(inputs)(*map(_copied, inputs)) for _ in range(count - 1))]


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)


def _memory(task: Task, case: Case, name: str, inputs: Any, device: torch.device, module: str) -> int | None:
    if device.type == "cuda":
        return memory.cuda_peak(lambda: task.providers[name].run(inputs), device)
    return memory.fresh_process_peak(module, task.name, case.name, name)


def _facts(task: Task, case: Case, device: torch.device) -> dict[str, Any]:
    """Returns what holds for every provider of a case; `roofline` is the least seconds that its counted work takes."""
    work, dtype = task.work(case), task.dtype(device)
    ceiling = ceilings(device, dtype)
    seconds = {"flops": work.flops / ceiling.flops, "bytes": work.bytes / ceiling.bandwidth}
    bound = max(seconds, key=seconds.__getitem__)
    return {
        **{"task": task.name, "case": case.name, "levels": case.levels, "axis": case.axis},
        **{"dtype": str(dtype).removeprefix("torch."), "flops": work.flops, "bytes": work.bytes},
        **{"roofline": seconds[bound], "bound_by": bound},
        "ceilings": {"tflops": ceiling.flops / 1e12, "gbs": ceiling.bandwidth / 1e9},
    }
