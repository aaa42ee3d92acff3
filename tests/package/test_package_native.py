"""What all CPU kernels stand on: arguments, conversions, exp and tanh, products, threads, instruction sets."""

import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vgpo_kernels import _native, logits_policy_loss
from vgpo_kernels.testing import assert_error_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXP, TANH, COPY = 0, 1, 2
pytestmark = pytest.mark.usefixtures("capability")


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def elementwise(x, which, dtype=torch.float32):
    out = torch.empty_like(x, dtype=dtype)
    _native.call("elementwise", out, x, which)
    return out


def every_float():
    """All floats of every 1021st pattern of bits (a prime: every exponent, all kinds of mantissas)."""
    return torch.arange(-(2**31), 2**31, 1021).int().view(torch.float32)


def test_exp_within_its_stated_error():
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


def test_exp_of_special_values():
    x = torch.tensor([-float("inf"), -0.0, 0.0, float("inf"), float("nan"), -3e38, 3e38, 1e-45])
    expected = torch.tensor([0.0, 1, 1, float("inf"), float("nan"), 0, float("inf"), 1])
    torch.testing.assert_close(elementwise(x, EXP), expected, rtol=0, atol=0, equal_nan=True)


def test_tanh_within_its_stated_error():
    x = torch.cat([torch.linspace(-12, 12, 1_000_001), torch.linspace(-0.7, 0.7, 500_001), every_float()])
    x = x[~x.isnan() & (x != 0)]
    actual, exact = elementwise(x, TANH).double(), x.double().tanh()
    assert ((actual - exact).abs() / exact.abs()).max() < 2**-21


def test_tanh_of_special_values():
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
def test_every_half_value_widens_as_in_torch(dtype):
    values = torch.arange(-(2**15), 2**15).short().view(dtype)
    assert_same_bits(elementwise(values, COPY), values.float())
    assert_same_bits(elementwise(values, COPY, dtype), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_narrow_as_in_torch(dtype):
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
def test_elements_beyond_the_last_are_left_alone(dtype, step):
    for count in range(40):  # every rest of a vector
        storage = torch.full((count * step + 40,), 7.0, dtype=dtype)
        _native.call("elementwise", storage[: count * step : step], torch.zeros(count, dtype=dtype), EXP)
        expected = torch.full_like(storage, 7)
        expected[: count * step : step] = 1
        assert torch.equal(storage, expected)


def check_product(left, right, *, add=False, out=None):
    """Compares with float64, and returns the product."""
    out = torch.empty(len(left), right.shape[1]) if out is None else out
    start = torch.randn(out.shape) if add else torch.zeros(out.shape)
    out.copy_(start if add else torch.full_like(out, float("nan")))
    _native.call("product", out, left, right, add)
    same_dtype = start + left.float() @ right.float()
    assert_error_budget("product", out, same_dtype, start.double() + left.double() @ right.double())
    return out


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (1, 1, 1),
        (67, 129, 101),  # tiles cut on every side
        (8, 512, 48),  # exactly a tile of the widest vectors, and a block of the depth
        (261, 40, 37),  # a block of rows and a rest
        (5, 521, 53),  # blocks of the depth and a rest
        (3, 17, 3100),  # more columns than are packed at once
    ],
)
def test_products(m, k, n, dtype, add):
    left, right = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    check_product(left, right, add=add)
    check_product(left, right.t().contiguous().t(), add=add)
    check_product(left.t().contiguous().t(), right, add=add)


def test_operands_of_two_dtypes_are_refused():
    with pytest.raises(ValueError, match="right: expected the type of left"):
        _native.call("product", torch.empty(2, 4), torch.empty(2, 3), torch.empty(3, 4).bfloat16(), False)


def test_products_of_nothing():
    check_product(torch.empty(0, 3), torch.empty(3, 5))
    check_product(torch.empty(4, 3), torch.empty(3, 0))
    assert torch.equal(check_product(torch.empty(4, 0), torch.empty(0, 5)), torch.zeros(4, 5))
    check_product(torch.empty(4, 0), torch.empty(0, 5), add=True)


