"""`python -m vgpo_kernels compile`: every kernel compiled for every target, without a GPU.

A kernel fails where it does not compile, spills registers, wants more shared memory than the target has, or has matrix
products of warp groups (wgmma of sm_90) that the assembler makes wait for one another.
"""

import argparse
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgpo_kernels import _dispatch, _tuning

if TYPE_CHECKING:
    from vgpo_kernels._triton import CompileCase


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: Triton's names for it, and the shared memory a program may take, in bytes."""

    backend: str
    arch: int | str
    warp_size: int
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "sm_120": Target("cuda", 120, 32, 99 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}
COLUMNS = ("registers", "stack", "spilled", "shared")


@dataclass(frozen=True)
class Row:
    """What one kernel came to on one target.

    Args:
        kernel: name of the compile case.
        target: name of the target.
        registers: of a thread.
        stack: bytes of a thread; anything above 0 is a spill.
        spilled: registers spilled, where the compiler counts them (AMD).
        shared: bytes of a program.
        error: why it fails, or None.
    """

    kernel: str
    target: str
    registers: int | None = None
    stack: int | None = None
    spilled: int | None = None
    shared: int | None = None
    error: str | None = None


def add_command(commands: Any) -> None:
    """Adds `compile` to the command line."""
    parser = commands.add_parser(
        "compile",
        help="compile every kernel ahead of time and print registers, stack and shared memory",
        description="Fails where a kernel does not compile, spills, takes more shared memory than there is, or has "
        "asynchronous matrix products that the assembler serialises.",
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all of them")
    parser.add_argument("--kernel", metavar="NAME", help="only kernels with NAME in their name")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that compile; default: one a usable core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, cases: Sequence["CompileCase"] | None = None) -> int:
    """Prints the table; returns 1 where a kernel fails and 2 where nothing can be compiled.

    Args:
        options: of the command line.
        cases: what to compile in place of the package's own kernels, in this process.
    """
    if found := obstacle():
        print(found, file=sys.stderr)
        return 2
    every = list(_own_cases().values()) if cases is None else cases
    wanted = [case for case in every if options.kernel is None or options.kernel in case.name]
    if not wanted:
        names = "\n".join(f"  {case.name}" for case in every)
        print(f"--kernel: no kernel has {options.kernel!r} in its name; there are\n{names}", file=sys.stderr)
        return 2
    jobs = 1
    if cases is None:
        jobs = options.jobs or usable_cores()
    width = max(len(case.name) for case in wanted)
    print(_line(width, "kernel", "target", COLUMNS, ""))
    rows = []
    for row in compiled_rows(wanted, options.target, jobs):
        rows.append(row)
        numbers = ["-" if number is None else str(number) for number in (getattr(row, c) for c in COLUMNS)]
        verdict = f"FAILS: {row.error}" if row.error else "ok"
        print(_line(width, row.kernel, row.target, numbers, verdict), flush=True)
    failed = [row for row in rows if row.error]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} well, {len(failed)} failed (Triton {_triton_version()})")
    if options.json:
        report = {"triton": _triton_version(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if failed else 0


def obstacle() -> str | None:
    """Returns why nothing can be compiled here, or None."""
    if not _dispatch.has_triton():
        return "Triton is not installed: pip install 'vgpo-kernels[triton]'"
    if _dispatch.interpreting():
        return "TRITON_INTERPRET=1 replaces the compiler by an interpreter: unset it to compile"
    return None


def _triton_version() -> str:
    version: str = importlib.import_module("triton").__version__
    return version


def all_cases() -> list["CompileCase"]:
    """Returns the compile cases of every family."""
    from vgpo_kernels.attention import triton as attention
    from vgpo_kernels.focus import triton as focus
    from vgpo_kernels.policy_loss import triton as policy_loss
    from vgpo_kernels.vocabulary import triton as vocabulary
    from vgpo_kernels.weights import triton as weights

    families = (attention, focus, weights, policy_loss, vocabulary)
    return [case for family in families for case in family.compile_cases()]


@functools.cache
def _own_cases() -> dict[str, "CompileCase"]:
    cases = all_cases()
    by_name = {case.name: case for case in cases}
    if len(by_name) != len(cases):
        twice = sorted({case.name for case in cases if by_name[case.name] is not case})
        raise ValueError(f"compile cases of the same name: {', '.join(twice)}")
    return by_name


def usable_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compiled_rows(cases: Sequence["CompileCase"], targets: Sequence[str], jobs: int) -> Iterator[Row]:
    """Yields the row of each kernel on each target, in order; several jobs need the package's own cases."""
    pairs = [(case, target) for case in cases for target in targets if case.targets is None or target in case.targets]
    if jobs == 1:
        yield from (_row(case, target) for case, target in pairs)
        return
    # Kernels do not travel between processes, their names do.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_own_row, [case.name for case, _ in pairs], [target for _, target in pairs])


def _own_row(name: str, target: str) -> Row:
    return _row(_own_cases()[name], target)


@dataclass(frozen=True)
class Attempt:
    """Tiles to try on a target: what a kernel's own choice is there, or what might be better."""

    config: _tuning.Config
    target: str
    tiles: _tuning.Tiles


def attempts(config: _tuning.Config, target: str) -> list[Attempt]:
    """Returns the kernel's choice on a target, then its candidates."""
    chosen = _own_cases()[config.case].chosen(target)
    others = [tiles for tiles in config.candidates[target] if tiles != chosen]
    return [Attempt(config, target, tiles) for tiles in (chosen, *others)]


def attempted_rows(tried: Sequence[Attempt], jobs: int) -> Iterator[Row]:
    """Yields what each attempt's compile case comes to, in order."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_attempted_row, tried)


def _attempted_row(attempt: Attempt) -> Row:
    with _tuning.chosen_tiles(attempt.config.kernel, attempt.tiles):
        return _own_row(attempt.config.case, attempt.target)


def _row(case: "CompileCase", target: str) -> Row:
    with warnings.catch_warnings():
        # Said once a process about a default that changes; the launches take the same default.
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        try:
            return _judged(_compiled_row(case, target))
        except Exception as error:  # Triton raises its own and LLVM's errors, of no common kind
            return Row(case.name, target, error=f"does not compile: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _judged(row: Row) -> Row:
    """Returns the row with the reason why it fails, if it does."""
    limit = TARGETS[row.target].shared
    if row.error:
        return row
    if row.stack or row.spilled:
        return replace(row, error="spills registers")
    if (row.shared or 0) > limit:
        return replace(row, error=f"takes more shared memory than the {limit} bytes there are")
    return row


def _compiled_row(case: "CompileCase", name: str) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel: Any = case.kernel
    target = TARGETS[name]
    signature = {argument: case.signature.get(argument, "constexpr") for argument in kernel.arg_names}
    # The launcher tells the compiler that a pointer is a multiple of 16 bytes, as torch's allocations are.
    aligned_pointers = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    constexprs, launch = case.on(name)
    make_source = triton.compiler.ASTSource
    if kernel.is_gluon():
        make_source = importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource
    source = make_source(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned_pointers)
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=gpu, options=launch)
    if target.backend == "hip":
        return Row(case.name, name, *_amd_usage(compiled.asm), shared=compiled.metadata.shared)
    listing = _disassembly(compiled.asm)
    registers, stack = _largest(r"REG:(\d+)", listing), _largest(r"STACK:(\d+)", listing)
    error = serialisation(log.getvalue(), compiled.asm["ptx"], listing)
    return Row(case.name, name, registers, stack, shared=compiled.metadata.shared, error=error)


def _disassembly(asm: dict[str, Any]) -> str:
    """Returns the resources of the binary and, if it has matrix products of warp groups, its instructions."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    options = ["-res-usage", "-sass"] if "wgmma" in asm["ptx"] else ["-res-usage"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        return subprocess.run([tool, *options, file.name], check=True, capture_output=True, text=True).stdout


def serialisation(log: str, ptx: str, sass: str) -> str | None:
    """Returns why the matrix products of warp groups wait for one another, or None where they do not.

    Args:
        log: of `ptxas -v`; empty if the binary comes from Triton's cache.
        ptx: what was assembled.
        sass: the instructions of the binary.
    """
    reason = re.search(r"\(C751\d\) .*(serialized due to .*?)(?: in the function|$)", log, re.MULTILINE)
    if reason:
        return f"matrix products are {reason[1]}"
    products, waits = sass.count("HGMMA"), sass.count("WARPGROUP.DEPBAR")
    asked = ptx.count("wgmma.wait_group") < ptx.count("wgmma.mma_async")
    if asked and 0 < products <= waits:
        return f"matrix products are serialised: {waits} waits for {products} of them"
    return None


def _amd_usage(asm: dict[str, Any]) -> tuple[int, int, int]:
    """Returns registers, stack and spilled registers from the metadata at the end of the assembly."""
    listing = asm["amdgcn"]
    return (
        _largest(r"\.vgpr_count:\s+(\d+)", listing),
        _largest(r"\.private_segment_fixed_size:\s+(\d+)", listing),
        _largest(r"\.[vs]gpr_spill_count:\s+(\d+)", listing),
    )


def _largest(pattern: str, listing: str) -> int:
    return max(int(number) for number in re.findall(pattern, listing))


def _line(width: int, kernel: str, target: str, numbers: Sequence[str], verdict: str) -> str:
    return "  ".join((kernel.ljust(width), target.ljust(6), *(n.rjust(9) for n in numbers), verdict)).rstrip()
