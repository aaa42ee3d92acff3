"""Checkpoint folders of tiny random models, under the tensor names that the published checkpoints of a family have."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

sys.path.append(str(Path(__file__).parents[1] / "integrations"))

from tiny_vlms import FAMILIES, IMAGE, MULTIMODAL_ROPE, SPECIAL, TEXT


def _llava() -> Any:
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**size, image_size=16, patch_size=4)
    halves = {"vision_config": vision, "text_config": LlamaConfig(**TEXT)}
    return LlavaForConditionalGeneration(LlavaConfig(**halves, image_token_index=IMAGE))


def _qwen3_vl_moe() -> Any:
    vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    rope = {**MULTIMODAL_ROPE, "mrope_section": [2, 1, 1]}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope, **experts}
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision, **SPECIAL))


def _glm4v_moe() -> Any:
    vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"patch_size": 4, "image_size": 16}
    rope = {**MULTIMODAL_ROPE, "partial_rotary_factor": 1.0}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope, **experts}
    return Glm4vMoeForConditionalGeneration(Glm4vMoeConfig(text_config=text, vision_config=vision, **SPECIAL))


_QWEN2 = {"model.language_model.": "model.", "model.visual.": "visual."}
_LLAVA = {
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
_WRAPPED_TOWER = {"model.vision_tower.": "vision_tower.vision_model."}
# What makes a model, and how published names begin where those of transformers 5 begin otherwise.
PUBLISHED: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "qwen2_vl": (FAMILIES["qwen2_vl"].make, _QWEN2),
    "qwen2_5_vl": (FAMILIES["qwen2_5_vl"].make, _QWEN2),
    "qwen3_vl": (FAMILIES["qwen3_vl"].make, {}),
    "llava": (_llava, _LLAVA | _WRAPPED_TOWER),
    "gemma3": (FAMILIES["gemma3"].make, _LLAVA | _WRAPPED_TOWER),
    "internvl": (FAMILIES["internvl"].make, _LLAVA | {"model.vision_tower.": "vision_tower."}),
    "qwen3_vl_moe": (_qwen3_vl_moe, {}),
    "glm4v_moe": (_glm4v_moe, {}),
}


def published_tensors(family: str) -> tuple[Any, dict[str, Tensor]]:
    """Returns a tiny random model of a family, and its weights as a published checkpoint has them, in bfloat16."""
    make, prefixes = PUBLISHED[family]
    torch.manual_seed(0)
    model = make().to(torch.bfloat16)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {}
    for name, value in model.state_dict().items():
        if name in tied:
            continue
        for ours, theirs in prefixes.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        tensors |= _parts(family, name, value)
    return model, {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _parts(family: str, name: str, value: Tensor) -> dict[str, Tensor]:
    """Returns what transformers 5 has merged, or turned round, as it is published."""
    if ".mlp.experts." not in name:
        return {name: value}
    if family == "qwen3_vl_moe":
        return {name: value.transpose(1, 2)}
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    before, _, merged = name.rpartition(".")
    return {
        f"{before}.{expert}.{part}.weight": own
        for expert, both in enumerate(value)
        for part, own in zip(names[merged], both.chunk(len(names[merged])), strict=True)
    }


def write_checkpoint(
    folder: Path, model: Any, tensors: dict[str, Tensor], *, files: int = 1, safe: bool = True
) -> Path:
    """Writes a checkpoint folder of a model's configuration and the given tensors, divided into so many files."""
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    stem, suffix = ("model", ".safetensors") if safe else ("pytorch_model", ".bin")
    weight_map = {}
    for number in range(files):
        part = dict(list(tensors.items())[number::files])
        name = f"{stem}-{number + 1:05}-of-{files:05}{suffix}" if files > 1 else stem + suffix
        if safe:
            save_file(part, folder / name, {"format": "pt"})
        else:
            torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if files > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
