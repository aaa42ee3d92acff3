"""`python -m vgpo_kernels doctor`: what it says, and when it fails."""

import importlib.metadata

import pytest
import torch
from package_launch import WITHOUT_EXTENSION, python

from vgpo_kernels import __version__, _dispatch, _doctor, _native
from vgpo_kernels.__main__ import main


def test_the_report():
    done = python("-m", "vgpo_kernels", "doctor", VGPO_DEBUG="1")
    assert done.returncode == 0, done.stderr
    cells = [line.split() for line in done.stdout.splitlines()]
    assert ["torch", importlib.metadata.version("torch")] in cells
    assert ["vgpo-kernels", __version__] in cells
    assert ["VGPO_DEBUG", "1"] in cells
    assert ["TRITON_INTERPRET", "not", "set"] in cells
    assert ["VGPO_CPU_CAPABILITY", "not", "set"] in cells
    assert ["vgpo_weights,", "recipe", "official", "reference", "on", "every", "device"] in cells
    for operation in _doctor.OPERATIONS:
        if not _native.missing():
            assert [operation, "cpu", "native", "CPU", "tensors"] in cells
        if torch.cuda.is_available():
            assert [operation, "cuda:0", "triton", "cuda", "tensors"] in cells
    assert ("none" in done.stdout) == (not torch.cuda.is_available())


def test_the_instruction_set_in_use_is_told(capability):
    done = python("-m", "vgpo_kernels", "doctor", VGPO_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr
    cells = [line.split() for line in done.stdout.splitlines()]
    assert ["built", "yes"] in cells
    assert ["in", "use", capability] in cells
    assert ["usable", *", ".join(_native.capabilities()).split()] in cells
    assert ["VGPO_CPU_CAPABILITY", capability] in cells


@pytest.mark.skipif(bool(_native.missing()), reason="the CPU kernels are not built")
def test_an_unknown_instruction_set_is_an_error():
    done = python("-m", "vgpo_kernels", "doctor", VGPO_CPU_CAPABILITY="mmx")
    assert done.returncode == 1
    names = ", ".join(map(repr, _native.capabilities()))
    assert f"VGPO_CPU_CAPABILITY: expected one of {names}, got 'mmx'" in done.stdout
    assert "Traceback" not in done.stderr


def test_without_the_extension_the_reference_runs_and_the_remedy_is_told():
    done = python("-c", WITHOUT_EXTENSION + "from vgpo_kernels.__main__ import main; sys.exit(main(['doctor']))")
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    for operation in _doctor.OPERATIONS:
        [row] = [row for row in rows if row.split()[:2] == [operation, "cpu"]]
        assert row.split()[2] == "reference"
        assert "the CPU kernels are not built" in row
        assert "apt-get" not in row
    [built] = [row for row in rows if row.split()[:1] == ["built"]]
    assert "no: the CPU kernels are not built" in built
    assert "apt-get install g++ python3-dev), then python setup.py build_ext --inplace, in this checkout" in built


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
    assert report.count("cpu     reference" if _native.missing() else "cpu     native") == len(_doctor.OPERATIONS)


def test_a_gpu_is_named_with_its_kernels(monkeypatch, capsys):
    pytest.importorskip("triton")
    devices = [(torch.device("cuda:0"), "NVIDIA H200, capability 9.0, 139.8 GiB")]
    monkeypatch.setattr(_doctor, "present_devices", lambda: devices)
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "cuda:0  NVIDIA H200, capability 9.0, 139.8 GiB" in report
    assert report.count("cuda:0  triton  cuda tensors") == len(_doctor.OPERATIONS)


def test_a_module_that_cannot_be_loaded_is_told(monkeypatch):
    def fail(name, device):
        raise ImportError(f"cannot load {name} on {device}")

    monkeypatch.setitem(_doctor.OPERATIONS, "attention_mass", fail)
    [(row, runs), *_] = _doctor.operation_rows([torch.device("cpu")])
    assert not runs
    module = "reference" if _native.missing() else "native"
    assert row == ("attention_mass", "cpu", "cannot run", f"cannot load {module} on cpu")


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "doctor" in capsys.readouterr().err
