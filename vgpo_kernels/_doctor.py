"""`python -m vgpo_kernels doctor`: versions, devices, and which implementation each operation would use."""

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vgpo_kernels import _compile, _dispatch, _native
from vgpo_kernels.attention.backend import backend as attention
from vgpo_kernels.focus.backend import backend as focus
from vgpo_kernels.policy_loss.backend import backend as policy_loss
from vgpo_kernels.vocabulary.backend import backend as vocabulary
from vgpo_kernels.weights.backend import backend as weights

OPERATIONS = {
    "attention_mass": attention,
    "attention_column_sum": attention,
    "visual_attention": attention,
    "visual_focus_score": focus,
    "vgpo_weights": weights,
    "policy_loss": policy_loss,
    "linear_logprobs": vocabulary,
    "linear_policy_loss": vocabulary,
    "linear_visual_dependency": vocabulary,
    "logits_policy_loss": vocabulary,
    "selective_logprobs": vocabulary,
}
WITHOUT_KERNELS = [("vgpo_weights, recipe official", "reference on every device")]
# What each is called where it is installed; Triton comes under another name with PyTorch for ROCm.
DISTRIBUTIONS = {
    "vgpo-kernels": ("vgpo-kernels",),
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"),
    "transformers": ("transformers",),
    "deepspeed": ("deepspeed",),
    "liger-kernel": ("liger-kernel",),
    "trl": ("trl",),
    "peft": ("peft",),
}
SWITCHES = ("TRITON_INTERPRET", "VGPO_DEBUG", _native.CAPABILITY)


def add_command(commands: Any) -> None:
    """Adds `doctor` to the command line."""
    parser = commands.add_parser("doctor", help="print versions, devices and what would run, and why")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Prints the report; returns 1 where no operation can run on any device."""
    devices = present_devices()
    choices = operation_rows([device for device, _ in devices])
    sections: dict[str, Sequence[Sequence[str]]] = {
        "Versions": [("python", platform.python_version()), *installed_versions()],
        "Devices": [*((str(device), what) for device, what in devices), *_no_gpu(devices)],
        "CPU kernels": cpu_kernels(),
        "Environment": [(name, os.environ.get(name, "not set")) for name in SWITCHES],
        "Operations": [row for row, _ in choices],
        "Without kernels": WITHOUT_KERNELS,
    }
    print("\n\n".join(f"{title}\n{aligned(rows)}" for title, rows in sections.items()))
    return 0 if any(runs for _, runs in choices) else 1


def installed_versions() -> list[tuple[str, str]]:
    """Returns the version of each distribution, read without importing it."""
    return [(name, _version(aliases)) for name, aliases in DISTRIBUTIONS.items()]


def _version(aliases: Iterable[str]) -> str:
    for name in aliases:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def present_devices() -> list[tuple[torch.device, str]]:
    """Returns the CPU and each GPU that torch can use, with a description."""
    return [(torch.device("cpu"), _cpu()), *_gpus()]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {_compile.usable_cores()} of {os.cpu_count()} cores usable"


def _gpus() -> list[tuple[torch.device, str]]:
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        kind = f"capability {properties.major}.{properties.minor}"
        if torch.version.hip:
            kind = str(properties.gcnArchName)
        memory = f"{properties.total_memory / 2**30:.1f} GiB"
        gpus.append((torch.device("cuda", index), f"{properties.name}, {kind}, {memory}"))
    return gpus


def _no_gpu(devices: Sequence[tuple[torch.device, str]]) -> list[tuple[str, str]]:
    """Returns why there is no GPU, where there is none."""
    if any(device.type == "cuda" for device, _ in devices):
        return []
    built = torch.version.cuda or torch.version.hip
    return [("gpu", "none visible" if built else "none: this torch is built without CUDA and ROCm")]


def cpu_kernels() -> list[tuple[str, str]]:
    """Returns whether the compiled CPU kernels are there, and for which instruction sets, or why not and the remedy."""
    try:
        obstacle = _native.missing()
    except ValueError as error:
        return [("cannot run", str(error))]
    if obstacle is not None:
        return [("built", f"no: {obstacle}")]
    return [
        ("built", "yes"),
        ("in use", _native.capability()),
        ("usable", ", ".join(_native.capabilities())),
    ]


def operation_rows(devices: Sequence[torch.device]) -> list[tuple[tuple[str, ...], bool]]:
    """Returns, for each operation and device, a row of the report and whether the operation can run there."""
    return [_operation_row(name, backend, device) for name, backend in OPERATIONS.items() for device in devices]


def _operation_row(
    operation: str, backend: Callable[[str, torch.device], Any], device: torch.device
) -> tuple[tuple[str, ...], bool]:
    try:
        name, why = _dispatch.choose(None, device)
        backend(name, device)
    except (ImportError, RuntimeError, ValueError) as error:
        return (operation, str(device), "cannot run", str(error)), False
    return (operation, str(device), name, why), True


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns the rows as lines, their columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
