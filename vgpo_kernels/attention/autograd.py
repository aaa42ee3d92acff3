"""The gradients of the operators, under plain autograd, torch.compile and `torch.func`.

torch.library's autograd does not compose with the transforms of `torch.func` (grad, vjp, vmap), an
`autograd.Function` does: it stands in while one of them is active.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels.attention import ops, prologue


def visual_attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out, mass and lse; arguments as in the operator."""
    return _VisualAttention.apply(*arguments) if _transforming() else ops.visual_attention(*arguments)


def attention_with_lse(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Returns out and lse; arguments as in the operator."""
    return _AttentionWithLSE.apply(*arguments) if _transforming() else ops.attention_with_lse(*arguments)


def _transforming() -> bool:
    """Whether a transform of `torch.func` is active (torch offers no public way to ask)."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _save_visual_attention(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.scale, ctx.softcap, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward_of_visual_attention(
    ctx: Any, grad_out: Tensor | None, grad_mass: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, out, mass, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = _gradients(grad_out, grad_mass, grad_lse, *tensors, out, mass, lse, ctx.scale, ctx.softcap, ctx.impl)
    return *grads, *(None,) * 6


def _save_attention_with_lse(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, _, _, _, _, ctx.scale, ctx.softcap, _ = inputs
    ctx.save_for_backward(*tensors[:6], *output)


def _backward_of_attention_with_lse(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = _gradients(grad_out, None, grad_lse, *tensors, out, None, lse, ctx.scale, ctx.softcap, None)
    return *grads, *(None,) * 10


def _gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _Gradients.apply(*arguments) if _transforming() else ops.visual_attention_backward(*arguments)


def _save_nothing(ctx: Any, inputs: tuple, output: tuple) -> None:
    pass


def _refuse(ctx: Any, *grads: Any) -> Any:  # noqa: ARG001
    raise RuntimeError("visual attention is differentiable once: its gradient has none")


def _fold(operator: Callable[..., Any], cu_seqlens: int | None = None) -> Callable[..., tuple[Any, Any]]:
    """Returns the vmap rule of an operator whose tensors all have the batch in front: the mapped dimension joins it.

    Args:
        operator: what runs on the joined tensors.
        cu_seqlens: the place of the argument that has no batch: all rows are packed alike.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if cu_seqlens is not None and len(arguments) > cu_seqlens and in_dims[cu_seqlens] is not None:
            raise RuntimeError("attention: packed rows (cu_seqlens) have no batch for torch.func.vmap to join")
        folded = [
            _mapped(argument, dim, size).flatten(0, 1)
            if isinstance(argument, Tensor) and place != cu_seqlens
            else argument
            for place, (argument, dim) in enumerate(zip(arguments, in_dims, strict=True))
        ]
        results = operator(*folded)
        if isinstance(results, Tensor):
            return results.unflatten(0, (size, -1)), 0
        return tuple(result.unflatten(0, (size, -1)) for result in results), (0,) * len(results)

    return rule


def _mapped(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Returns the tensor with the mapped dimension in front, repeated where it has none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


class _VisualAttention(torch.autograd.Function):
    """`vgpo::visual_attention` for the transforms."""

    setup_context = staticmethod(_save_visual_attention)
    backward = staticmethod(_backward_of_visual_attention)

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.visual_attention(*arguments)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return _fold(_VisualAttention.apply)(info, in_dims, *arguments)


class _AttentionWithLSE(torch.autograd.Function):
    """`vgpo::attention_with_lse` for the transforms."""

    setup_context = staticmethod(_save_attention_with_lse)
    backward = staticmethod(_backward_of_attention_with_lse)

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return ops.attention_with_lse(*arguments)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        if arguments[6] is not None:
            raise RuntimeError("attention_with_lse: packed rows (cu_seqlens) have no batch for torch.func.vmap to join")
        return _fold(_AttentionWithLSE.apply)(info, in_dims, *arguments)


class _Gradients(torch.autograd.Function):
    """`vgpo::visual_attention_backward` for the transforms."""

    setup_context = staticmethod(_save_nothing)
    backward = staticmethod(_refuse)

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.visual_attention_backward(*arguments)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        return _fold(_Gradients.apply)(info, in_dims, *arguments)


ops.visual_attention.register_autograd(_backward_of_visual_attention, setup_context=_save_visual_attention)
ops.attention_with_lse.register_autograd(_backward_of_attention_with_lse, setup_context=_save_attention_with_lse)
ops.visual_attention_backward.register_autograd(_refuse, setup_context=_save_nothing)
ops.attention_mass.register_vmap(_fold(ops.attention_mass))
ops.attention_column_sum.register_vmap(_fold(ops.attention_column_sum, cu_seqlens=11))
_prologue = torch.ops.vgpo.attention_prologue
torch.library.register_vmap(prologue.NAME, _fold(_prologue, cu_seqlens=3), lib=prologue.LIBRARY)
