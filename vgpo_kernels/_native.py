"""The compiled CPU kernels of csrc/: whether they are there, and how tensors reach them."""

import ctypes
import functools
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._validate import check_choice

CAPABILITY = "VGPO_CPU_CAPABILITY"  # in the environment: the instruction set to use instead of the best
# As in csrc/view.h.
_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.uint8: 6,
    torch.bool: 6,
}
# A package beside csrc/ is a checkout, which pip's install elsewhere does not change. pip keeps what it built, so an
# install again, without these options, would bring the same back.
_BUILD = (
    "python setup.py build_ext --inplace, in this checkout"
    if Path(__file__).parents[1].joinpath("csrc", "module.cpp").is_file()
    else "pip install --force-reinstall --no-deps --no-cache-dir vgpo-kernels; with -v pip says what went wrong"
)
_REMEDY = f"install a C++17 compiler (on Debian and Ubuntu: apt-get install g++ python3-dev), then {_BUILD}"


@functools.cache
def _load() -> ModuleType | str:
    """Returns the module, or why there is none."""
    try:
        module = importlib.import_module("vgpo_kernels._csrc")
    except ModuleNotFoundError as error:
        return f"the CPU kernels are not built ({error}): {_REMEDY}"
    except ImportError as error:
        return f"the CPU kernels cannot be loaded ({error}): {_REMEDY}"
    if not hasattr(module, "set_threads"):
        return f"the CPU kernels were built from other sources: {_REMEDY}"
    module.set_threads(_openmp())
    wanted = os.environ.get(CAPABILITY)
    if wanted:
        check_choice(CAPABILITY, wanted, module.capabilities())
        module.set_capability(wanted)
    return module


@functools.cache
def _openmp() -> tuple[int, int]:
    """Returns the addresses of GOMP_parallel and omp_get_thread_num in the runtime that torch runs on, zeros for none.

    torch's threads spin for milliseconds after an operation; threads of our own would share their cores with them.
    """
    maps = Path("/proc/self/maps")
    path = openmp_of_torch(maps.read_text() if maps.exists() else "", str(Path(torch.__file__).resolve().parent))
    if path is None:
        return 0, 0
    runtime = ctypes.CDLL(path)
    first, second = (
        ctypes.cast(entry, ctypes.c_void_p).value or 0 for entry in (runtime.GOMP_parallel, runtime.omp_get_thread_num)
    )
    return first, second


def openmp_of_torch(maps: str, folder: str) -> str | None:
    """Returns the path of GNU's OpenMP runtime that torch runs on, None for another one or one that may not be torch's.

    Args:
        maps: what /proc/self/maps says of the files in this process's memory.
        folder: torch's.
    """
    loaded = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/libgomp" in line}
    # In torch/lib, in torch.libs, or the system's.
    found = {path for path in loaded if path.startswith(folder)} or loaded
    return found.pop() if len(found) == 1 else None


def threads() -> str:
    """Returns whose threads kernels run on: "torch's" or "own"."""
    return "torch's" if any(_openmp()) else "own"


def missing() -> str | None:
    """Returns why the CPU kernels cannot run, with the remedy; None where they can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def capability() -> str:
    """Returns the instruction set that the kernels use: "portable", "avx2" or "avx512"."""
    name: str = _module().capability()
    return name


def capabilities() -> list[str]:
    """Returns the instruction sets that this processor has, best last."""
    names: list[str] = _module().capabilities()
    return names


def set_capability(name: str) -> None:
    """Makes the kernels use that instruction set; ValueError where this processor lacks it."""
    check_choice("capability", name, capabilities())
    _module().set_capability(name)


def _module() -> ModuleType:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def call(kernel: str, *arguments: Any) -> None:
    """Runs a kernel of csrc/signatures.h, on as many threads as torch was told to use, and on torch's own where it can.

    Args:
        kernel: its name.
        arguments: as in its signature, but for the number of threads; tensors as tensors of any strides. What a caller
            may hand over to be written to comes first.

    Raises:
        TypeError: the number of arguments, or the type or rank of one, differs from the signature.
        ValueError: a tensor is not on the CPU, or a size does not fit.
    """
    placed = [_placed(x) if isinstance(x, Tensor) else x for x in arguments]
    fields = [_fields(x) if isinstance(x, Tensor) else x for x in placed]
    run = getattr(_module(), kernel, None)
    if run is None:
        raise RuntimeError(f"the CPU kernels were built from other sources, without {kernel!r}: {_REMEDY}")
    run(*fields, torch.get_num_threads())
    if placed and placed[0] is not arguments[0]:
        arguments[0].copy_(placed[0])


def _placed(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy where its elements lie across those of memory, as a buffer's may."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_neg():
        raise ValueError(f"expected a plain strided tensor on the CPU, got one on {tensor.device}, {tensor.layout}")
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _fields(tensor: Tensor) -> tuple[int, ...]:
    """Returns what csrc/module.cpp makes a tensor of."""
    code = _CODES.get(tensor.dtype)
    if code is None:
        raise TypeError(f"no CPU kernel takes {tensor.dtype}")
    return (tensor.data_ptr(), code, *tensor.shape, *tensor.stride())
