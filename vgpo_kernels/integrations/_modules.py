"""Finds, in a model that may be wrapped, the text decoder, its attention layers, and the ids of visual tokens.

parts = find_parts(engine)  # DeepSpeed, DDP, PEFT and bare models alike
parts.entries  # the modules that may be called with input_ids
parts.layers  # indices of the layers with attention
parts.image_tokens, parts.video_tokens
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index")
VIDEO_TOKEN_FIELDS = ("video_token_id", "video_token_index")


class Parts(NamedTuple):
    """What recording needs to know of a model.

    Args:
        name: of the model's class, for errors.
        config: of the outermost model of transformers.
        entries: models that hold the text decoder, from the outside in; any of them may be called.
        attention: ids of the decoder's modules, those that call the attention function among them.
        configs: ids of the configurations that the decoder's masks may be made for.
        layers: indices of the decoder's layers with attention, ascending.
        image_tokens, video_tokens: ids of the tokens that stand for pieces of a picture or a video.
    """

    name: str
    config: Any
    entries: tuple[PreTrainedModel, ...]
    attention: frozenset[int]
    configs: frozenset[int]
    layers: tuple[int, ...]
    image_tokens: frozenset[int]
    video_tokens: frozenset[int]


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


def find_parts(model: nn.Module) -> Parts:
    """Returns the parts of a vision-language model, however it is wrapped.

    Raises:
        TypeError: no model of transformers is inside.
        ValueError: pictures do not reach this family's decoder as tokens of its input.
    """
    outermost = outermost_model(model)
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    name = type(outermost).__name__
    decoder = outermost.get_decoder()
    inside = list(decoder.modules())
    _refuse_cross_attention(outermost, inside, name)
    entries = tuple(module for module in models if module is decoder or _holds(module, decoder))
    text_config = outermost.config.get_text_config()
    found = [module for module in inside if isinstance(getattr(module, "layer_idx", None), int)]
    configs = [outermost.config, text_config, *(getattr(module, "config", None) for module in (decoder, *found))]
    image_tokens = _tokens((entry.config for entry in entries), IMAGE_TOKEN_FIELDS)
    if not image_tokens:
        fields, found_class = " or ".join(IMAGE_TOKEN_FIELDS), type(outermost.config).__name__
        raise ValueError(
            f"{name}: expected a configuration that names the image token ({fields}), got {found_class}; "
            "pass the whole vision-language model, and one whose pictures are tokens of input_ids"
        )
    return Parts(
        name,
        outermost.config,
        entries,
        frozenset(map(id, inside)),
        frozenset(id(config) for config in configs if config is not None),
        _attention_layers({module.layer_idx for module in found}, text_config),
        image_tokens,
        _tokens((entry.config for entry in entries), VIDEO_TOKEN_FIELDS),
    )


def chosen_layers(layers: Any, available: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the layer indices that "last", "all" or a list of indices (negative from the end) stand for.

    Raises:
        TypeError, ValueError: another thing, no layer, or one without attention.
    """
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


def _refuse_cross_attention(outermost: PreTrainedModel, decoder_modules: Iterable[nn.Module], name: str) -> None:
    crossing = any("CrossAttention" in type(module).__name__ for module in decoder_modules)
    if crossing or getattr(outermost.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name}: expected a decoder that reads pictures as tokens of its input; this one reads them through "
            "cross-attention, which has no visual tokens to record attention to"
        )


def _attention_layers(indices: set[int], text_config: Any) -> tuple[int, ...]:
    types = getattr(text_config, "layer_types", None) or []
    without = {index for index, kind in enumerate(types) if "linear" in kind or kind in ("conv", "mamba", "mamba2")}
    return tuple(sorted(indices - without))


def _tokens(configs: Iterable[Any], fields: tuple[str, ...]) -> frozenset[int]:
    """Returns the ids of the first configuration that names any."""
    for config in configs:
        values = [getattr(config, field, None) for field in fields]
        found = {value for value in values if isinstance(value, int) and not isinstance(value, bool)}
        if found:
            return frozenset(found)
    return frozenset()
