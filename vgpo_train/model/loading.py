"""Loads the model and the processor of a checkpoint folder, of any family; their special tokens, their layers."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import CHAT_TEMPLATE_DIR, is_torchvision_available

from vgpo_train.config import RECORDABLE

# The weights, and what describes the weights: a trained checkpoint writes its own.
MODEL_FILES = ("config.json", "generation_config.json", "adapter_config.json")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")

# How configurations name the tokens that stand for pictures and videos or enclose them.
VISUAL_TOKEN_FIELDS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
    "image_start_token_id",
    "image_end_token_id",
    "boi_token_id",
    "eoi_token_id",
    "boi_token_index",
    "eoi_token_index",
    "video_start_token_id",
    "video_end_token_id",
)


def checkpoint_folder(folder: str | Path) -> Path:
    """Return `folder` as a path, or raise FileNotFoundError naming what is missing."""
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"model folder {str(path)!r} does not exist")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"model folder {str(path)!r} has no config.json: it is not a checkpoint")
    return path


def load_processor(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the processor of a checkpoint folder, padding on the left.

    Args:
        folder: checkpoint folder with tokenizer and image processor files.
        trust_remote_code: run code that the folder brings along.

    Returns:
        The `AutoProcessor` of the folder; without torchvision, for a family whose processor has a video half, the same
        processor class without that half: it takes pictures and refuses videos.

    Raises:
        FileNotFoundError: the folder does not exist or is not a checkpoint.
    """
    path = checkpoint_folder(folder)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    processor_class = _class_with_video_half(path, options)
    # transformers builds video processors on torchvision alone, and the CPU build of torch has no torchvision.
    if processor_class is not None and not is_torchvision_available():
        processor = pictures_only(processor_class).from_pretrained(path, **options)
    else:
        processor = AutoProcessor.from_pretrained(path, **options)
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def limit_pixels(processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Set the bounds on the pixels of a resized picture; None leaves the processor's own bound.

    Raises:
        ValueError: the processor's family resizes pictures otherwise.
    """
    bounds = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    wanted = {name: value for name, value in bounds.items() if value is not None}
    if not wanted:
        return
    images = processor.image_processor
    if not hasattr(images, "merge_size"):
        raise ValueError(f"{type(images).__name__} takes no min_pixels and max_pixels: leave them out")
    # Families that pack patches keep the bounds on pixels under the names of edges.
    images.size = {name: wanted.get(name, images.size[name]) for name in bounds}


def pictures_only(processor_class: type) -> type:
    """Return a subclass of a processor class that has no video half."""

    class PicturesOnly(processor_class):  # type: ignore[misc,valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> Any:
            if videos is not None:
                raise ValueError("videos need torchvision, which is not installed; this processor takes pictures")
            return super().__call__(images=images, text=text, **kwargs)

    # Saved files hold the name, by which the class is found when they are loaded.
    PicturesOnly.__name__ = processor_class.__name__
    PicturesOnly.__qualname__ = processor_class.__qualname__
    return PicturesOnly


def copy_processor_files(source_folder: str | Path, target_folder: str | Path) -> list[str]:
    """Copy everything but weights and model configuration from one checkpoint folder to another.

    Copying keeps what loading and saving would lose, such as the configuration of a video half that this machine
    cannot build.

    Args:
        source_folder: checkpoint folder that the model came from.
        target_folder: checkpoint folder that was just written; created if it is missing.

    Returns:
        Paths of the copied files in the folder, sorted; of folders inside it, those of further chat templates and
        further tokenizers are copied.
    """
    source, target = checkpoint_folder(source_folder), Path(target_folder)
    target.mkdir(parents=True, exist_ok=True)
    # transformers reads a processor's second tokenizer from a folder of its name, such as qformer_tokenizer.
    inside = [
        entry
        for entry in source.iterdir()
        if entry.is_dir() and (entry.name == CHAT_TEMPLATE_DIR or entry.name.endswith("_tokenizer"))
    ]
    names = sorted(
        str(entry.relative_to(source))
        for folder in (source, *inside)
        for entry in folder.iterdir()
        if entry.is_file() and not _describes_weights(entry.name)
    )
    for name in names:
        if (source / name).resolve() != (target / name).resolve():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    return names


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load an image-text-to-text model from a checkpoint folder.

    Args:
        folder: checkpoint folder that `from_pretrained` reads.
        dtype: dtype of the parameters.
        attn_implementation: name of an attention that transformers knows, or "vgpo" for the text half on the one that
            can be recorded and the default for the vision tower; None takes the folder's or the default.
        trust_remote_code: run code that the folder brings along.

    Returns:
        The model, sharded if DeepSpeed's ZeRO-3 initialisation is on.

    Raises:
        FileNotFoundError: the folder does not exist or is not a checkpoint.
    """
    path = checkpoint_folder(folder)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    attention: str | dict[str, str] | None = attn_implementation
    if attn_implementation == RECORDABLE:
        importlib.import_module("vgpo_kernels.integrations.transformers")  # makes the name known
        has_text_half = "text_config" in AutoConfig.from_pretrained(path, **options).sub_configs
        attention = {"text_config": RECORDABLE} if has_text_half else RECORDABLE
    return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation=attention, **options)


