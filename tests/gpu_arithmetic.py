"""A GPU's exponential, logarithm, division and root, as Triton lowers them for CUDA, in Triton's interpreter.

As Triton 3.6.0 to 3.9.0 have it, `tl.exp` is ex2.approx of the rounded x log2(e), `tl.exp2` ex2.approx.ftz, `/`
div.full, `tl.sqrt` and `tl.rsqrt` are sqrt.approx.ftz and rsqrt.approx.ftz, `tl.log` and `tl.log2` polynomials that
flush: each within 2 ulp. `tl.div_rn`, `tl.sqrt_rn` and whatever is float64 stay exact.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

ULPS = 2.0
ROUNDING = 0.5  # of those, what rounding to float32 takes
LEAST_NORMAL = float(np.finfo(np.float32).tiny)
LARGEST_BINADE = 2.0**127  # beyond the largest number itself numpy's spacing is infinite
_imitated = False


def allowance(approximations: float) -> float:
    """Returns the ulp that so many approximations, one upon another, may add to a result; 0 where none is one."""
    return ULPS * approximations if torch.cuda.is_available() or _imitated else 0.0


def _signs(*operands: np.ndarray) -> np.ndarray:
    """1 or -1 by the operands' bits alone, so that equal operands have equal results."""
    bits = np.zeros((), np.uint32)
    for operand in operands:
        bits = (bits ^ operand.view(np.uint32)) * np.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        bits = bits ^ (bits >> np.uint32(16))
    return np.where(bits & np.uint32(1), 1.0, -1.0)


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < LEAST_NORMAL, np.copysign(np.zeros_like(x), x), x)


def _approximate(function: Callable[..., np.ndarray], *operands: np.ndarray, flush: bool) -> np.ndarray:
    """The function of float32 operands, off by nearly 2 ulp; zeros, infinities and a result of zeros are exact."""
    operands = [_flushed(x) for x in operands] if flush else operands
    exact = function(*(x.astype(np.float64) for x in operands))
    ulp = np.spacing(np.minimum(np.abs(exact), LARGEST_BINADE).astype(np.float32)).astype(np.float64)
    certain = (exact == 0) | ~np.isfinite(exact) | np.all([x == 0 for x in operands], axis=0)
    result = np.where(certain, exact, exact + (ULPS - ROUNDING) * ulp * _signs(*operands)).astype(np.float32)
    return _flushed(result) if flush else result


def _unary(name: str, function: Callable[[np.ndarray], np.ndarray], *, flush: bool) -> dict[str, Callable[..., Any]]:
    def create(builder: Any, x: Any) -> Any:
        double = x.data.dtype != np.float32
        return builder.unary_op(x, function if double else lambda data: _approximate(function, data, flush=flush))

    return {name: create}


def _create_exp(builder: Any, x: Any) -> Any:
    if x.data.dtype != np.float32:
        return builder.unary_op(x, np.exp)
    log2e = np.float32(1.4426950408889634)
    return builder.unary_op(x, lambda data: _approximate(np.exp2, data * log2e, flush=False))


def _create_fdiv(builder: Any, x: Any, y: Any) -> Any:
    if x.data.dtype != np.float32:
        return builder.binary_op(x, y, np.divide)
    operands = np.broadcast_arrays(x.data, y.data)
    return builder.binary_op(x, y, lambda *_: _approximate(np.divide, *operands, flush=False))


APPROXIMATE = {
    **_unary("create_exp2", np.exp2, flush=True),
    **_unary("create_log", np.log, flush=True),
    **_unary("create_log2", np.log2, flush=True),
    **_unary("create_sqrt", np.sqrt, flush=True),
    **_unary("create_rsqrt", lambda x: 1.0 / np.sqrt(x), flush=True),
    "create_exp": _create_exp,
    "create_fdiv": _create_fdiv,
}


@pytest.fixture
def gpu_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of the test compute as on a GPU; where there is one, every test of kernels does."""
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU, whose arithmetic this imitates")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    for name, create in APPROXIMATE.items():
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, create)
    monkeypatch.setattr(f"{__name__}._imitated", True)
