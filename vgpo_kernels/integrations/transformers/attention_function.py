"""The attention and the mask function that transformers calls for attn_implementation="vgpo".

import vgpo_kernels.integrations.transformers  # registers both
model.set_attn_implementation({"text_config": "vgpo"})
model(**inputs)  # transformers' own sdpa, mask and all, unless a recorder is active
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from vgpo_kernels.attention import attention_with_lse
from vgpo_kernels.integrations.transformers import mask_intervals
from vgpo_kernels.integrations.transformers.mask_intervals import KeyIntervals, MaskShape

NAME = "vgpo"


class Listener(Protocol):
    """A recorder, as the attention sees it."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers to record."""

    def makes_mask_for(self, config: Any) -> bool:
        """Tells whether masks made for this configuration are those of the recorded decoder."""

    def hears(self, module: nn.Module) -> bool:
        """Tells whether the module belongs to the recorded decoder, in a forward that is being recorded."""

    def first_key(self, kv_length: int) -> int:
        """Returns the token that the first of so many keys stands at, where the mask does not say."""

    def observe(
        self, layer: int, q: Tensor, k: Tensor, lse: Tensor | None, mask: KeyIntervals | None, options: dict[str, Any]
    ) -> None:
        """Takes what a layer attended with; no LSE where no recorder records the layer."""


# The recorders that are active; empty outside of every `with`.
LISTENERS: list[Listener] = []


def register() -> None:
    """Makes "vgpo" known to transformers."""
    AttentionInterface.register(NAME, vgpo_attention)
    AttentionMaskInterface.register(NAME, vgpo_mask)


def vgpo_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Returns what transformers' `sdpa_mask` returns, or while a recorder is active the mask as encoded intervals.

    A model with soft-capped attention, which sdpa does not know, always gets intervals.
    """
    config = kwargs.get("config")
    listeners = [listener for listener in LISTENERS if listener.makes_mask_for(config)]
    if not listeners and getattr(config, "attn_logit_softcapping", None) is None:
        if getattr(config, "num_kv_shared_layers", 0):
            # Such models drop queries on the way and cut the mask along; for "sdpa", by name, they mind a missing one.
            kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(*args, **kwargs)
    return _encoded(listeners, *args, **kwargs)


def _encoded(
    listeners: list[Listener],
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
        q_offset = q_offset.clone()  # a static cache counts on in place, and dense masks are made later
    shape = MaskShape(batch_size, q_length, kv_length, q_offset, kv_offset)
    described: dict[str, Any] = {
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        "device": device,
    }
    mask = mask_intervals.evaluate(shape=shape, name=type(kwargs["config"]).__name__, **described)
    mask.layers = tuple(sorted({layer for listener in listeners for layer in listener.layers}))

    def as_sdpa_gets_it() -> Tensor | None:
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **described, **kwargs)

    mask.sdpa_mask = as_sdpa_gets_it
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
    """Attends as transformers' sdpa does; in layers that are recorded, with our attention, which gives its LSE.

    Args:
        module: the attention layer.
        query: (B, Hq, Lq, D).
        key, value: (B, Hkv, Lk, D).
        attention_mask: what `vgpo_mask` returned, or a mask (B, 1, Lq, Lk).
        dropout, scaling, is_causal, kwargs: as transformers hands them to every attention function.

    Returns:
        (B, Lq, Hq, D), and None for the attention map that is never made.

    Raises:
        ValueError: the layer asks for what neither route does: sinks, and while recording also a bias on the scores,
            dropout, a mask of its own for each head, or one that is no interval.
    """
    listeners = [listener for listener in LISTENERS if listener.hears(module)]
    softcap = kwargs.get("softcap")
    encoded = mask_intervals.is_encoded(attention_mask)
    _check_known(module, kwargs)
    chosen = kwargs.pop("indices", None)
    if chosen is not None:
        if listeners or encoded or softcap is not None:
            _refuse(module, "chosen keys (indices) where it is recorded", "they are no interval of keys for each query")
        if chosen.dim() != 3 or chosen.shape[:2] != (query.shape[0], query.shape[2]):
            _refuse(module, f"chosen keys (indices) of shape {tuple(chosen.shape)}", "expected (B, Lq, n)")
        # These layers put their choice into the mask only for "eager" and "sdpa", by name.
        attention_mask = mask_intervals.only_chosen(attention_mask, chosen, key.shape[2])
    if not listeners and softcap is None and not encoded:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    layer: Any = getattr(module, "layer_idx", None)
    mask = mask_intervals.decode(attention_mask) if encoded else None  # type: ignore[arg-type]
    recorded = listeners and any(layer in listener.layers for listener in listeners)
    # An encoded mask says which layers are recorded, so that a layer run again for its gradient takes the same route.
    ours = softcap is not None or (mask is not None and layer in mask.layers)
    if not (ours or recorded):
        for listener in listeners:
            listener.observe(layer, query, key, None, None, {})
        plain = attention_mask if mask is None else mask.last_queries(query.shape[2]).dense()
        return sdpa_attention_forward(module, query, key, value, plain, dropout, scaling, is_causal=is_causal, **kwargs)
    _check_plain_attention(module, dropout, kwargs)
    if mask is None:
        first_key = listeners[0].first_key(key.shape[2]) if listeners else 0
        mask = _mask_from_outside(module, attention_mask, query, key, is_causal, first_key)
    if mask.kv_length != key.shape[2]:
        _refuse(module, f"{key.shape[2]} keys under a mask of {mask.kv_length}", "its mask was made for other keys")
    mask = mask.last_queries(query.shape[2])
    options = {"scale": scaling, "softcap": softcap}
    # A mask from elsewhere says nothing of recording: run again for its gradient, the layer must do what it did before.
    with torch.set_grad_enabled(ours and torch.is_grad_enabled()):
        out, lse = _attend(query, key, value, {**options, **mask.options()})
    for listener in listeners:
        listener.observe(layer, query, key, lse, mask, options)
    if ours:
        return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the output and its LSE, also where values are shorter than keys."""
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
    """Raises for what sdpa would leave out without a word."""
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