def layer_count(folder: str | Path, *, trust_remote_code: bool = False) -> int | None:
    """Return how many layers the text half of a checkpoint has, or None if its configuration has no such number."""
    config = AutoConfig.from_pretrained(
        checkpoint_folder(folder), trust_remote_code=trust_remote_code, local_files_only=True
    )
    return getattr(config.get_text_config(), "num_hidden_layers", None)


def end_tokens(model_folder: str | Path, tokenizer: Any) -> list[int]:
    """Returns the ids that end a completion: those that transformers' `generate` takes, or else the tokenizer's.

    Args:
        model_folder: checkpoint folder; its `generation_config.json` comes first, then its `config.json`, as a whole
            and then the text half.
        tokenizer: of the checkpoint.

    Raises:
        ValueError: none of them names an end-of-sequence token.
    """
    files = (Path(model_folder) / name for name in ("generation_config.json", "config.json"))
    generation, config = (json.loads(file.read_text("utf-8")) if file.is_file() else {} for file in files)
    of_config = GenerationConfig.from_model_config(config).eos_token_id
    for found in (generation.get("eos_token_id"), of_config, tokenizer.eos_token_id):
        if found is not None and found != []:
            return list(found) if isinstance(found, list) else [found]
    raise ValueError(f"model folder {str(model_folder)!r} names no end-of-sequence token")


def visual_token_ids(config: Any, processor: Any = None) -> list[int]:
    """Return the ids that a policy must never sample: picture and video tokens and the marks around them.

    Args:
        config: model configuration; those inside of it count, too (Phi-4-multimodal names its token there).
        processor: its processor; adds the tokens that only the processor or its tokenizer knows.

    Returns:
        Sorted ids; empty for a family without such tokens.
    """
    found: set[int] = set()
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for field in VISUAL_TOKEN_FIELDS:
            found.update(_as_ids(getattr(part, field, None)))
    for owner in (processor, getattr(processor, "tokenizer", None)):
        for field in (*VISUAL_TOKEN_FIELDS, "image_token_ids", "video_token_ids"):
            found.update(_as_ids(getattr(owner, field, None)))
    tokenizer = getattr(processor, "tokenizer", None)
    for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items():
        if added.special and any(word in added.content for word in ("image", "video", "vision")):
            found.add(int(token))
    unknown = getattr(tokenizer, "unk_token_id", None)
    found.discard(unknown if unknown is not None else -1)
    return sorted(found)


def _class_with_video_half(path: Path, options: dict[str, Any]) -> type | None:
    config_class = type(AutoConfig.from_pretrained(path, **options))
    if config_class not in PROCESSOR_MAPPING:
        return None
    processor_class = PROCESSOR_MAPPING[config_class]
    return processor_class if "video_processor" in processor_class.get_attributes() else None


def _describes_weights(name: str) -> bool:
    return name in MODEL_FILES or name.endswith(WEIGHT_SUFFIXES) or name.endswith(".index.json")


def _as_ids(value: Any) -> set[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return {item for item in values if type(item) is int}  # a bool is no id
