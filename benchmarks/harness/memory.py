"""How far memory rises in a call: by the allocator's count on a GPU, else by the resident set of a fresh process."""

import gc
import importlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.timing import give_memory_back

# What providers load at their first call, loaded once for all the processes that measure them.
PRELOADED = [
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "vgpo_kernels",
    "liger_kernel.chunked_loss",
    "trl.trainer.utils",
]


def tensors_of(values: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested tuples, lists and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors_of(list(values.values()))
    elif isinstance(values, Sequence) and not isinstance(values, str):
        for value in values:
            yield from tensors_of(value)


def bytes_of(values: Any) -> int:
    """Returns the bytes of the storages behind the tensors in `values`, each counted once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(values)}
    return sum(storages.values())


def cuda_peak(call: Callable[[], Any], device: torch.device) -> int:
    """Returns the bytes that a call takes at its peak, beyond what was live before it and what it returns."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before - bytes_of(result))


def resident_peak(call: Callable[[], Any]) -> int:
    """Returns the bytes that the resident set of this process rises by in a call, beyond what the call returns."""
    gc.collect()
    give_memory_back()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = _status("VmRSS")
    result = call()
    return max(0, _status("VmHWM") - before - bytes_of(result))


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def fresh_process_peak(module: str, task: str, case: str, provider: str) -> int | None:
    """Returns `resident_peak` of one provider of a task in a process that ran nothing before; None off Linux.

    Args:
        module: name of the benchmark module that defines the task.
        task, case, provider: their names.

    Raises:
        RuntimeError: the process died, as one that ran out of memory does.
    """
    if sys.platform != "linux":
        return None
    # Such a process is forked from a server that has imported much and run nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(
        target=_send_peak, args=(sender, module, task, case, provider, torch.get_num_threads()), daemon=True
    )
    worker.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        worker.join()
        raise RuntimeError(f"the process that measured memory died with exit code {worker.exitcode}") from None
    worker.join()
    if isinstance(answer, str):
        raise RuntimeError(f"the process that measured memory failed: {answer}")
    return answer


def _send_peak(sender: Connection, module: str, task: str, case: str, provider: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        sender.send(_peak_of(module, task, case, provider))
    except Exception as error:  # whatever it is, the parent is to say it
        sender.send(f"{type(error).__name__}: {error}")


def _peak_of(module: str, task: str, case: str, provider: str) -> int:
    importlib.import_module(module)
    from benchmarks.harness.cases import TASKS

    found, device = TASKS[task], torch.device("cpu")
    run, inputs = found.providers[provider].run, found.inputs(found.case(case), device)
    # What a first call loads, or compiles for these sizes, or keeps of a forward is not what calls take.
    first = inputs if found.providers[provider].compiled or found.keeps_forward else found.inputs(found.tiny, device)
    run(first)
    return resident_peak(lambda: run(inputs))
