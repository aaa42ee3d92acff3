"""The compiled CPU kernels of csrc/: whether they are built, and how tensors are passed to them."""

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
    if not hasattr(module, "set_parallel_for"):
        return f"the CPU kernels were built from other sources: {_REMEDY}"
    module.set_parallel_for(_torch_parallel_for())
    # A forked child has none of the parent's threads, and would wait for them for ever.
    os.register_at_fork(after_in_child=lambda: module.set_parallel_for(0))
    wanted = os.environ.get(CAPABILITY)
    if wanted:
        check_choice(CAPABILITY, wanted, module.capabilities())
        module.set_capability(wanted)
    return module


def _torch_parallel_for() -> int:
    """Returns the address of torch's stable parallel-for; kernels use it without being linked to torch."""
    return ctypes.cast(ctypes.CDLL(torch._C.__file__).torch_parallel_for, ctypes.c_void_p).value or 0


def missing() -> str | None:
    """Returns why the CPU kernels cannot run, with the remedy; None if they can."""
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
    """Makes the kernels use that instruction set; ValueError if this processor lacks it."""
    check_choice("capability", name, capabilities())
    _module().set_capability(name)


def _module() -> ModuleType:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def call(kernel: str, *arguments: Any) -> None:
    """Runs a kernel of csrc/signatures.h, on torch's threads, as many as `torch.set_num_threads` allows.

    Args:
        kernel: its name.
        arguments: as in its signature, but for the number of threads; tensors of any strides. Of the outputs the
            first alone may be of a caller, in memory of any alignment.

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
    """Returns the tensor, or a copy if its address is not a multiple of the size of its elements."""
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_neg():
        raise ValueError(f"expected a plain strided tensor on the CPU, got one on {tensor.device}, {tensor.layout}")
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _fields(tensor: Tensor) -> tuple[int, ...]:
    """Returns what csrc/module.cpp makes a tensor of."""
    code = _CODES.get(tensor.dtype)
    if code is None:
        raise TypeError(f"no CPU kernel takes {tensor.dtype}")
    return (tensor.data_ptr(), code, *tensor.shape, *tensor.stride())
