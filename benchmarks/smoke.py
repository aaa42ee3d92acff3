"""One case of every kernel against float64, in bf16 and fp16: `python -m benchmarks.smoke [NAME ...]`.

The first thing to run on a GPU: it takes a minute, and says of each kernel by how much it is off. Then what only a GPU
runs: products with float32 results of half-precision operands, and the attention kernels of torch. Without a GPU the
kernels are interpreted, at tiny sizes in fp16. What breaks the CUDA context ends a process; the rest runs in another.
"""

import argparse
import os
import subprocess
import sys
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

# Triton reads it when modules of kernels are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from torch import Tensor

from benchmarks.harness import cases as harness
from benchmarks.harness.cases import OURS, PLAIN, Case, Task
from benchmarks.tune_timing import TASK_OF, checked_case, promoted, results_of, task_named
from tests.tools.cuda_faults import LOST, context_is_lost
from vgpo_kernels import attention_with_lse, visual_attention
from vgpo_kernels.testing import assert_error_budget
from vgpo_kernels.vocabulary import matmul

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
if not ON_GPU:  # Triton's interpreter gives wrong products of bf16
    del DTYPES["bfloat16"]
# Several tiles with ragged ends on every side, which float64 and compute-sanitizer take moments for.
SIZES = {"P": 150, "V": 131, "R": 333, "heads": 4, "kv_heads": 2, "D": 128, "hidden": 520, "vocabulary": 5003}
# What no tile is tuned for.
MORE_TASKS = ("policy loss of log-probs", "selective log-probs of logits", "policy loss of hidden states")
BACKENDS = ("torch_cudnn", "torch_flash", "torch_efficient")
LENGTHS = ((77, 77, True), (63, 129, False), (1, 77, False), (1, 1, False))

# Yields what was compared: its name, the result, the same in plain torch, in float64.
Compared = Iterator[tuple[str, Tensor, Tensor, Tensor]]


class LeftOut(Exception):
    """Raised by a check that cannot run here."""


def of_task(task: Task, dtype: torch.dtype) -> Compared:
    """Compares the call that a task of the benchmarks times."""
    harness.STATES[DEVICE.type], harness.IMPL = dtype, "triton"
    inputs = task.inputs(sized(task), DEVICE)
    found, plain = (results_of(task.providers[name].run, inputs) for name in (OURS, PLAIN))
    exact = results_of(task.providers[PLAIN].run, promoted(inputs))
    for number, results in enumerate(zip(found, plain, exact, strict=True)):
        yield f"result {number}", *results


def sized(task: Task) -> Case:
    """Returns a case that floats of 64 bits take moments for."""
    case = checked_case(task)
    sizes = {name: SIZES.get(name, size) for name, size in case.sizes.items()} | {"B": min(case["B"], 16)}
    return replace(case, sizes=sizes) if ON_GPU else task.tiny


def float32_products(dtype: torch.dtype) -> Compared:
    """Compares torch's products of half-precision operands with float32 results, which it has on GPUs alone.

    The second one adds to its own output: `out` is `self`.
    """
    if not ON_GPU:
        raise LeftOut("for GPUs alone")
    hidden, gradient = (torch.randn(77, size, device=DEVICE, dtype=dtype) for size in (520, 131))
    weight = torch.randn(131, 520, device=DEVICE, dtype=dtype)
    logits = matmul.logits_of(hidden, weight, None, torch.full((77, 131), torch.nan, device=DEVICE))
    yield "mm.dtype_out", logits, hidden.float() @ weight.float().T, hidden.double() @ weight.double().T
    total = torch.randn(131, 520, device=DEVICE)
    expected = [total.to(one) + gradient.to(one).T @ hidden.to(one) for one in (torch.float32, torch.float64)]
    matmul.add_weight_gradient(total, gradient, hidden)
    yield "addmm.dtype_out, out is self", total, *expected


def stock(backend: str, dtype: torch.dtype) -> Compared:
    """Compares an attention kernel of torch: output and LSE, odd lengths, one query, one key."""
    if not ON_GPU:
        raise LeftOut("for GPUs alone")
    for queries, keys, causal in LENGTHS:
        name, heads = f"{queries} queries, {keys} keys", 4 if backend == "torch_efficient" else 2
        q = torch.randn(2, 4, queries, 128, device=DEVICE, dtype=dtype)
        k, v = torch.randn(2, 2, heads, keys, 128, device=DEVICE, dtype=dtype)
        try:
            found = attention_with_lse(q, k, v, causal=causal, backend=backend)
        except RuntimeError as error:
            if "cannot run this" not in str(error):
                raise
            print(f"    {backend}, {name}: left out, {error}")
            continue
        nothing = torch.zeros(2, keys, dtype=torch.bool, device=DEVICE)
        inputs = [[x.to(one) for x in (q, k, v)] for one in (dtype, torch.float64)]
        plain, exact = (visual_attention(*one, nothing, causal=causal, impl="reference") for one in inputs)
        yield f"{name}, output", found[0], plain.out, exact.out
        yield f"{name}, LSE", found[1], plain.lse, exact.lse


