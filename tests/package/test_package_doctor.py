"""`python -m vgpo_kernels doctor`: what it says, and when it fails."""

import importlib.metadata

import pytest
import torch
from package_launch import python

from vgpo_kernels import __version__, _dispatch, _doctor
from vgpo_kernels.__main__ import main


def test_the_report():
    done = python("-m", "vgpo_kernels", "doctor", VGPO_DEBUG="1")
    assert done.returncode == 0, done.stderr
    cells = [line.split() for line in done.stdout.splitlines()]
    assert ["torch", importlib.metadata.version("torch")] in cells
    assert ["vgpo-kernels", __version__] in cells
    assert ["VGPO_DEBUG", "1"] in cells
    assert ["TRITON_INTERPRET", "not", "set"] in cells
    for operation in _doctor.OPERATIONS:
        assert [operation, "cpu", "reference", "CPU", "tensors"] in cells
        if torch.cuda.is_available():
            assert [operation, "cuda:0", "triton", "cuda", "tensors"] in cells
    assert ("none" in done.stdout) == (not torch.cuda.is_available())


def test_what_is_not_installed_is_said(monkeypatch):
    def version(name):
        if name == "torch":
            return "9.9"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = dict(_doctor.installed_versions())
    assert versions["torch"] == "9.9"
    assert {versions[name] for name in ("triton", "transformers", "deepspeed", "trl")} == {"not installed"}


@pytest.fixture
def gpu_without_triton(monkeypatch):
    """A machine whose only device is a GPU, and no Triton."""
    monkeypatch.setattr(_doctor, "present_devices", lambda: [(torch.device("cuda:0"), "a GPU")])
    monkeypatch.setattr(_dispatch, "has_triton", lambda: False)


@pytest.mark.usefixtures("gpu_without_triton")
def test_nothing_runs(capsys):
    assert main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert report.count("cuda:0  cannot run  Triton is not installed: pip install 'vgpo-kernels[triton]'") == len(
        _doctor.OPERATIONS
    )


def test_one_operation_is_enough(monkeypatch, capsys):
    devices = [(torch.device("cpu"), "a CPU"), (torch.device("cuda:0"), "a GPU")]
    monkeypatch.setattr(_doctor, "present_devices", lambda: devices)
    monkeypatch.setattr(_dispatch, "has_triton", lambda: False)
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert report.count("cannot run") == len(_doctor.OPERATIONS)
    assert report.count("reference") >= len(_doctor.OPERATIONS)


def test_a_gpu_is_named_with_its_kernels(monkeypatch, capsys):
    pytest.importorskip("triton")
    devices = [(torch.device("cuda:0"), "NVIDIA H200, capability 9.0, 139.8 GiB")]
    monkeypatch.setattr(_doctor, "present_devices", lambda: devices)
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "cuda:0  NVIDIA H200, capability 9.0, 139.8 GiB" in report
    assert report.count("cuda:0  triton  cuda tensors") == len(_doctor.OPERATIONS)


def test_a_broken_triton_is_told(monkeypatch):
    def fail(name):
        raise ImportError(f"cannot load {name}")

    monkeypatch.setattr(_doctor.importlib, "import_module", fail)
    [(row, runs), *_] = _doctor.operation_rows([torch.device("cpu")])
    assert not runs
    assert row == ("attention_mass", "cpu", "cannot run", "cannot load vgpo_kernels.attention.reference")


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "doctor" in capsys.readouterr().err
