"""Which implementation of an operation runs, and why.

Each family of operations holds its implementations as modules with the same functions: Triton kernels, `native` (the
compiled CPU kernels of csrc/) and `reference` (plain torch). `choose` names the one that runs; `backend` of the family
imports it then, so that Triton is loaded only if it is used.
"""

import functools
import importlib.util
import os

import torch

from vgpo_kernels import _native

IMPLEMENTATIONS = ("triton", "native", "reference")
_TRITON_MISSING = "Triton is not installed: pip install 'vgpo-kernels[triton]', or pass impl='reference'"


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported (it is not imported here)."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, so that they take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def debugging() -> bool:
    """Whether VGPO_DEBUG=1 asks the kernels to check values too, at the price of a device sync."""
    return os.environ.get("VGPO_DEBUG") == "1"


def choose(impl: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """Returns the implementation for tensors of this device and dtype, with the reason.

    Args:
        impl: "triton", "native", "reference", or None to choose by device.
        device: where the tensors are.
        dtype: of the main input; only the reference takes float64.

    Raises:
        ValueError: `impl` is no known name.
        RuntimeError: the implementation cannot run here; the message says what to do.
    """
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLEMENTATIONS))} or None, got {impl!r}")
    if impl is None and device.type == "cpu":
        obstacle = _no_native(device, dtype)
        # The remedy is printed by `doctor`, and by the error of impl='native'.
        return ("native", "CPU tensors") if obstacle is None else ("reference", obstacle.partition(":")[0])
    if impl == "reference":
        return "reference", "asked for"
    obstacle = _no_native(device, dtype) if impl == "native" else _no_triton(device, dtype)
    if obstacle is not None:
        raise RuntimeError(obstacle if "impl=" in obstacle else f"{obstacle}, or pass impl='reference'")
    return impl or "triton", "asked for" if impl else f"{device.type} tensors"


def _no_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why the CPU kernels cannot run, or None."""
    if device.type != "cpu":
        return f"the CPU kernels take no tensors on {device.type!r}: pass impl='triton' or 'reference'"
    if dtype == torch.float64:
        return "the CPU kernels take no float64: pass impl='reference'"
    return _native.missing()


def _no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why the Triton kernels cannot run, or None."""
    if not has_triton():
        return _TRITON_MISSING
    if device.type == "cpu" and not interpreting():
        return (
            "impl='triton' takes CPU tensors only under TRITON_INTERPRET=1, set before Triton is imported: "
            "pass impl='native' or 'reference'"
        )
    if device.type not in ("cuda", "cpu"):
        return f"no Triton kernels for device type {device.type!r}: pass impl='reference'"
    if dtype == torch.float64:
        return "the Triton kernels take no float64: pass impl='reference'"
    return None


def checks_values(impl: str | None, tensor: torch.Tensor) -> bool:
    """Whether an operation reads its inputs' values for errors: on the reference and on CPUs, and when debugging."""
    return debugging() or choose(impl, tensor.device, tensor.dtype)[0] != "triton"
