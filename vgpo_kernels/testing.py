"""What tests of kernels share: the error budget and random inputs with ragged masks."""

import torch
from torch import Tensor


def assert_error_budget(
    name: str, actual: Tensor, same_dtype: Tensor, exact: Tensor, *, factor: float = 2.0, ulps: float = 2.0
) -> None:
    """Raises AssertionError unless `actual` is nearly as close to `exact` as `same_dtype` is.

    max |actual - exact| <= factor * max |same_dtype - exact| + ulps * ulp, where an ulp is that of
    `actual.dtype` at the largest finite magnitude of `exact`.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        same_dtype: the plain torch computation in the dtype under test.
        exact: the same computation in float64, from inputs quantised first and then promoted.
        factor: how much larger than torch's own error the error may be.
        ulps: what is allowed on top.
    """
    if actual.shape != exact.shape or same_dtype.shape != exact.shape:
        raise AssertionError(f"{name}: shapes {actual.shape}, {same_dtype.shape}, {exact.shape} differ")
    if exact.dtype != torch.float64:
        raise AssertionError(f"{name}: exact must be float64, got {exact.dtype}")
    finite = exact.isfinite()
    if not torch.equal(actual.double()[~finite].nan_to_num(nan=0.5), exact[~finite].nan_to_num(nan=0.5)):
        raise AssertionError(f"{name}: non-finite values differ")
    if not finite.any():
        return
    ulp = torch.finfo(actual.dtype).eps * exact[finite].abs().max()
    error = (actual.double() - exact)[finite].abs().max()
    baseline = (same_dtype.double() - exact)[finite].abs().max()
    budget = factor * baseline + ulps * ulp
    if not error <= budget:
        raise AssertionError(
            f"{name}: error {error:.3e} above the budget {budget:.3e} (torch's own error {baseline:.3e}, ulp {ulp:.3e})"
        )


def ragged_mask(lengths: list[int], length: int, *, left_padded: bool = False) -> Tensor:
    """Returns a (B, length) bool mask with `lengths[b]` True at the start (or the end) of row b."""
    positions = torch.arange(length)
    valid = positions < torch.tensor(lengths)[:, None]
    return valid.flip(1) if left_padded else valid