def test_a_nan_stays_in_its_row_and_column():
    left, right = torch.randn(20, 30), torch.randn(30, 60)
    left[3, 4] = float("nan")
    right[5, 6] = float("inf")
    out = torch.empty(20, 60)
    _native.call("product", out, left, right, False)
    expected = left @ right
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(out.isnan(), expected.isnan())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_products_of_any_sizes_and_strides(data):
    m, k, n = (data.draw(st.integers(0, 70)) for _ in range(3))

    def strided(rows, columns, dtype):
        steps = [data.draw(st.sampled_from([0, 1, 1, 2, 3])) for _ in range(2)]
        lengths = [max(size * step, 1) for size, step in zip((rows, columns), steps, strict=True)]
        offset = data.draw(st.integers(0, 1))
        by_rows = data.draw(st.booleans())
        strides = (steps[0] * lengths[1], steps[1]) if by_rows else (steps[0], steps[1] * lengths[0])
        return torch.randn(lengths[0] * lengths[1] + offset).to(dtype).as_strided((rows, columns), strides, offset)

    dtype = data.draw(st.sampled_from(DTYPES))
    left, right = strided(m, k, dtype), strided(k, n, dtype)
    out = torch.empty(m, 2 * n + 1)[:, 1::2] if data.draw(st.booleans()) else torch.empty(n, m).t()
    check_product(left, right, add=data.draw(st.booleans()), out=out)


@pytest.mark.parametrize("add", [False, True])
def test_products_are_bit_identical_whatever_the_number_of_threads(threads, add):
    left, right = torch.randn(300, 530), torch.randn(530, 3200)
    outs = []
    for count in (1, 2, 3, 7):
        threads(count)
        outs.append(torch.ones(300, 3200))
        _native.call("product", outs[-1], left, right, add)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_two_python_threads_at_once(threads):
    threads(2)
    left, right = torch.randn(200, 300), torch.randn(300, 400)
    expected = check_product(left, right)
    wrong = []

    def work():
        out = torch.empty(200, 400)
        for _ in range(30):
            out.zero_()
            _native.call("product", out, left, right, False)
            wrong.append(not torch.equal(out, expected))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(wrong) == 60
    assert not any(wrong)


X, Y = torch.zeros(3, 4), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 5), X, Y), TypeError, "expected 5 arguments, got 4"),
        ((torch.zeros(3, 5), X, Y, False, 1), TypeError, "expected 5 arguments, got 6"),
        ((torch.zeros(3, 5), X, torch.zeros(3, 5), False), ValueError, "right: expected size 4 in dimension 0, got 3"),
        ((torch.zeros(2, 5), X, Y, False), ValueError, "out: expected size 3 in dimension 0, got 2"),
        ((torch.zeros(3, 4), X, Y, False), ValueError, "out: expected size 5 in dimension 1, got 4"),
        ((torch.zeros(15), X, Y, False), TypeError, "argument 0: expected a tensor of 2 dimensions"),
        ((None, X, Y, False), TypeError, "argument 0: expected a tensor of 2 dimensions"),
        ((torch.zeros(3, 5).half(), X, Y, False), TypeError, "argument 0: expected a tensor of another dtype"),
        ((torch.zeros(3, 5), X, Y.double(), False), TypeError, "argument 2: expected a tensor of float32, bfloat16"),
        ((torch.zeros(3, 5), X, Y.long(), False), TypeError, "argument 2: expected a tensor of float32, bfloat16"),
        ((torch.zeros(3, 5), X, Y.to(torch.complex64), False), TypeError, "no CPU kernel takes torch.complex64"),
        ((torch.zeros(3, 5), X, Y.to("meta"), False), ValueError, "on the CPU, got one on meta"),
        ((torch.zeros(3, 5), X, Y.to_sparse(), False), ValueError, "plain strided tensor .* torch.sparse_coo"),
        ((torch.zeros(3, 5), X, Y, "no"), TypeError, "argument 3: "),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        _native.call("product", *arguments)


