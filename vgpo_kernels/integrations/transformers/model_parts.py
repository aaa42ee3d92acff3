"""Finds, in a model that may be wrapped, the text decoder, its attention layers, and what they can be recorded of.

parts = find_parts(engine)  # DeepSpeed, DDP, PEFT and bare models alike
parts.entries  # the modules that may be called with input_ids
parts.layers  # indices of the layers with attention
choose_layers(parts, "last")
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from vgpo_kernels.attention.checks import HEAD_DIM
from vgpo_kernels.integrations.transformers.visual_tokens import VisualTokens, find_visual_tokens

# Class names of attention layers, and of those among them that have no softmax.
_ATTENTION = re.compile("attention|attn|mla$", re.IGNORECASE)
_WITHOUT_SOFTMAX = re.compile("delta|lightning", re.IGNORECASE)
# Fields of attention layers that bring more than queries and keys into the softmax.
ADDITIONS = {
    "sinks": "attention sinks",
    "sink_proj": "attention sinks",
    "relative_position_bias": "a bias on the scores",
    "rel_logits_proj": "a bias on the scores",
}


class Parts(NamedTuple):
    """What recording needs to know of a model.

    Args:
        name: of the model's class, for errors.
        config: of the outermost model of transformers.
        entries: models that hold the text decoder, from the outside in; any of them may be called.
        attention: `id` of each module of the decoder; those that call the attention function are among them.
        configs: `id` of each of the configurations that the decoder's masks may be made for.
        layers: indices of the decoder's layers with attention, ascending.
        head_sizes: of those layers whose attention module says it, by index.
        visual: ids of the tokens that stand for pieces of a picture or a video.
        refusal: why its attention cannot be recorded whatever the layer; None if it can.
    """

    name: str
    config: Any
    entries: tuple[PreTrainedModel, ...]
    attention: frozenset[int]
    configs: frozenset[int]
    layers: tuple[int, ...]
    head_sizes: dict[int, int]
    visual: VisualTokens
    refusal: str | None


def outermost_model(model: nn.Module) -> PreTrainedModel:
    """Returns the model of transformers inside of whatever wraps it.

    Raises:
        TypeError: there is none.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    for module in modules:
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"model: expected a transformers model, wrapped or not, got {type(model).__name__}")


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the decoder of a model of transformers, without the output head.

    `get_decoder` of some families (Llama 4, BLIP-2) is a whole causal language model.
    """
    decoder: Any = model.get_decoder()
    while isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None:
        inner = decoder.get_decoder()
        if inner is decoder:
            inner = next((child for child in decoder.children() if isinstance(child, PreTrainedModel)), decoder)
        if inner is decoder:
            break
        decoder = inner
    return decoder


def is_encoder_decoder(config: Any) -> bool:
    """Tells whether a configuration is that of an encoder-decoder, or its text half is (InstructBLIP with T5)."""
    if getattr(config, "is_encoder_decoder", False):
        return True
    return bool(getattr(config.get_text_config(), "is_encoder_decoder", False))


def find_parts(model: nn.Module) -> Parts:
    """Returns the parts of a vision-language model, however it is wrapped.

    Raises:
        TypeError: no model of transformers is inside.
        ValueError: pictures do not reach this family's decoder as tokens of its input.
    """
    outermost = outermost_model(model)
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    name = type(outermost).__name__
    if is_encoder_decoder(outermost.config):
        raise _no_visual_tokens(name, "an encoder-decoder")
    decoder = find_decoder(outermost)
    inside = list(decoder.modules())
    crossing = next((kind for module in inside if "CrossAttention" in (kind := type(module).__name__)), None)
    if crossing is not None:
        raise _no_visual_tokens(name, crossing)
    entries = tuple(module for module in models if module is decoder or _holds(module, decoder))
    text_config = outermost.config.get_text_config()
    found: list[Any] = [module for module in inside if _is_attention(module)]
    configs = [outermost.config, text_config, *(getattr(module, "config", None) for module in (decoder, *found))]
    return Parts(
        name=name,
        config=outermost.config,
        entries=entries,
        attention=frozenset(map(id, inside)),
        configs=frozenset(id(config) for config in configs if config is not None),
        layers=_attention_layers({module.layer_idx for module in found}, text_config),
        head_sizes={module.layer_idx: size for module in found if (size := _head_size(module)) is not None},
        visual=find_visual_tokens(outermost.config, name),
        refusal=_why_not_plain(found, name),
    )


def choose_layers(parts: Parts, layers: Any) -> tuple[int, ...]:
    """Returns the layer indices that "last", "all" or a list of indices (negative from the end) stand for.

    Raises:
        TypeError, ValueError: another thing, no layer, one without attention, one whose heads are larger than the
            kernels take, or a model whose attention is no plain softmax.
    """
    chosen = _indices(layers, parts.layers)
    if parts.refusal is not None:
        raise ValueError(parts.refusal)
    for layer in chosen:
        size = parts.head_sizes.get(layer, 0)
        if size > HEAD_DIM:
            fitting = [index for index in parts.layers if parts.head_sizes.get(index, 0) <= HEAD_DIM]
            raise ValueError(
                f"layers: expected layers of a head size of at most {HEAD_DIM}, got layer {layer} of {parts.name} "
                f"with {size}; those that can be recorded: {fitting}"
            )
    return chosen


def _indices(layers: Any, available: tuple[int, ...]) -> tuple[int, ...]:
    if not available:
        raise ValueError("layers: expected a decoder whose attention modules know their layer_idx, got none")
    if isinstance(layers, str):
        if layers not in ("last", "all"):
            raise ValueError(f"layers: expected 'last', 'all' or a list of layer indices, got {layers!r}")
        return available[-1:] if layers == "last" else available
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected 'last', 'all' or a list of layer indices, got {layers!r}")
    count = available[-1] + 1
    chosen = []
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers: expected integers, got {layer!r}")
        index = layer + count if layer < 0 else layer
        if index not in available:
            raise ValueError(f"layers: expected indices of layers with attention, {list(available)}, got {layer}")
        if index in chosen:
            raise ValueError(f"layers: expected each layer once, got {layer} again")
        chosen.append(index)
    if not chosen:
        raise ValueError("layers: expected at least one layer, got none")
    return tuple(chosen)


def _holds(module: nn.Module, inner: nn.Module) -> bool:
    return any(child is inner for child in module.modules())


def _no_visual_tokens(name: str, got: str) -> ValueError:
    return ValueError(
        f"{name}: expected a decoder that reads pictures as tokens of its input, got {got}: its pictures reach the "
        "decoder through cross-attention, which has no visual tokens to record attention to"
    )


def _why_not_plain(layers: Iterable[nn.Module], name: str) -> str | None:
    """Returns why the attention is no softmax of q.k over an interval of keys; None if it is."""
    for layer in layers:
        kind = type(layer).__name__
        if isinstance(getattr(layer, "indexer", None), nn.Module):
            return (
                f"{name}: expected layers whose queries see one interval of keys; the indexer of {kind} chooses keys "
                "(indices) for each query, so its attention cannot be recorded"
            )
        for field, what in ADDITIONS.items():
            if getattr(layer, field, None) is not None:
                return (
                    f"{name}: expected layers whose attention is a plain softmax of q.k; {kind} has {what} ({field}), "
                    "so its attention cannot be recorded"
                )
    return None


def _is_attention(module: nn.Module) -> bool:
    """Tells whether a module of a decoder is the attention with a softmax of one of its layers.

    Blocks, mixers, convolutions and picture embeddings of some families have a layer's index, too.
    """
    kind, index = type(module).__name__, getattr(module, "layer_idx", None)
    has_softmax = _ATTENTION.search(kind) is not None and _WITHOUT_SOFTMAX.search(kind) is None
    return has_softmax and isinstance(index, int) and index >= 0


def _head_size(module: nn.Module) -> int | None:
    """Returns the size of queries and keys that an attention module was built for; None if it does not say."""
    sizes = (getattr(module, name, None) for name in ("qk_head_dim", "head_dim"))
    return next((size for size in sizes if isinstance(size, int)), None)


def _attention_layers(indices: set[int], text_config: Any) -> tuple[int, ...]:
    types = getattr(text_config, "layer_types", None) or []
    return tuple(sorted(indices - {index for index, kind in enumerate(types) if "linear" in kind}))
