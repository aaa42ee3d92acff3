"""Tiny random vision-language models of several families, with batches made of random pixels.

Ids 1 to 89 are words, 90 and above mean something to the model; row 0 of a batch has two pictures, the other none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

from vgpo_kernels.integrations.transformers import record_visual_attention

VOCABULARY = 100
IMAGE, VIDEO, START, END = 95, 96, 93, 94
NOT_WORDS = [0, *range(90, VOCABULARY)]
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MULTIMODAL_ROPE = {"type": "default", "mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10000.0}
SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """A model class with a tiny configuration, and what a picture is to it.

    Args:
        make: builds the model.
        tokens: image tokens a picture.
        pixels: the model's arguments for so many pictures.
        extra: further arguments, from input_ids and the length of the prompt.
    """

    make: Callable[[], Any]
    tokens: int
    pixels: Callable[[int], dict[str, Tensor]]
    extra: Callable[[Tensor, int], dict[str, Tensor]] = lambda ids, prompt: {}  # noqa: ARG005


def _grid_pixels(patch_values: int) -> Callable[[int], dict[str, Tensor]]:
    """Returns pictures of 4 x 4 patches, 2 x 2 tokens."""

    def pixels(pictures: int) -> dict[str, Tensor]:
        grid = torch.tensor([[1, 4, 4]] * pictures)
        return {"pixel_values": torch.randn(pictures * 16, patch_values), "image_grid_thw": grid}

    return pixels


def _square_pixels(pictures: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(pictures, 3, 16, 16)}


def _multimodal_types(ids: Tensor, _: int) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int()}


def _picture_types(ids: Tensor, _: int) -> dict[str, Tensor]:
    return {"token_type_ids": (ids == IMAGE).long()}


def _suffix_types(ids: Tensor, prompt: int) -> dict[str, Tensor]:
    """The prompt is a prefix seen in both directions."""
    return {"token_type_ids": (torch.arange(ids.shape[1]) >= prompt).long().expand(ids.shape)}


def _qwen2_vl() -> Any:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    text = {**TEXT, "rope_parameters": MULTIMODAL_ROPE}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **SPECIAL))


def _qwen2_5_vl() -> Any:
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    }
    # Sliding and full layers mixed, and the window shorter than the sequences.
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = {**TEXT, "rope_parameters": MULTIMODAL_ROPE, "use_sliding_window": True, "sliding_window": 7}
    text["layer_types"] = kinds
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **SPECIAL))


def _qwen3_vl() -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**MULTIMODAL_ROPE, "mrope_section": [2, 1, 1]}}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **SPECIAL))


def _gemma3() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision.update(image_size=16, patch_size=4)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = Gemma3TextConfig(**TEXT, head_dim=8, layer_types=kinds, sliding_window=6, query_pre_attn_scalar=8)
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**vision),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return Gemma3ForConditionalGeneration(config)


def _internvl() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision.update(image_size=[16, 16], patch_size=[4, 4])
    config = InternVLConfig(
        text_config=Qwen2Config(**TEXT), vision_config=vision, image_token_id=IMAGE, image_seq_length=4
    )
    return InternVLForConditionalGeneration(config)


def _llava_onevision() -> Any:
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**TEXT),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 16]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _onevision_pixels(pictures: int) -> dict[str, Tensor]:
    # A picture as large as the tower's comes as itself and as one tile, each of 16 patches, and 4 ends of rows.
    return {
        "pixel_values": torch.randn(pictures, 2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16]] * pictures),
        "batch_num_images": torch.ones(pictures, dtype=torch.long),
    }


def _soft_capped() -> Any:
    """PaliGemma 2: soft-capped attention, a prefix seen in both directions."""
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = Gemma2Config(
        **TEXT,
        head_dim=8,
        query_pre_attn_scalar=8,
        layer_types=kinds,
        sliding_window=8,
        attn_logit_softcapping=0.5,  # so low that leaving it out would show
        final_logit_softcapping=None,
    )
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, image_token_id=IMAGE, projection_dim=32
    )
    return PaliGemmaForConditionalGeneration(config)


FAMILIES = {
    "qwen2_vl": Family(_qwen2_vl, 4, _grid_pixels(3 * 2 * 4 * 4), _multimodal_types),
    "qwen2_5_vl": Family(_qwen2_5_vl, 4, _grid_pixels(3 * 2 * 4 * 4), _multimodal_types),
    "qwen3_vl": Family(_qwen3_vl, 4, _grid_pixels(3 * 2 * 4 * 4), _multimodal_types),
    "gemma3": Family(_gemma3, 4, _square_pixels, _picture_types),
    "internvl": Family(_internvl, 4, _square_pixels),
    "llava_onevision": Family(_llava_onevision, 36, _onevision_pixels),
    "soft_capped": Family(_soft_capped, 4, _square_pixels, _suffix_types),
}


def make_shared_keys() -> Any:
    """Returns a Gemma 4 whose upper layers share keys and run only the queries asked for; pictures are plain tokens."""
    config = Gemma4TextConfig(
        **{**TEXT, "num_hidden_layers": 4},
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=6,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
    )
    config.image_token_id = IMAGE
    return with_large_weights(Gemma4ForCausalLM(config))


def make(name: str, *, seed: int = 0) -> Any:
    """Returns a model with weights large enough that attention is not uniform."""
    torch.manual_seed(seed)
    return with_large_weights(FAMILIES[name].make())


def with_large_weights(model: Any) -> Any:
    """Returns the model with weights that make its distributions differ from uniform ones, set to sample plainly."""
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def make_batch(name: str, *, words: int = 5, seed: int = 1) -> dict[str, Any]:
    """Returns model arguments: row 0 has two pictures, row 1 none, row 2 one; shorter rows are padded on the left."""
    torch.manual_seed(seed)
    family = FAMILIES[name]
    rows = [_row(family, pictures, words + pictures) for pictures in (2, 0, 1)]
    length = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return {**batch, **family.pixels(3), **family.extra(ids, length)}


def continued(name: str, batch: dict[str, Any], completion: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
    """Returns the arguments for prompts followed by their completions (B, T)."""
    ids = torch.cat([batch["input_ids"], completion], dim=1)
    mask = torch.ones_like(completion) if mask is None else mask
    attention_mask = torch.cat([batch["attention_mask"], mask], dim=1)
    return {
        **batch,
        "input_ids": ids,
        "attention_mask": attention_mask,
        **FAMILIES[name].extra(ids, batch["input_ids"].shape[1]),
    }


def recorded(model: Any, batch: dict[str, Any], *args: Any, **options: Any) -> Tensor:
    """Returns the mass that a forward records."""
    with torch.no_grad(), record_visual_attention(model, *args, **options) as rec:
        model(**batch)
    return rec.mass


def _row(family: Family, pictures: int, words: int) -> list[int]:
    row = torch.randint(1, 90, (2,)).tolist()
    for _ in range(pictures):
        row += [START, *[IMAGE] * family.tokens, END, *torch.randint(1, 90, (2,)).tolist()]
    return row + torch.randint(1, 90, (words,)).tolist()