def test_a_capability_that_is_none():
    before = _native.capability()
    with pytest.raises(ValueError, match=r"capability: expected one of 'portable'.*, got 'sse'"):
        _native.set_capability("sse")
    assert _native.capability() == before


def test_memory_that_is_not_there_or_lies_between_elements():
    out, x = torch.empty(4), torch.randn(4)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="argument 1: expected a tensor with memory"):
        _native.call("elementwise", out, x, EXP)
    between = (torch.empty(4).data_ptr() + 1, 0, 3, 1)
    with pytest.raises(ValueError, match="argument 0: expected an address that is a multiple"):
        _native._module().elementwise(between, between, EXP, 1)


def test_elements_that_lie_across_those_of_memory():
    out, x = (torch.frombuffer(bytearray(41), dtype=torch.float32, offset=1) for _ in range(2))
    x.copy_(torch.randn(10))
    _native.call("elementwise", out, x, EXP)
    torch.testing.assert_close(out, x.exp())


def test_logits_that_do_so():
    found = []
    for impl, offset in (("native", 1), ("reference", 0)):
        logits = torch.frombuffer(bytearray(72 + offset), dtype=torch.float32, offset=offset).view(1, 3, 6)
        logits.copy_(torch.arange(18).view(1, 3, 6).sin()).requires_grad_()
        given = torch.tensor([[1, 0, 5]]), None, torch.ones(1), torch.ones(1, 3, dtype=torch.bool)
        loss = logits_policy_loss(logits, *given, impl=impl).loss
        found.append((loss, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(*found)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_kernels_run_on_the_threads_of_torch():
    assert "libgomp" in Path("/proc/self/maps").read_text()  # as in torch's wheels for Linux
    assert _native.threads() == "torch's"


def test_results_are_the_same_on_own_threads(threads):
    threads(3)
    left, right = torch.randn(300, 70), torch.randn(70, 200)
    found = []
    for addresses in ((0, 0), _native._openmp()):
        _native._module().set_threads(addresses)
        found.append(torch.empty(300, 200))
        _native.call("product", found[-1], left, right, False)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], None),
        (["/usr/lib/libgomp.so.1"], "/usr/lib/libgomp.so.1"),
        (["/env/sklearn.libs/libgomp-1.so.1", "/env/torch/lib/libgomp.so.1"], "/env/torch/lib/libgomp.so.1"),
        (["/env/sk learn/libgomp.so.1", "/env/torch.libs/libgomp-2.so"], "/env/torch.libs/libgomp-2.so"),
        (["/env/sklearn.libs/libgomp-1.so.1", "/usr/lib/libgomp.so.1"], None),
        (["/env/torch/lib/libiomp5.so"], None),
    ],
)
def test_the_runtime_of_torch_is_told_from_others(paths, expected):
    lines = [f"7f00-7f{place:02}1 r-xp 00000000 08:01 42    {path}" for path in paths for place in (1, 2)]
    assert _native.openmp_of_torch("\n".join(["7f-80 rw-p 00000000 00:00 0 ", *lines]), "/env/torch") == expected


def test_no_thread_is_refused():
    csrc = _native._module()
    vector = (torch.empty(4).data_ptr(), 0, 4, 1)
    for threads in (0, -1):
        with pytest.raises(ValueError, match="threads: expected at least 1"):
            csrc.elementwise(vector, vector, EXP, threads)


def test_addresses_of_threads_that_are_none():
    for addresses in ((1,), None, ("a", "b")):
        with pytest.raises((TypeError, SystemError)):
            _native._module().set_threads(addresses)


def test_a_capability_that_is_no_name():
    for name in (b"avx2", 10**30, None):
        with pytest.raises(ValueError, match="capability: expected one of"):
            _native.set_capability(name)
        with pytest.raises(TypeError, match="expected a str, got"):
            _native._module().set_capability(name)
    with pytest.raises(ValueError, match=f"up to '{_native.capabilities()[-1]}', got 'sse'"):
        _native._module().set_capability("sse")


def test_an_extension_of_other_sources_says_so():
    with pytest.raises(RuntimeError, match="built from other sources, without 'newer': install a C"):
        _native.call("newer")
