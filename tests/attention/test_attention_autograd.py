"""The operators under torch.compile, opcheck and checkpointing, and without torch.func."""

import pytest
import torch
from dense_attention import inputs, intervals
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import vgpo_kernels as vgpo

D = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


def leaves(Lq: int, Lk: int, batch: int = 2) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in inputs(batch, (4, 2), (Lq, Lk), D, device=DEVICE)]


def everything(q: Tensor, k: Tensor, v: Tensor, visual: Tensor, key_mask: Tensor) -> Tensor:
    """Calls every public function with what makes their graphs differ."""
    batch, Lk = visual.shape
    riding = vgpo.visual_attention(q, k, v, visual, key_mask=key_mask, window=5, softcap=3.0)
    out, lse = vgpo.attention_with_lse(q, k, v, key_mask=key_mask)
    segments = visual.int() - 1
    mass = vgpo.attention_mass(
        q, k, lse, segments, 2, key_mask=key_mask, reduce_heads=True, query_range=(1, q.shape[2])
    )
    received = vgpo.attention_column_sum(q, k, lse, visual, key_mask=key_mask, reduction="mean")
    first = vgpo.attention_column_sum(
        q, k, lse, torch.zeros(batch, 3, dtype=torch.int64, device=visual.device), key_mask=key_mask
    )
    decoded = vgpo.visual_attention_decode(q, k, v, visual, torch.full((batch,), Lk, device=visual.device))
    return sum(x.sum() for x in (riding.out, riding.visual_mass, out, mass, received, first, decoded.out))


def packed(q: Tensor, k: Tensor, v: Tensor, visual: Tensor, bounds: Tensor) -> Tensor:
    mass = vgpo.visual_attention(q, k, v, visual, cu_seqlens=bounds).visual_mass
    return mass.sum() + vgpo.attention_with_lse(q, k, v, cu_seqlens=bounds, max_seqlen=q.shape[2])[0].sum()


def arguments_of_everything(length: int) -> list[Tensor]:
    return [
        *leaves(length, length + 3),
        torch.rand(2, length + 3, device=DEVICE) < 0.5,
        torch.rand(2, length + 3, device=DEVICE) < 0.9,
    ]


def arguments_of_packed(length: int) -> list[Tensor]:
    return [
        *leaves(length, length, 1),
        torch.rand(1, length, device=DEVICE) < 0.5,
        torch.tensor([0, 4, length], device=DEVICE),
    ]


@pytest.mark.parametrize(("function", "make"), [(everything, arguments_of_everything), (packed, arguments_of_packed)])
def test_one_graph_serves_every_length(function, make) -> None:
    counter = CompileCounter()
    counted = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 13, 20):
        arguments = make(length)
        counted(*arguments)
        results = function(*arguments), compiled(*arguments)
        torch.testing.assert_close(*results)
        gradients = [torch.autograd.grad(result, arguments[:3]) for result in results]
        torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1


def test_opcheck(impl: str) -> None:
    q, k, v = leaves(5, 7)
    bounds = [x.to(DEVICE) for x in intervals("causal", 2, 5, 7)]
    kinds = (torch.arange(7, device=DEVICE) % 3).expand(2, -1).to(torch.int8).contiguous()
    checked = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    visual = (q, k, v, kinds, *bounds, 0.3, None, impl)
    torch.library.opcheck(torch.ops.vgpo.visual_attention, visual, test_utils=checked)
    out, mass, lse = (x.detach() for x in torch.ops.vgpo.visual_attention(*visual))
    q, k, v = q.detach(), k.detach(), v.detach()
    torch.library.opcheck(
        torch.ops.vgpo.visual_attention_backward,
        (out, mass, None, q, k, v, kinds, *bounds, out, mass, lse, 0.3, None, impl),
        test_utils=checked,
    )
    torch.library.opcheck(
        torch.ops.vgpo.attention_mass, (q, k, lse, kinds.int() - 1, *bounds, 2, 0.3, None, impl), test_utils=checked
    )
    positions = torch.tensor([[0, 3, -1], [6, 6, 2]], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(
        torch.ops.vgpo.attention_column_sum,
        (q, k, lse, positions, *bounds, "max", 0.3, 2.0, impl),
        test_utils=checked,
    )


def test_opcheck_of_the_stock_kernel() -> None:
    q, k, v = leaves(5, 7)
    backend, _ = vgpo.attention_backend(q, k)
    kinds = torch.ones(2, 7, dtype=torch.int8, device=DEVICE)
    bounds = [x.to(DEVICE) for x in intervals("causal", 2, 5, 7)]
    arguments = (q, k, v, kinds, *bounds, None, None, True, None, 0.3, None, backend)
    torch.library.opcheck(torch.ops.vgpo.attention_with_lse, arguments)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(reentrant: bool, impl: str) -> None:
    tensors = leaves(5, 7)
    visual = torch.arange(7, device=DEVICE).expand(2, -1) % 2 == 0

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = vgpo.visual_attention(q, k, v, visual, impl=impl)
        return o.out.sum() + (o.visual_mass * o.lse).sum()

    plain = torch.autograd.grad(loss(*tensors), tensors)
    checkpoint(loss, *tensors, use_reentrant=reentrant).backward()
    torch.testing.assert_close(plain, tuple(x.grad for x in tensors), rtol=0, atol=0)


def test_outputs_that_nothing_uses_cost_no_gradient(impl: str) -> None:
    """A loss of the mass alone gives v no gradient, one of the LSE alone neither."""
    visual = torch.arange(7, device=DEVICE).expand(2, -1) % 2 == 0
    for field in ("visual_mass", "lse"):
        q, k, v = leaves(5, 7)
        getattr(vgpo.visual_attention(q, k, v, visual, impl=impl), field).sum().backward()
        assert q.grad.abs().sum() > 0
        assert not v.grad.any()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_functional_transforms_are_refused(transform) -> None:
    q, k, v = leaves(5, 7)

    def calls(x: Tensor) -> Tensor:
        return vgpo.attention_with_lse(x, k, v)[1].sum()

    with pytest.raises(RuntimeError, match=r"attention has no torch.func transforms \(grad, vjp, vmap\): use torch"):
        transform(calls)(q if transform is torch.func.grad else q[None])


def test_a_second_derivative_is_refused() -> None:
    q, k, v = leaves(5, 7)
    mass = vgpo.visual_attention(q, k, v, torch.ones(2, 7, device=DEVICE)).visual_mass
    (first,) = torch.autograd.grad(mass.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="visual attention is differentiable once: its gradient has none"):
        first.sum().backward()
