"""Which stock kernel runs, and what it is asked; the kernels themselves where there is a GPU."""

import importlib.machinery
import math
import sys
import types

import pytest
import torch
from dense_attention import dense_attention, inputs, intervals
from torch import Tensor

import vgpo_kernels as vgpo
from vgpo_kernels import _native
from vgpo_kernels.attention import cpu_flash, stock_kernels
from vgpo_kernels.attention.intervals import KeyMask, MaskRule

CUDA = torch.device("cuda", 0)
PLAIN = stock_kernels.Request(
    device=CUDA,
    dtype=torch.bfloat16,
    lengths=(64, 64),
    heads=(4, 2),
    head_dim=128,
    plain=True,
    causal=True,
    packed=False,
    window=None,
    softcap=None,
)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an sm_90 GPU and both flash-attn packages, as far as the choice looks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (9, 0))
    monkeypatch.setattr(stock_kernels, "_package_obstacle", lambda _module: None)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "flash_attn_3"),
        ({"dtype": torch.float32, "heads": (4, 4)}, "torch_efficient"),
        ({"dtype": torch.float32}, "vgpo"),
        ({"plain": False}, "vgpo"),
        ({"window": 5}, "flash_attn_3"),
        ({"softcap": 5.0}, "flash_attn_3"),
        ({"packed": True}, "flash_attn_3"),
        ({"device": torch.device("cpu"), "dtype": torch.float64}, "cpu"),
        ({"head_dim": 512}, "vgpo"),
        ({"device": torch.device("cpu"), "softcap": 5.0}, "vgpo"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_the_fastest_that_can_is_taken(change: dict, expected: str) -> None:
    assert stock_kernels.choose(PLAIN._replace(**change))[0] == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "torch_cudnn"),
        ({"head_dim": 256}, "torch_flash"),
        ({"head_dim": 84}, "vgpo"),
        ({"lengths": (3, 64)}, "vgpo"),
        ({"lengths": (3, 64), "causal": False}, "torch_cudnn"),
        ({"lengths": (1, 77), "causal": False}, "torch_cudnn"),
        ({"lengths": (3, 1), "causal": False}, "torch_flash"),
        ({"window": 5}, "vgpo"),
        ({"packed": True}, "vgpo"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_without_flash_attn_torchs_own_are_taken(change: dict, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_kernels, "_package_obstacle", lambda module: f"{module} is not installed")
    name, why = stock_kernels.choose(PLAIN._replace(**change))
    assert name == expected
    assert "flash_attn_3: flash_attn_interface is not installed" in why


@pytest.mark.usefixtures("hopper")
def test_a_backend_that_cannot_says_why() -> None:
    with pytest.raises(RuntimeError, match="backend 'torch_cudnn' cannot run this: a key mask or intervals"):
        stock_kernels.choose(PLAIN._replace(plain=False), "torch_cudnn")
    with pytest.raises(ValueError, match=r"backend: expected one of 'cpu', .* got 'sdpa'"):
        stock_kernels.choose(PLAIN, "sdpa")
    with pytest.raises(RuntimeError, match="no attention kernel for mps tensors"):
        stock_kernels.choose(PLAIN._replace(device=torch.device("mps")))


def test_the_public_function_takes_the_backend_by_name() -> None:
    q, k, v = inputs(1, (2, 1), (5, 9), 16)
    assert vgpo.attention_backend(q, k, backend="cpu") == ("cpu", "asked for")
    name, why = vgpo.attention_backend(q, k, softcap=2.0)
    assert name == "vgpo"
    assert why.startswith("cpu: a soft-cap; flash_attn_3: cpu tensors")
    with pytest.raises(RuntimeError, match="backend 'torch_flash' cannot run this: cpu tensors"):
        vgpo.attention_with_lse(q, k, v, backend="torch_flash")
    for one, other in zip(
        vgpo.attention_with_lse(q, k, v, backend="cpu"), vgpo.attention_with_lse(q, k, v, backend="vgpo"), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_on_a_cpu_with_wide_vectors_ours_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = inputs(1, (2, 1), (5, 9), 16)
    monkeypatch.setattr(_native, "missing", lambda: None)
    monkeypatch.setattr(_native, "capability", lambda: "avx2")
    name, why = vgpo.attention_backend(q, k)
    assert name == "vgpo"
    assert why.startswith("cpu: our own CPU kernel is faster; flash_attn_3: cpu tensors")
    assert vgpo.attention_backend(q.double(), k.double()) == ("cpu", "the fastest")
    monkeypatch.setattr(_native, "capability", lambda: "portable")
    assert vgpo.attention_backend(q, k) == ("cpu", "the fastest")
    monkeypatch.setattr(_native, "missing", lambda: "not built")
    assert vgpo.attention_backend(q, k) == ("cpu", "the fastest")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", ["full", "causal", "left", "packed", "window", "empty", "blind", "arbitrary"])
def test_the_cpu_kernel_takes_every_mask(mask: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_flash, "MASK_ELEMENTS", 61 * 5)  # blocks of five queries
    q, k, v = inputs(2, (4, 2), (37, 61), 24, dtype)
    bounds, kinds = intervals(mask, 2, 37, 61), torch.ones(2, 61, dtype=torch.int8)
    kinds[1, 30] = 0
    k, v = (x.masked_fill((kinds == 0)[:, None, :, None], torch.nan) for x in (k, v))
    out, lse = cpu_flash.run(q, k, v, KeyMask(*bounds, kinds), MaskRule((37, 61), 24), 0.2, None)
    dense = dense_attention(q.double(), k.double(), v.double(), *bounds, key_kinds=kinds, scale=0.2)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), dense.out, rtol=0, atol=8 * epsilon)
    torch.testing.assert_close(lse.double(), dense.lse, rtol=0, atol=max(epsilon, 1e-6) if epsilon > 1e-15 else 1e-12)


