"""Every test sees poisoned uninitialised memory; kernels run on the GPU if there is one, else interpreted."""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so it is set before any kernel module is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import conformance
import pytest
import without_hypothesis

from vgpo_kernels import _native

pytest_plugins = ["tests.tools.record", "tests.tools.cuda_faults", "gpu_arithmetic"]
HAS_HYPOTHESIS = not without_hypothesis.install()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_IN_CI = os.environ.get("CI", "").lower() == "true"


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where kernels are tested; those of CPUs on the CPU."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return "cpu" if parameters.get("impl") == "native" else DEVICE


def pytest_configure() -> None:
    """Draws the same random cases in every run: a red run then says something about the change under test."""
    if HAS_HYPOTHESIS:
        from hypothesis import settings

        settings.register_profile("repeatable", derandomize=True)
        settings.load_profile("repeatable")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that asks for `capability` on every instruction set that this processor has."""
    if "capability" in metafunc.fixturenames:
        metafunc.parametrize("capability", _native.capabilities() if not _native.missing() else [None], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests of the CPU kernels where these are not built, as in a copy of the sources; CI=true fails them."""
    missing = _native.missing()
    if missing is None or _IN_CI:
        return
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("impl") == "native":
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture
def capability(request: pytest.FixtureRequest):
    """The instruction set that the CPU kernels use in the test; without the kernels the test is skipped, but fails
    under CI=true."""
    if _native.missing():
        (pytest.fail if _IN_CI else pytest.skip)(_native.missing())
    before = _native.capability()
    _native.set_capability(request.param)
    yield request.param
    _native.set_capability(before)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills torch.empty with NaN (or the largest integer), so that reading what was never written shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session", params=conformance.NAMES)
def conformance_vectors(request: pytest.FixtureRequest) -> conformance.Vectors:
    """Each file of conformance vectors in turn; without them a test is skipped, but fails under CI=true."""
    try:
        return conformance.load(request.param)
    except FileNotFoundError as missing:
        if _IN_CI:
            pytest.fail(str(missing))
        pytest.skip(str(missing))
