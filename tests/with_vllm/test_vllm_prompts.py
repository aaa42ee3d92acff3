"""Prompts with one mark a picture, expanded by vLLM's own processors: the ids that the trainer's processor makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

pytest.importorskip("vllm", reason="vllm is not installed here: make vllm-test makes its environment")
from transformers import (
    CLIPImageProcessor,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaConfig,
    LlavaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
)
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import ProcessorInputs, TimingContext

from vgpo_kernels.integrations.trl.vllm import unexpanded_prompts

SIZE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
VISION = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **SIZE}
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "it"]
NEWLINES = ["\n" * count for count in (1, 2, 3, 4)]


def tokenizer_of(*tokens: str, **special: Any) -> PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate([*WORDS, *tokens])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named, **special)
    tokenizer.add_tokens(list(tokens), special_tokens=not special)
    return tokenizer


def template(mark: str) -> str:
    text = "{{ bos_token }} {% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}MARK"
    return text.replace("MARK", mark) + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"


def llava_config(text: dict[str, Any], vision: dict[str, Any]) -> LlavaConfig:
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=len(WORDS),
        vision_feature_select_strategy="full",
        architectures=["LlavaForConditionalGeneration"],
    )


def llava() -> tuple[Any, Any]:
    """Placeholders with nothing around them: pictures side by side touch."""
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer_of("<image>"),
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )
    return processor, llava_config({"model_type": "llama", "vocab_size": 20, **SIZE}, VISION)


def pixtral() -> tuple[Any, Any]:
    """A break behind each row of a picture."""
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 64}, patch_size=16),
        tokenizer_of("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        patch_size=16,
        chat_template=template("[IMG]"),
    )
    text = {"model_type": "mistral", "vocab_size": 20, "head_dim": 32, **SIZE}
    vision = {"model_type": "pixtral", "image_size": 64, "patch_size": 16, **SIZE}
    return processor, llava_config(text, vision)


def gemma3() -> tuple[Any, Any]:
    """A mark that is not the placeholder, and newlines that become one token with their neighbours."""
    marks = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 28, "width": 28}),
        tokenizer_of(*marks.values(), *NEWLINES, extra_special_tokens=marks),
        chat_template=template("<start_of_image>"),
        image_seq_length=4,
    )
    text = {"vocab_size": 20, "head_dim": 32, "num_key_value_heads": 1, **SIZE}
    vision = {"image_size": 28, "patch_size": 7, **SIZE}
    ids = {"boi_token_index": 7, "image_token_index": 8, "eoi_token_index": 9}
    return processor, Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        architectures=["Gemma3ForConditionalGeneration"],
        **ids,
    )


@pytest.mark.parametrize("family", [llava, pixtral, gemma3])
def test_vllm_expands_marks_to_the_ids_that_are_trained_on(family: Callable[[], tuple[Any, Any]], tmp_path: Path):
    processor, config = family()
    for part in (processor, config):
        part.save_pretrained(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (28, 56, 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise[:, :width]) for width in (28, 56)]
    content = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": " what is it"}]
    prompts = [[{"role": "user", "content": content}]]
    expanded = processor.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs={"return_tensors": "np"}
    )["input_ids"][0].tolist()
    (sent,) = unexpanded_prompts(processor, prompts)
    assert len(sent) < len(expanded) - 4
    engine = MULTIMODAL_REGISTRY.create_processor(ModelConfig(str(tmp_path), max_model_len=200, dtype="float32"))
    for ids, same in ((sent, True), (expanded, False)):
        items = engine.info.parse_mm_data({"image": pictures})
        inputs = ProcessorInputs(prompt=ids, mm_data_items=items, hf_processor_mm_kwargs={})
        completed = engine.apply(inputs, TimingContext(enabled=False))["prompt_token_ids"]
        assert (completed == expanded) == same