class FlashAttention(types.ModuleType):
    """Says what it was asked, and answers with dense attention in flash-attn's own layout."""

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, **options):
        self.options = options
        q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
        dense = dense_attention(q, k, v, *self._intervals(q.shape[2], k.shape[2]), scale=options["softmax_scale"])
        # As flash-attn has it: +inf where a query sees nothing.
        return dense.out.transpose(1, 2), dense.lse.masked_fill(dense.lse.isneginf(), math.inf), None

    def flash_attn_varlen_func(self, q: Tensor, _k: Tensor, _v: Tensor, *bounds, **options):
        self.bounds, self.options = bounds, options
        out, lse = torch.ones_like(q), torch.ones(q.shape[1], q.shape[0])
        # Memory that it does not write holds anything.
        out[bounds[0][-1] :], lse[:, bounds[0][-1] :] = torch.nan, torch.nan
        return out, lse, None

    @staticmethod
    def _intervals(Lq: int, Lk: int) -> tuple[Tensor, Tensor]:
        end = causal_end(Lq, Lk)
        return torch.zeros_like(end), end


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> FlashAttention:
    module = FlashAttention("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, end: Tensor, softcap: float | None = None, **rule):
    mask = KeyMask(torch.zeros_like(end), end, torch.ones(1, k.shape[2], dtype=torch.int8))
    return stock_kernels.BACKENDS["flash_attn_2"].run(
        q, k, v, mask, MaskRule((q.shape[2], k.shape[2]), 0, **rule), 0.3, softcap
    )


def causal_end(Lq: int, Lk: int) -> Tensor:
    return (torch.arange(Lq) + 1 + Lk - Lq)[None].int()


def test_flash_attn_is_asked_in_its_own_layout(flash_attn: FlashAttention) -> None:
    q, k, v = inputs(1, (4, 2), (9, 7), 16)  # the first two queries see nothing
    end = causal_end(9, 7)
    out, lse = flash_attn_2(q, k, v, end, causal=True)
    dense = dense_attention(q.double(), k.double(), v.double(), torch.zeros_like(end), end, scale=0.3)
    torch.testing.assert_close(out, dense.out)
    torch.testing.assert_close(lse, dense.lse)
    assert flash_attn.options == {
        "softmax_scale": 0.3,
        "causal": True,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "return_attn_probs": True,
    }


@pytest.mark.parametrize(("causal", "expected"), [(True, (4, 0)), (False, (4, 4))])
def test_a_window_of_flash_attn_does_not_count_the_query(
    causal: bool, expected: tuple[int, int], flash_attn: FlashAttention
) -> None:
    q, k, v = inputs(1, (2, 2), (7, 7), 16)
    flash_attn_2(q, k, v, causal_end(7, 7), 20.0, causal=causal, window=5)
    assert flash_attn.options["window_size"] == expected
    assert flash_attn.options["softcap"] == 20.0


@pytest.mark.parametrize(("longest", "expected"), [(None, 9), (5, 5)])
def test_packed_rows_go_to_flash_attn_without_a_batch(
    longest: int | None, expected: int, flash_attn: FlashAttention
) -> None:
    q, k, v = inputs(1, (4, 2), (9, 9), 16)
    end = torch.where(torch.arange(9) < 7, causal_end(9, 9), 0)
    out, lse = flash_attn_2(q, k, v, end, causal=True, cu_seqlens=torch.tensor([0, 4, 7]), max_seqlen=longest)
    assert out[:, :, :7].eq(1).all()
    assert not out[:, :, 7:].any()
    assert lse[:, :, :7].eq(1).all()
    assert lse[:, :, 7:].isneginf().all()
    assert [x.tolist() if isinstance(x, Tensor) else x for x in flash_attn.bounds] == [
        [0, 4, 7],
        [0, 4, 7],
        expected,
        expected,
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "D", "Lq"), [((4, 4), 64, 70), ((4, 2), 128, 70), ((4, 2), 72, 33)])
@pytest.mark.parametrize("backend", list(stock_kernels.BACKENDS))
def test_every_backend_of_the_machine_is_dense_attention(
    backend: str, heads: tuple[int, int], D: int, Lq: int, causal: bool
) -> None:
    q, k, v = inputs(2, heads, (Lq, 70), D, torch.bfloat16, "cuda")
    try:
        vgpo.attention_backend(q, k, causal=causal, backend=backend)
    except RuntimeError as obstacle:
        pytest.skip(str(obstacle))
    bounds = [x.cuda() for x in intervals("causal" if causal else "full", 2, Lq, 70)]
    out, lse = vgpo.attention_with_lse(q, k, v, causal=causal, backend=backend)
    dense = dense_attention(q.double(), k.double(), v.double(), *bounds)
    torch.testing.assert_close(out.double(), dense.out, rtol=0, atol=2e-2)
    torch.testing.assert_close(lse.double(), dense.lse, rtol=0, atol=1e-3)


def test_an_old_flash_attn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_func = lambda q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1): None  # noqa: ARG005
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    stock_kernels._package_obstacle.cache_clear()
    expected = "flash_attn is too old: its flash_attn_func has no softcap, return_attn_probs"
    assert stock_kernels._package_obstacle("flash_attn") == expected
    stock_kernels._package_obstacle.cache_clear()
    assert stock_kernels._package_obstacle("flash_attn_missing") == "flash_attn_missing is not installed"
