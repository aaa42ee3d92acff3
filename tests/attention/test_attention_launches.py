"""How many kernels a call launches on a GPU, counted there or in the interpreter."""

from collections.abc import Callable

import pytest
import torch
from dense_attention import inputs
from torch.profiler import ProfilerActivity, profile

import vgpo_kernels as vgpo
from vgpo_kernels.attention import checks

pytest.importorskip("triton")

from triton.runtime import interpreter

B, LENGTHS, D = 2, (1024, 1100), 16
# What gives a tensor without a launch.
FREE = {
    "empty", "empty_strided", "empty_like", "new_empty", "detach", "alias", "view", "_unsafe_view", "view_as",
    "as_strided", "expand", "expand_as", "select", "slice", "narrow", "unbind", "permute", "transpose", "unsqueeze",
    "squeeze", "reshape", "flatten", "unflatten", "lift_fresh", "result_type", "resolve_conj", "resolve_neg",
    "is_nonzero", "item", "_local_scalar_dense", "split", "chunk", "to",
}  # fmt: skip


def launches(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Returns how many kernels of Triton a call launches, and how many of torch.

    Without a GPU no kernel runs, and an operator of torch counts if it calls no other that counts.
    """
    torch.use_deterministic_algorithms(False)  # which would fill what `empty` gives
    if torch.cuda.is_available():
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        names = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        ours = sum(name.endswith("_kernel") for name in names)
        return ours, len(names) - ours
    started = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: started.append(1))
    monkeypatch.setattr(checks, "_reads", lambda _: False)  # as on a GPU: values are not looked at
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return len(started), sum(_launches(event) for event in seen.events() if event.cpu_parent is None)


def _launches(event: torch.autograd.profiler_util.FunctionEvent) -> int:
    within = sum(_launches(child) for child in event.cpu_children)
    name = event.name.removeprefix("aten::")
    return within or int(event.name.startswith("aten::") and name not in FREE)


def decode(device: str, dtype: torch.dtype, **options: object) -> Callable[[], object]:
    q, k, v = inputs(B, (4, 2), (1, LENGTHS[1]), D, dtype, device)
    visual = torch.ones(B, LENGTHS[1], dtype=torch.bool, device=device)
    lengths = torch.full((B,), 900, device=device)
    return lambda: vgpo.visual_attention_decode(q, k, v, visual, lengths, impl="triton", **options)


def mass(device: str, dtype: torch.dtype, **options: object) -> Callable[[], object]:
    q, k, _ = inputs(B, (4, 2), LENGTHS, D, dtype, device)
    lse = torch.zeros(B, 4, LENGTHS[0], device=device)
    ids = torch.zeros(B, LENGTHS[1], dtype=torch.int64, device=device)
    return lambda: vgpo.attention_mass(q, k, lse, ids, 2, impl="triton", **options)


def columns(device: str, dtype: torch.dtype, **options: object) -> Callable[[], object]:
    q, k, _ = inputs(B, (4, 2), LENGTHS, D, dtype, device)
    lse = torch.zeros(B, 4, LENGTHS[0], device=device)
    keys = torch.ones(B, LENGTHS[1], dtype=torch.bool, device=device)
    if options.pop("positions", False):
        keys = torch.zeros(B, 5, dtype=torch.int64, device=device)
    return lambda: vgpo.attention_column_sum(q, k, lse, keys, impl="triton", **options)


def forward(device: str, dtype: torch.dtype, **options: object) -> Callable[[], object]:
    q, k, v = inputs(B, (4, 2), LENGTHS, D, dtype, device)
    visual = torch.ones(B, LENGTHS[1], dtype=torch.bool, device=device)
    return lambda: vgpo.visual_attention(q, k, v, visual, impl="triton", **options)


@pytest.mark.parametrize("mask", ["causal", "key mask and window", "intervals"])
@pytest.mark.parametrize("task", [decode, mass, columns, forward])
def test_a_call_launches_three_kernels(task, mask: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {}
    if mask == "key mask and window":
        options = {"key_mask": torch.ones(B, LENGTHS[1], dtype=torch.int64, device=device), "window": 300}
    elif mask == "intervals":
        start = torch.zeros(B, 1 if task is decode else LENGTHS[0], dtype=torch.int64, device=device)
        options = {"intervals": (start, start + 800)}
    assert launches(task(device, torch.float16, **options), monkeypatch) == (3, 0)


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
@pytest.mark.parametrize("positions", [False, True])
def test_columns_of_any_kind(reduction: str, positions: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"positions": positions, "reduction": reduction}
    # Few positions of few heads: the queries are split among programs, whose parts are merged.
    assert launches(columns(device, torch.float16, **options), monkeypatch) == (3, 0)
