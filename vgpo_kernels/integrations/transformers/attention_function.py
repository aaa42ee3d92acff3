"""The attention and the mask function that transformers calls for attn_implementation="vgpo".

import vgpo_kernels.integrations.transformers  # registers both
model.set_attn_implementation({"text_config": "vgpo"})
model(**inputs)  # transformers' own sdpa, mask and all, unless a recorder is active
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from vgpo_kernels.attention import attention_with_lse
from vgpo_kernels.integrations.transformers import mask_intervals
from vgpo_kernels.integrations.transformers.mask_intervals import KeyIntervals, MaskShape
from vgpo_kernels.integrations.transformers.recorder_base import ACTIVE, RecorderBase

NAME = "vgpo"


def register() -> None:
    """Makes "vgpo" known to transformers."""
    AttentionInterface.register(NAME, vgpo_attention)
    AttentionMaskInterface.register(NAME, vgpo_mask)


def vgpo_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Returns what transformers' `sdpa_mask` returns, or while a recorder is active the mask as encoded intervals.

    A model with soft-capped attention, which sdpa does not know, always gets intervals.
    """
    config = kwargs.get("config")
    recorders = [recorder for recorder in ACTIVE if recorder.records_masks_of(config)]
    if not recorders and getattr(config, "attn_logit_softcapping", None) is None:
        if getattr(config, "num_kv_shared_layers", 0):
            # Such models drop queries before their last layers and cut the mask to match, so it has to exist.
            kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(*args, **kwargs)
    return _encoded(recorders, *args, **kwargs)


def _encoded(
    recorders: list[RecorderBase],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache counts on in place, and the mask of sdpa is made later
    shape = MaskShape(batch_size, q_length, kv_length, q_offset, kv_offset)
    described: dict[str, Any] = {
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        "device": device,
    }
    mask = mask_intervals.evaluate(shape=shape, name=type(kwargs["config"]).__name__, **described)
    mask.layers = tuple(sorted({layer for recorder in recorders for layer in recorder.layers}))
    mask.sdpa_mask = lambda: sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **described, **kwargs)
    return mask_intervals.encode(mask)


def vgpo_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends as transformers' sdpa does; recorded layers run our attention, which gives its LSE.

    | recorder | soft-cap | mask from | runs |
    |---|---|---|---|
    | of no layer of the model | no | anywhere | sdpa |
    | of other layers | no | `vgpo_mask` | sdpa, under the mask that sdpa would have got |
    | of this layer | any | `vgpo_mask` | ours, recorded |
    | of this layer | no | the caller | ours for the record, sdpa for the result |
    | any | yes | anywhere | ours |

    Args:
        module: the attention layer.
        query: (B, Hq, Lq, D).
        key, value: (B, Hkv, Lk, D).
        attention_mask: what `vgpo_mask` returned, or a mask (B, 1, Lq, Lk).
        dropout, scaling, is_causal, kwargs: as transformers gives them to every attention function.

    Returns:
        (B, Lq, Hq, D), and None for the attention map that is never made.

    Raises:
        ValueError: the layer asks for what neither implementation does: sinks, and while recording also a bias on the
            scores, dropout, a mask of its own for each head, or one that is no interval.
    """
    recorders = [recorder for recorder in ACTIVE if recorder.records(module)]
    softcap = kwargs.get("softcap")
    encoded = mask_intervals.is_encoded(attention_mask)
    _check_known(module, kwargs)
    chosen = kwargs.pop("indices", None)
    if chosen is not None:
        if recorders or encoded or softcap is not None:
            _refuse(module, "chosen keys (indices) where it is recorded", "they are no interval of keys for each query")
        if chosen.dim() != 3 or chosen.shape[:2] != (query.shape[0], query.shape[2]):
            _refuse(module, f"chosen keys (indices) of shape {tuple(chosen.shape)}", "expected (B, Lq, n)")
        # These layers put their choice into the mask only for "eager" and "sdpa", by name.
        attention_mask = mask_intervals.only_chosen(attention_mask, chosen, key.shape[2])

    def run_sdpa(mask: Tensor | None) -> tuple[Tensor, None]:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal=is_causal, **kwargs)

    if not recorders and softcap is None and not encoded:
        return run_sdpa(attention_mask)
    layer: Any = getattr(module, "layer_idx", None)
    mask = mask_intervals.decode(attention_mask) if encoded else None  # type: ignore[arg-type]
    recorded = any(layer in recorder.layers for recorder in recorders)
    # An encoded mask says which layers are recorded: a layer that runs again for its gradient, after the recorder has
    # ended, runs the same implementation. A mask of the caller cannot, so that its layers return what sdpa does.
    ours = softcap is not None or (mask is not None and layer in mask.layers)
    if not (ours or recorded):
        for recorder in recorders:
            recorder.observe(layer, query, key, None, None, {})
        return run_sdpa(attention_mask if mask is None else mask.last_queries(query.shape[2]).dense())
    _check_plain_attention(module, dropout, kwargs)
    if mask is None:
        first_key = recorders[0].first_key(key.shape[2]) if recorders else 0
        mask = _mask_from_outside(module, attention_mask, query, key, is_causal, first_key)
    if mask.kv_length != key.shape[2]:
        _refuse(module, f"{key.shape[2]} keys under a mask of {mask.kv_length}", "its mask was made for other keys")
    mask = mask.last_queries(query.shape[2])
    options = {"scale": scaling, "softcap": softcap}
    with torch.set_grad_enabled(ours and torch.is_grad_enabled()):
        out, lse = _attend(query, key, value, {**options, **mask.options()})
    for recorder in recorders:
        recorder.observe(layer, query, key, lse, mask, options)
    return (out.transpose(1, 2).contiguous(), None) if ours else run_sdpa(attention_mask)


def _attend(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the output and its LSE, also if values are shorter than keys."""
    short = key.shape[3] - value.shape[3]
    if short > 0:
        value = nn.functional.pad(value, (0, short))
    out, lse = attention_with_lse(query, key, value, **options)
    return out[..., : out.shape[3] - short] if short > 0 else out, lse


def _mask_from_outside(
    module: nn.Module, mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool | None, first_key: int
) -> KeyIntervals:
    if mask is not None:
        return mask_intervals.from_dense(mask, query.shape[0], _named(module), kv_offset=first_key)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    shape = MaskShape(query.shape[0], query.shape[2], key.shape[2], kv_offset=first_key)
    return mask_intervals.without_mask(shape, causal=causal, device=query.device)


def _check_known(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises for what sdpa would silently leave out."""
    for name, what in (("s_aux", "attention sinks"), ("sinks", "attention sinks"), ("block_indices", "chosen keys")):
        if kwargs.get(name) is not None:
            _refuse(module, f"{what} ({name})", "use attn_implementation='eager'")


def _check_plain_attention(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        _refuse(module, f"attention dropout {dropout}", "set the configuration's attention_dropout to 0")
    for name in ("position_bias", "alibi"):
        if kwargs.get(name) is not None:
            _refuse(module, f"a bias on the scores ({name})", "its attention is no plain softmax of q.k")
    if kwargs.get("cache") is not None:
        _refuse(module, "a paged cache", "record in generate, not in generate_batch")


def _refuse(module: nn.Module, what: str, remedy: str) -> None:
    raise ValueError(f"{_named(module)}: attn_implementation='vgpo' cannot take {what}; {remedy}")


def _named(module: nn.Module) -> str:
    layer = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if layer is None else f" of layer {layer}")
