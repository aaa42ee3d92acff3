"""What a file of results says once of all its figures: machine, versions, commit."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import psutil
import torch

from benchmarks.harness.cases import IMPL, half_on_gpu
from benchmarks.peers.attention import stock_backend
from tests.tools.working_tree import read_working_tree
from vgpo_kernels import _doctor, _native

# Peers that the doctor does not ask about.
PEERS = ("cut-cross-entropy", "flash-attn", "flash-attn-3", "flash-colreduce", "quack-kernels")


@functools.cache
def description(device: torch.device) -> dict[str, Any]:
    """Returns what the figures of a device depend on."""
    devices = {kind.type: text for kind, text in reversed(_doctor.present_devices())}
    cuda = device.type == "cuda"
    return {
        "kind": device.type,
        "device": torch.cuda.get_device_name(device) if cuda else devices["cpu"],
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda or torch.version.hip,
        "cpu": devices["cpu"],
        "threads": torch.get_num_threads(),
        # Instruction sets: torch's, its BLAS's where it is told, and ours.
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl_instructions": os.environ.get("MKL_ENABLE_INSTRUCTIONS", "any"),
        "native": _native.missing() or _native.capability(),
        # What "vgpo_kernels" and the stock attention among its peers are.
        "impl": IMPL or "by device",
        "interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        "stock_attention": stock_backend(device, half_on_gpu(device)),
        # The share of processors that other processes take before the first case.
        "busy": psutil.cpu_percent(interval=1.0) / 100,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


@functools.cache
def versions() -> dict[str, str]:
    """Returns the version of each package that figures depend on; those not installed are left out."""
    found = dict(_doctor.installed_versions())
    for name in (*PEERS, "numpy", "pytest-benchmark"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    # Where the checkout is used without being installed, the package itself knows.
    return {name: version for name, version in found.items() if version != "not installed"} | {
        "vgpo-kernels": __import__("vgpo_kernels").__version__
    }


def checkout() -> dict[str, Any]:
    """Returns the checkout's commit, whether files differ from it (results aside), and the source of both or None."""
    try:
        tree = read_working_tree()
    except ValueError:
        return {"commit": None, "dirty": True, "source": None}
    return {"commit": tree.commit, "dirty": tree.dirty, "source": tree.source}
