"""What a benchmark consists of, and how the entries of one case are checked, then measured together.

A room is a task (attention mass, focus, ...); a case is one set of sizes of it; a provider is one way to do it. All
providers of a case get the same inputs, are held to our result, and are timed in turns.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import machine
import memory
import psutil
import torch
from timing import ceilings, host_seconds, interleaved, launches
from torch import Tensor

OURS, PLAIN = "vgpo_kernels", "vgpo_kernels, plain torch"
ROLES = ("ours", "ours, plain", "peer", "bound")
# A case that belongs to both is in each of them and once in "all"; "tiny" is for the tests of these benchmarks.
LEVELS = ("tiny", "small", "paper")
# How much of memory a call of known size may take; the rest is for what it does not know of.
SHARE = 0.8


@dataclass(frozen=True)
class Case:
    """One set of sizes.

    Args:
        name: unique in its room among the cases of a device.
        levels: "tiny", "small", "paper".
        sizes: by name, as in `case["B"]`.
        axis: (name, value) of the size that varies in a sweep; the others are held.
        kind: "cpu" or "cuda" where it is for one of them only.
    """

    name: str
    levels: tuple[str, ...]
    sizes: Mapping[str, Any]
    axis: tuple[str, int] | None = None
    kind: str | None = None

    def __getitem__(self, size: str) -> Any:
        return self.sizes[size]


class Work(NamedTuple):
    """The least that a task needs, whoever does it: floating-point operations of products, and bytes moved."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Provider:
    """One way to do the task.

    Args:
        run: called with the inputs; returns a tensor or several, which are compared with ours.
        role: "ours", "ours, plain" (our torch reference), "peer", or "bound": it does less, and is not compared.
        needs: modules that must be importable.
        gpu: takes CUDA tensors only.
        compiled: compiles in its first call.
        extra_bytes: what it is known to allocate, so that it can be left out before the machine runs out.
        obstacle: why it cannot do a case at all, or None.
        tolerance: of this provider, where it computes in less precision than others by design.
    """

    run: Callable[[Any], Any]
    role: str = "peer"
    needs: tuple[str, ...] = ()
    gpu: bool = False
    compiled: bool = False
    extra_bytes: Callable[[Case], float] | None = None
    obstacle: Callable[[Case], str | None] | None = None
    tolerance: float | None = None

    def missing(self, case: Case, device: torch.device) -> str | None:
        """Returns why it cannot run a case here, or None."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        if self.gpu and device.type != "cuda":
            return "needs a GPU"
        if self.obstacle is not None and (obstacle := self.obstacle(case)):
            return obstacle
        needed, there = self.extra_bytes(case) if self.extra_bytes else 0, free_bytes(device)
        if needed > SHARE * there:
            return f"takes {needed / 1e9:.1f} GB, and {there / 1e9:.1f} GB are free"
        return None


@dataclass(frozen=True)
class Room:
    """A task, its cases, and who does it.

    Args:
        name: what tables call it.
        cases: names are unique for each kind of device.
        inputs: makes the inputs of a case, the same ones in every process: a NamedTuple of tensors and numbers.
        providers: by name, `OURS` among them.
        work: counts what a case needs at least.
        dtype: what the inputs are mostly of, on a device.
        tolerance: norm of the difference to ours over the norm of ours, in fp32 and in half precision.
        details: more to say of an entry once it is timed, from the inputs and the provider's name.
        seconds: about how long each provider is repeated.
        least: turns that each provider gets at least.
        sweep: the providers of cases with an axis.
    """

    name: str
    cases: Sequence[Case]
    inputs: Callable[[Case, torch.device], Any]
    providers: Mapping[str, Provider]
    work: Callable[[Case], Work]
    dtype: Callable[[torch.device], torch.dtype] = lambda device: half_on_gpu(device)
    tolerance: tuple[float, float] = (1e-4, 2e-2)
    details: Callable[[Any, str], dict[str, Any]] | None = None
    seconds: float = 0.5
    least: int = 3
    sweep: tuple[str, ...] = (OURS,)

    def __post_init__(self) -> None:
        if OURS not in self.providers:
            raise ValueError(f"providers: expected {OURS!r} among them, got {', '.join(self.providers)}")
        for name, provider in self.providers.items():
            if provider.role not in ROLES:
                raise ValueError(f"role: expected one of {', '.join(ROLES)}, got {provider.role!r} of {name!r}")
        if self.name in ROOMS:
            raise ValueError(f"name: there is a room {self.name!r} already")
        ROOMS[self.name] = self

    def chosen(self, levels: Iterable[str], kind: str) -> Iterator[tuple[Case, str]]:
        """Yields the cases of these levels on a kind of device, each with the names of its providers in turn."""
        wanted = set(levels)
        for case in self.cases:
            if wanted.intersection(case.levels) and case.kind in (None, kind):
                yield from ((case, name) for name in (self.sweep if case.axis else self.providers))

    def case(self, name: str, kind: str = "cpu") -> Case:
        """Returns the case of that name."""
        return next(case for case in self.cases if case.name == name and case.kind in (None, kind))


ROOMS: dict[str, Room] = {}


def half_on_gpu(device: torch.device) -> torch.dtype:
    """Returns the dtype of the paper's cases on a GPU, and the one that CPUs compute in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def free_bytes(device: torch.device) -> int:
    """Returns the memory that can be had."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


class Wrong(AssertionError):
    """A result that is not ours, or ours that is not right."""


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
    for name, (kind, why) in _objections(room, case, running, inputs, device).items():
        setattr(outcomes[name], kind, why)
    running = [name for name in running if outcomes[name].skipped is None and outcomes[name].wrong is None]
    if not timed or not running:
        return outcomes
    facts = _facts(room, case, inputs, device)
    for name in running:
        outcomes[name].info = facts | {"provider": name, "role": room.providers[name].role}
        outcomes[name].info["peer"] = room.providers[name].role == "peer"
        outcomes[name].info["memory"] = _memory(room, case, name, inputs, device, module)
    copies = itertools.cycle(cold_copies(inputs, device))
    calls = {name: _call(room.providers[name].run, copies) for name in running}
    seconds, least = (room.seconds, room.least) if case.axis is None else (room.seconds / 4, 2)
    for name, samples in interleaved(calls, device, seconds, least).items():
        outcomes[name].samples = samples
        outcomes[name].info |= _achieved(facts, sorted(samples)[len(samples) // 2])
        if device.type == "cuda":
            outcomes[name].info |= {
                "host_seconds": host_seconds(calls[name], device),
                "launches": launches(calls[name], device),
            }
        if room.details is not None:
            outcomes[name].info |= room.details(inputs, name)
    return outcomes


def _call(run: Callable[[Any], Any], copies: Iterator[Any]) -> Callable[[], Any]:
    return lambda: run(next(copies))


def _objections(
    room: Room, case: Case, names: Sequence[str], inputs: Any, device: torch.device
) -> dict[str, tuple[str, str]]:
    """Returns, for those that cannot be timed, ("skipped" or "wrong", why)."""
    half = room.dtype(device) != torch.float32
    try:
        expected = [x.detach() for x in memory.tensors_of(room.providers[OURS].run(inputs))]
    except Exception as error:  # a broken kernel fails all of the case, with its own words
        return {name: ("wrong", f"{OURS} does not run: {type(error).__name__}: {error}") for name in names}
    objections, agreeing = {}, []
    for name in names:
        provider = room.providers[name]
        try:
            found = [x.detach() for x in memory.tensors_of(provider.run(inputs))]
        except torch.OutOfMemoryError as error:
            objections[name] = ("skipped", f"out of memory: {str(error).splitlines()[0]}")
            continue
        except Exception as error:
            objections[name] = ("wrong", f"does not run: {type(error).__name__}: {error}")
            continue
        if provider.role == "bound":
            continue
        allowed = provider.tolerance or room.tolerance[half]
        distances = [distance(one, other) for one, other in zip(found, expected, strict=True)]
        if all(there <= allowed for there in distances):
            agreeing += [name] if name != OURS else []
        else:
            far = ", ".join(f"{there:.1e}" for there in distances)
            objections[name] = ("wrong", f"differs from {OURS} by {far} of the norm, {allowed:.0e} is allowed")
    others = [name for name in names if name != OURS and objections.get(name, ("", ""))[0] == "wrong"]
    if OURS in names and others and (not agreeing or PLAIN in others):
        why = f"{'our own plain torch' if PLAIN in others else 'no other result'} agrees with it"
        objections[OURS] = ("wrong", why if PLAIN not in others else why.replace("agrees", "disagrees"))
    return objections


def distance(actual: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference over the norm of `expected`; infinite where shapes or non-finite values differ."""
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
        **machine.commit(),
    }


def _achieved(facts: Mapping[str, Any], median: float) -> dict[str, Any]:
    work = facts["work"]
    return {
        "achieved": {
            "tflops": work["flops"] / median / 1e12,
            "gbs": work["bytes"] / median / 1e9,
            "of_ceiling": facts["floor"] / median,
        }
    }
