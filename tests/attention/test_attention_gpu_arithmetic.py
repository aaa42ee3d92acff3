"""The budgets of the attention kernels with a GPU's exponentials, logarithms and divisions."""

import pytest
import test_attention_backward_kernels as backward
import test_attention_column_kernels as column
import test_attention_decode_kernels as decode
import test_attention_forward_kernels as forward
import test_attention_mass_kernels as mass
import torch
from attention_checks import case, check_forward
from dense_attention import inputs

pytestmark = [
    pytest.mark.usefixtures("gpu_arithmetic"),
    pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, 3.0), (torch.float16, None)]),
]


@pytest.mark.parametrize(("module", "queries"), [(forward, 70), (decode, 3)])
def test_forward(module, queries, dtype, softcap):
    tensors = case("causal", "holes", (2, 1), (queries, 90), 16, dtype)
    check_forward(module.attend("cpu", tensors, 0.5, softcap), tensors, scale=0.5, softcap=softcap)


def test_backward(dtype, softcap):
    backward.check("cpu", case("window", "image", (2, 1), (40, 70), 16, dtype), scale=0.5, softcap=softcap)


def test_mass(dtype, softcap):
    q, k, _ = inputs(2, (2, 1), (45, 90), 16, dtype)
    mass.check(q, k, "causal", "two", "cpu", softcap)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_column(reduction, dtype, softcap):
    q, k, _ = inputs(2, (2, 1), (45, 90), 16, dtype)
    column.check(q, k, column.scattered(90, 140), "causal", reduction, "cpu", softcap)