def in_gluon(dtype: torch.dtype) -> Compared:
    """Compares the attention forward of sm_90 in Gluon, which `VGPO_HOPPER=1` asks for, on masks that cut its tiles."""
    if not ON_GPU or torch.version.hip or torch.cuda.get_device_capability() != (9, 0):
        raise LeftOut("for GPUs of compute capability 9.0 alone")
    for D, causal in ((64, True), (64, False), (128, True), (128, False)):
        q = torch.randn(2, 4, 333, D, device=DEVICE, dtype=dtype)
        k, v = torch.randn(2, 2, 2, 700, D, device=DEVICE, dtype=dtype)
        visual = torch.zeros(2, 700, dtype=torch.bool, device=DEVICE)
        visual[:, 70:420] = True
        key_mask = torch.ones_like(visual)
        key_mask[0, :40] = key_mask[0, 300:310] = False
        masks = {"causal": causal, "key_mask": key_mask}
        with unittest.mock.patch.dict(os.environ, VGPO_HOPPER="1"), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            found = visual_attention(q, k, v, visual, impl="triton", **masks)
        inputs = [[x.to(one) for x in (q, k, v)] for one in (dtype, torch.float64)]
        plain, exact = (visual_attention(*one, visual, impl="reference", **masks) for one in inputs)
        for name, *results in zip(("output", "mass", "LSE"), found, plain, exact, strict=True):
            yield f"D {D}, {'causal' if causal else 'full'}, {name}", *results


def checks() -> dict[str, Callable[[torch.dtype], Compared]]:
    """Returns every check by name."""
    names = dict.fromkeys([*TASK_OF.values(), *MORE_TASKS])
    found: dict[str, Any] = {name: lambda dtype, name=name: of_task(task_named(name), dtype) for name in names}
    found |= {"float32 products": float32_products, "attention in Gluon": in_gluon}
    return found | {name: lambda dtype, name=name: stock(name, dtype) for name in BACKENDS}


def passes(name: str, dtype: str, check: Callable[[torch.dtype], Compared]) -> bool:
    """Runs a check and prints what came of it; returns whether every result keeps to the error budget."""
    torch.manual_seed(0)
    what, wrong = "nothing", []
    try:
        for what, found, plain, exact in check(DTYPES[dtype]):
            exact = exact.double()
            largest = exact[exact.isfinite()].abs().max().item()
            off = [(x.double() - exact).nan_to_num(0.0).abs().max().item() / largest for x in (found, plain)]
            print(f"    {what}: off by {off[0]:.1e} of the largest value, plain torch by {off[1]:.1e}")
            try:
                assert_error_budget(what, found, plain, exact)
            except AssertionError as error:
                wrong.append(str(error))
        if ON_GPU:
            torch.cuda.synchronize()
    except LeftOut as reason:
        print(f"{name}, {dtype}: left out, {reason}")
        return True
    except Exception as error:  # whatever it is, the other checks are still worth their time
        wrong.append(f"after {what}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    print(f"{name}, {dtype}: {'; '.join(wrong) or 'well'}", flush=True)
    return not wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks asked for; returns 1 if one fails."""
    known = checks()
    parser = argparse.ArgumentParser(prog="smoke.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"NAME: expected of {', '.join(known)}, got {', '.join(unknown)}")
    return run(known, options.names or list(known), options.dtype)


def run(known: Mapping[str, Callable[[torch.dtype], Compared]], names: Sequence[str], dtypes: Sequence[str]) -> int:
    """Runs these checks, in a new process those after one that lost the CUDA context."""
    failed = []
    for place, name in enumerate(names):
        failed += [f"{name}, {dtype}" for dtype in dtypes if not passes(name, dtype, known[name])]
        if context_is_lost():
            print(f"{LOST} since {name}", flush=True)
            rest = names[place + 1 :]
            if rest:
                subprocess.run([sys.executable, "-m", "benchmarks.smoke", *rest, "--dtype", *dtypes])
            break
    if failed:
        print(f"failed: {'; '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
