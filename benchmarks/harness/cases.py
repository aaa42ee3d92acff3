"""What a benchmark consists of.

A task is attention mass, focus, ...; a case is one set of its sizes; a provider is one way to do it. All providers of a
case get the same inputs; `measure` holds them to our result and times them in turns.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch

OURS, PLAIN = "vgpo_kernels", "vgpo_kernels, plain torch"
ROLES = ("ours", "ours, plain", "peer", "bound")
# A case that belongs to both is in each of them and once in "all"; "tiny" is for the tests of these benchmarks.
LEVELS = ("tiny", "small", "paper")
# Of states, by the kind of device: what the paper's cases have on a GPU, and what CPUs compute in.
STATES = {"cuda": torch.bfloat16, "cpu": torch.float32}
# How much of memory a call of known size may take; the rest is for what it does not know of.
SHARE = 0.8


class Unavailable(Exception):
    """Raised by a provider that finds no such kernel on this machine."""


@dataclass(frozen=True)
class Case:
    """One set of sizes.

    Args:
        name: unique in its task among the cases of a device.
        levels: "tiny", "small", "paper".
        sizes: by name, as in `case["B"]`.
        axis: (name, value) of the size that varies in a sweep; the others are held.
        kind: "cpu" or "cuda" where it is for one of them only.
        providers: the only ones of its task that do it; None is all of them.
    """

    name: str
    levels: tuple[str, ...]
    sizes: Mapping[str, Any]
    axis: tuple[str, int] | None = None
    kind: str | None = None
    providers: tuple[str, ...] | None = None

    def __getitem__(self, size: str) -> Any:
        return self.sizes[size]


class Work(NamedTuple):
    """The least that a task needs, by any implementation: floating-point operations of products, and bytes moved."""

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
        compiled: torch.compile makes it in its first call.
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
        if self.compiled and device.type == "cpu" and shutil.which("c++") is None:
            return "torch.compile needs a C++ compiler"
        if self.obstacle is not None and (obstacle := self.obstacle(case)):
            return obstacle
        needed, there = self.extra_bytes(case) if self.extra_bytes else 0, free_bytes(device)
        if needed > SHARE * there:
            return f"takes {needed / 1e9:.1f} GB, and {there / 1e9:.1f} GB are free"
        return None


@dataclass(frozen=True)
class Task:
    """A task, its cases and its providers.

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
        rotates: on a GPU, whether inputs rotate among copies that the cache cannot hold; a model is not copied.
        keeps_forward: a provider's first call with some inputs makes a forward that later ones go back through; it is
            neither timed nor counted as memory.
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
    rotates: bool = True
    keeps_forward: bool = False

    def __post_init__(self) -> None:
        if OURS not in self.providers:
            raise ValueError(f"providers: expected {OURS!r} among them, got {', '.join(self.providers)}")
        for name, provider in self.providers.items():
            if provider.role not in ROLES:
                raise ValueError(f"role: expected one of {', '.join(ROLES)}, got {provider.role!r} of {name!r}")
        if self.name in TASKS:
            raise ValueError(f"name: there is a task {self.name!r} already")
        TASKS[self.name] = self

    def chosen(self, levels: Iterable[str], kind: str) -> Iterator[tuple[Case, str]]:
        """Yields the cases of these levels on a kind of device, each with the names of its providers in turn."""
        wanted = set(levels)
        for case in self.cases:
            if wanted.intersection(case.levels) and case.kind in (None, kind):
                yield from ((case, name) for name in case.providers or self.providers)

    @property
    def tiny(self) -> Case:
        """The first of the smallest cases."""
        return next(case for case in self.cases if "tiny" in case.levels)

    def case(self, name: str, kind: str = "cpu") -> Case:
        """Returns the case of that name."""
        return next(case for case in self.cases if case.name == name and case.kind in (None, kind))


TASKS: dict[str, Task] = {}
# Which implementation "ours" is: None chooses by device. "triton" under TRITON_INTERPRET=1 checks the kernels of GPUs.
IMPL = os.environ.get("VGPO_BENCH_IMPL") or None


def ours_of(run: Callable[[Any, str | None], Any]) -> dict[str, Provider]:
    """Returns our two providers of a function of the inputs and `impl`: what users get, and plain torch."""
    return {
        OURS: Provider(lambda inputs: run(inputs, IMPL), "ours"),
        PLAIN: Provider(lambda inputs: run(inputs, "reference"), "ours, plain"),
    }


def half_on_gpu(device: torch.device) -> torch.dtype:
    """Returns the dtype of states: half precision on a GPU, float32 on a CPU."""
    return STATES[device.type]


def free_bytes(device: torch.device) -> int:
    """Returns the memory that can be had."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


@functools.cache
def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """Returns the function under torch.compile, one compilation for each set of shapes; too many are an error.

    Left alone, torch would run what exceeds its limit uncompiled. `torch._dynamo.reset()` begins to count anew.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False, backend=backend)
