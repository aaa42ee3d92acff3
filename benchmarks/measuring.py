"""How the providers of one case are held to our result, then measured together."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import machine
import memory
import torch
from room import OURS, PLAIN, Case, Room
from timing import ceilings, host_seconds, interleaved, launches
from torch import Tensor


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
    room: Room, case: Case, names: Sequence[str], device: torch.device, module: str, *, timed: bool = True
) -> dict[str, Outcome]:
    """Checks the providers of a case against ours, then measures those that agree, together.

    Args:
        room, case: what is measured.
        names: of the providers wanted.
        device: where.
        module: that defines the room, for the processes that measure memory.
        timed: False only checks.
    """
    torch.manual_seed(0)
    outcomes = {name: Outcome(skipped=room.providers[name].missing(case, device)) for name in names}
    running = [name for name in names if outcomes[name].skipped is None]
    if not running:
        return outcomes
    inputs = room.inputs(case, device)
    objections = _objections(room, running, inputs, device)
    running = [name for name in running if name not in objections]
    facts = _facts(room, case, inputs, device) if timed and running else {}
    for name in running if timed else ():
        provider = room.providers[name]
        outcomes[name].info = facts | {"provider": name, "role": provider.role, "peer": provider.role == "peer"}
        try:
            outcomes[name].info["memory"] = _memory(room, case, name, inputs, device, module)
        except Exception as error:
            objections[name] = _objection_to(error)
    for name, (kind, why) in objections.items():
        setattr(outcomes[name], kind, why)
    running = [name for name in running if name not in objections]
    if not timed:
        return outcomes
    try:
        _time(room, case, inputs, device, {name: outcomes[name] for name in running})
    except Exception as error:  # said once by each of them, not met again by the next
        kind, why = _objection_to(error)
        for name in running:
            setattr(outcomes[name], kind, f"while timed together: {why}")
    return outcomes


def _time(room: Room, case: Case, inputs: Any, device: torch.device, outcomes: Mapping[str, Outcome]) -> None:
    """Times providers in turns and adds what is said of each."""
    copies = itertools.cycle(cold_copies(inputs, device) if room.rotates else [inputs])
    calls = {name: _call(room.providers[name].run, copies) for name in outcomes}
    # Sweeps are for their exponents, tiny cases for the tests of these benchmarks.
    seconds, least = (room.seconds, room.least) if case.axis is None else (room.seconds / 4, 2)
    seconds = 0.01 if "tiny" in case.levels else seconds
    for name, samples in interleaved(calls, device, seconds, least).items():
        info = _achieved(outcomes[name].info, median(samples))
        if device.type == "cuda":
            info |= {
                "host_seconds": host_seconds(calls[name], device, seconds),
                "launches": launches(calls[name], device),
            }
        if room.details is not None:
            info |= room.details(inputs, name)
        outcomes[name].info |= info
        outcomes[name].samples = samples


def _call(run: Callable[[Any], Any], copies: Iterator[Any]) -> Callable[[], Any]:
    return lambda: run(next(copies))


def _objections(room: Room, names: Sequence[str], inputs: Any, device: torch.device) -> dict[str, Objection]:
    """Returns why some of the providers cannot be timed: they do not run, or come to another result than ours."""
    half = room.dtype(device) != torch.float32
    expected = _result(room, OURS, inputs)
    if isinstance(expected, Objection):
        return {name: expected._replace(why=f"{OURS}: {expected.why}") for name in names}
    objections, agreeing = {}, []
    # A sweep of ours alone is held to our plain torch, which it does not time.
    alone = PLAIN in room.providers and all(name == OURS or room.providers[name].role == "bound" for name in names)
    for name in [*names, PLAIN] if alone else names:
        provider, found = room.providers[name], _result(room, name, inputs)
        if isinstance(found, Objection):
            objections[name] = found
        elif provider.role != "bound":
            allowed = provider.tolerance or room.tolerance[half]
            far = [distance(*pair) for pair in zip(found, expected, strict=False)]
            if len(found) == len(expected) and all(there <= allowed for there in far):
                agreeing.append(name)
            else:
                listed = ", ".join(f"{there:.1e}" for there in far)
                results = f"{len(found)} results for {len(expected)} of {OURS}"
                objections[name] = Objection("wrong", f"{results}, {listed} of the norm away, {allowed:.0e} may be")
    wrong = [name for name, objection in objections.items() if objection.kind == "wrong"]
    if OURS in names and (PLAIN in wrong or (wrong and agreeing == [OURS])):
        objections[OURS] = Objection("wrong", f"{PLAIN if PLAIN in wrong else 'every other result'} differs from it")
    if alone:
        objections.pop(PLAIN, None)
    return objections


def _objection_to(error: Exception) -> Objection:
    """Returns what an error says of whoever raised it: memory that is not there is nobody's mistake."""
    if isinstance(error, torch.OutOfMemoryError):
        return Objection("skipped", f"out of memory: {str(error).splitlines()[0]}")
    return Objection("wrong", f"does not run: {type(error).__name__}: {error}")


def _result(room: Room, name: str, inputs: Any) -> list[Tensor] | Objection:
    """Returns what a provider comes to, or why it comes to nothing."""
    try:
        return [x.detach() for x in memory.tensors_of(room.providers[name].run(inputs))]
    except Exception as error:  # whatever it is, the others are still measured
        return _objection_to(error)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference over that of `expected`; infinite where shapes or non-finite values differ."""
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(actual[~finite], expected[~finite]) or not actual[finite].isfinite().all():
        return math.inf
    difference = (actual[finite] - expected[finite]).norm()
    return float(difference / expected[finite].norm()) if difference else 0.0


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


def _memory(room: Room, case: Case, name: str, inputs: Any, device: torch.device, module: str) -> dict[str, Any]:
    if device.type == "cuda":
        peak = memory.cuda_peak(lambda: room.providers[name].run(inputs), device)
        return {"peak_extra_bytes": peak, "how": memory.CUDA}
    peak = memory.fresh_process_peak(module, room.name, case.name, name)
    return {"peak_extra_bytes": peak, "how": memory.RESIDENT}


def _facts(room: Room, case: Case, inputs: Any, device: torch.device) -> dict[str, Any]:
    """Returns what holds for every provider of a case."""
    work, dtype = room.work(case), room.dtype(device)
    ceiling = ceilings(device, dtype)
    floors = {"flops": work.flops / ceiling.flops, "bytes": work.bytes / ceiling.bandwidth}
    bound = max(floors, key=floors.__getitem__)
    named = zip(getattr(inputs, "_fields", ()), inputs, strict=False) if isinstance(inputs, tuple) else ()
    return {
        "room": room.name,
        "case": case.name,
        "levels": list(case.levels),
        "axis": case.axis and {"name": case.axis[0], "value": case.axis[1]},
        "dtype": str(dtype).removeprefix("torch."),
        "shapes": {key: list(value.shape) for key, value in named if isinstance(value, Tensor)},
        "sizes": dict(case.sizes),
        "work": work._asdict(),
        "floor": floors[bound],
        "bound_by": bound,
        "ceilings": {"tflops": ceiling.flops / 1e12, "gbs": ceiling.bandwidth / 1e9},
        "machine": machine.description(device),
        "versions": machine.versions(),
        **machine.checkout(),
    }


def _achieved(facts: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    work = facts["work"]
    rates = {"tflops": work["flops"] / seconds / 1e12, "gbs": work["bytes"] / seconds / 1e9}
    return {"achieved": rates | {"of_ceiling": facts["floor"] / seconds}}
