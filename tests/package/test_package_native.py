"""What the CPU kernels share: arguments, products, threads, instruction sets."""

import ctypes
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vgpo_kernels import _native, logits_policy_loss
from vgpo_kernels.testing import assert_error_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("capability")


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
    out, x = torch.empty(4, 4), torch.randn(4, 4)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="argument 1: expected a tensor with memory"):
        _native.call("product", out, x, out, False)
    between = (out.data_ptr() + 1, 0, 3, 3, 4, 1)
    with pytest.raises(ValueError, match="argument 0: expected an address that is a multiple"):
        _native._module().product(between, between, between, False, 1)


def test_elements_that_lie_across_those_of_memory():
    out, x = (torch.frombuffer(bytearray(65), dtype=torch.float32, offset=1).view(4, 4) for _ in range(2))
    x.copy_(torch.randn(4, 4))
    check_product(x, x, out=out)


def test_logits_that_do_so():
    found = []
    for impl, offset in (("native", 1), ("reference", 0)):
        logits = torch.frombuffer(bytearray(72 + offset), dtype=torch.float32, offset=offset).view(1, 3, 6)
        logits.copy_(torch.arange(18).view(1, 3, 6).sin()).requires_grad_()
        given = torch.tensor([[1, 0, 5]]), None, torch.ones(1), torch.ones(1, 3, dtype=torch.bool)
        loss = logits_policy_loss(logits, *given, impl=impl).loss
        found.append((loss, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(*found)


def test_kernels_run_on_the_threads_of_torch(threads):
    """Of two threads each is one of torch's, and the results are those of the caller's thread alone."""
    threads(2)
    left, right = torch.randn(300, 70), torch.randn(70, 200)
    calls = []
    kind = ctypes.CFUNCTYPE(*[ctypes.c_int64] * 4, ctypes.c_void_p, ctypes.c_void_p)
    original = kind(_native._torch_parallel_for())

    @kind
    def counted(begin, end, grain, body, context):
        calls.append(end - begin)
        return original(begin, end, grain, body, context)

    found = []
    for address in (ctypes.cast(counted, ctypes.c_void_p).value, 0, _native._torch_parallel_for()):
        _native._module().set_parallel_for(address)
        found.append(torch.empty(300, 200))
        _native.call("product", found[-1], left, right, False)
    assert calls
    assert set(calls) == {2}
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_call_from_a_backward(threads):
    """Autograd's functions call kernels, from whichever thread it runs them on."""
    threads(2)
    logits = torch.randn(2, 40, 5000, requires_grad=True)
    given = torch.randint(5000, (2, 40)), None, torch.ones(2), torch.ones(2, 40, dtype=torch.bool)
    expected = torch.autograd.grad(logits_policy_loss(logits, *given, impl="native").loss, logits)
    found = []
    loss = logits_policy_loss(logits, *given, impl="native").loss
    worker = threading.Thread(target=lambda: found.extend(torch.autograd.grad(loss, logits)))
    worker.start()
    worker.join()
    assert torch.equal(*found, *expected)


def test_no_thread_is_refused():
    csrc = _native._module()
    matrix = (torch.empty(2, 2).data_ptr(), 0, 2, 2, 2, 1)
    for threads in (0, -1):
        with pytest.raises(ValueError, match="threads: expected at least 1"):
            csrc.product(matrix, matrix, matrix, False, threads)


def test_an_address_that_is_none():
    for address in ((1,), None, "a", -1):
        with pytest.raises((TypeError, OverflowError)):
            _native._module().set_parallel_for(address)


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
