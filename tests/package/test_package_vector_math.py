"""exp, tanh and the conversions of csrc/simd, of each instruction set that this processor has."""

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vgpo_kernels import _native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXP, TANH, COPY = 0, 1, 2
SOURCE = Path(__file__).parents[1] / "csrc" / "elementwise.cpp"
POINTER, INT = ctypes.c_void_p, ctypes.c_int64
AVX2 = ("-mavx2", "-mfma", "-mf16c")
TARGETS = {
    "portable": ("-DVGPO_TARGET=portable", "-DVGPO_LANES=4"),
    "avx2": ("-DVGPO_TARGET=avx2", "-DVGPO_LANES=8", *AVX2),
    "avx512": ("-DVGPO_TARGET=avx512", "-DVGPO_LANES=16", *AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Returns the function that builds tests/csrc/elementwise.cpp for an instruction set, once, and loads it."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        (pytest.fail if os.environ.get("CI", "").lower() == "true" else pytest.skip)("no C++ compiler")

    @functools.cache
    def build(name):
        library = tmp_path_factory.mktemp("csrc") / f"{name}.so"
        options = ["-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-fPIC", "-shared"]
        subprocess.run([compiler, *options, *TARGETS[name], SOURCE, "-o", library], check=True, capture_output=True)
        return ctypes.CDLL(str(library)).elementwise

    return build


@pytest.fixture
def elementwise(libraries, capability):
    """exp, tanh or a copy of a vector by the functions of csrc/simd."""
    function = libraries(capability)
    function.restype, function.argtypes = None, [POINTER, INT, INT, POINTER, INT, INT, INT, INT]

    def run(x, which, dtype=torch.float32, out=None):
        out = torch.empty_like(x, dtype=dtype) if out is None else out
        places = [y for z in (out, x) for y in (z.data_ptr(), _native._CODES[z.dtype], z.stride(0))]
        function(*places, len(x), which)
        return out

    return run


def every_float():
    """All floats of every 1021st pattern of bits (a prime: every exponent, all kinds of mantissas)."""
    return torch.arange(-(2**31), 2**31, 1021).int().view(torch.float32)


def test_exp_within_its_stated_error(elementwise):
    x = torch.cat([torch.linspace(-110, 90, 1_000_001), every_float()])
    x = x[~x.isnan()]
    actual, exact = elementwise(x, EXP).double(), x.double().exp()
    largest, smallest = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    normal = (exact >= smallest) & (exact <= largest * (1 - 2**-22))
    assert normal.sum() > 800_000
    assert ((actual - exact).abs() / exact)[normal].max() < 2**-22
    below = exact < smallest
    assert ((exact > 0) & below).sum() > 50_000
    assert (actual - exact)[below].abs().max() < 2**-148
    assert actual[exact > largest * (1 + 2**-22)].eq(float("inf")).all()


def test_exp_of_special_values(elementwise):
    x = torch.tensor([-float("inf"), -0.0, 0.0, float("inf"), float("nan"), -3e38, 3e38, 1e-45])
    expected = torch.tensor([0.0, 1, 1, float("inf"), float("nan"), 0, float("inf"), 1])
    torch.testing.assert_close(elementwise(x, EXP), expected, rtol=0, atol=0, equal_nan=True)


def test_tanh_within_its_stated_error(elementwise):
    x = torch.cat([torch.linspace(-12, 12, 1_000_001), torch.linspace(-0.7, 0.7, 500_001), every_float()])
    x = x[~x.isnan() & (x != 0)]
    actual, exact = elementwise(x, TANH).double(), x.double().tanh()
    assert ((actual - exact).abs() / exact.abs()).max() < 2**-21


def test_tanh_of_special_values(elementwise):
    x = torch.tensor([-float("inf"), 0.0, float("inf"), float("nan"), -3e38, 3e38, 1e-45])
    expected = torch.tensor([-1.0, 0, 1, float("nan"), -1, 1, 1e-45])
    torch.testing.assert_close(elementwise(x, TANH), expected, rtol=0, atol=0, equal_nan=True)


def assert_same_bits(actual, expected):
    """The same floats, -0 apart from 0; of a NaN only that it is one, as torch's payloads differ among themselves."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    assert torch.equal(actual[~nan].view(bits), expected[~nan].view(bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_value_widens_as_in_torch(elementwise, dtype):
    values = torch.arange(-(2**15), 2**15).short().view(dtype)
    assert_same_bits(elementwise(values, COPY), values.float())
    assert_same_bits(elementwise(values, COPY, dtype), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_narrow_as_in_torch(elementwise, dtype):
    # Halfway between any two neighbours (ties), and a float's last bit to either side; then all kinds of floats.
    low = torch.arange(2**15).short().view(dtype)
    low = low[low.isfinite()].float()
    high = torch.cat([low[1:], low[-1:] * 2 - low[-2:-1]])
    halfway = ((low.double() + high.double()) / 2).float()
    near = torch.cat([halfway, halfway.nextafter(low), halfway.nextafter(high), low.nextafter(high), low])
    x = torch.cat([near, -near, every_float()])
    assert_same_bits(elementwise(x, COPY, dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1, 3])
def test_elements_beyond_the_last_are_left_alone(elementwise, dtype, step):
    for count in range(40):  # every rest of a vector
        storage = torch.full((count * step + 40,), 7.0, dtype=dtype)
        elementwise(torch.zeros(count, dtype=dtype), EXP, out=storage[: count * step : step])
        expected = torch.full_like(storage, 7)
        expected[: count * step : step] = 1
        assert torch.equal(storage, expected)
