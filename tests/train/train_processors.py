"""Real processors of several families around a small tokenizer, without a file: what tests of prompts are run on."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from vgpo_train.model.loading import pictures_only

SIZE = {"height": 28, "width": 28}
GRID = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
TILES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}}


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of bytes that puts <s> before each text, as Llama's, Gemma's and Mistral's do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", extra_special_tokens=named, **marks)
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    bos = [("<s>", fast.convert_tokens_to_ids("<s>"))]
    fast._tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=bos)
    return fast


def template(picture: str, *, bos: str = "{{ bos_token }}") -> dict[str, str]:
    """Returns a chat template that writes `picture` for each picture."""
    part = "{% if p['type'] == 'image' %}" + picture + "{% else %}{{ p['text'] }}{% endif %}"
    message = "{{ m['role'] }}: {% for p in m['content'] %}" + part + "{% endfor %}\n"
    end = "{% if add_generation_prompt %}assistant: {% endif %}"
    return {"chat_template": bos + "{% for m in messages %}" + message + "{% endfor %}" + end}


def pictures_of(module: str, name: str, **options: Any) -> Any:
    """Returns an image processor on Pillow."""
    found = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, name)(**options)


def _qwen() -> Any:
    pictures = pictures_of("qwen2_vl", "Qwen2VLImageProcessorPil", size={"shortest_edge": 784, "longest_edge": 12544})
    tokens = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    marks = template("<|vision_start|><|image_pad|><|vision_end|>", bos="")
    return pictures_only(transformers.Qwen2_5_VLProcessor)(pictures, tokens, **marks)


def _llava() -> Any:
    pictures = pictures_of("clip", "CLIPImageProcessorPil", size={"shortest_edge": 28}, crop_size=SIZE)
    return transformers.LlavaProcessor(pictures, tokenizer("<image>"), **LLAVA, **template("<image>"))


def _llava_next() -> Any:
    size = {"size": {"shortest_edge": 28}, "crop_size": SIZE}
    pictures = pictures_of("llava_next", "LlavaNextImageProcessorPil", **size, **GRID)
    return transformers.LlavaNextProcessor(pictures, tokenizer("<image>"), **LLAVA, **template("<image>"))


def _llava_onevision() -> Any:
    pictures = pictures_of("llava_onevision", "LlavaOnevisionImageProcessorPil", size=SIZE, **GRID)
    options = {"num_image_tokens": 4, "vision_feature_select_strategy": "full", **template("<image>")}
    return pictures_only(transformers.LlavaOnevisionProcessor)(pictures, tokenizer("<image>", "<video>"), **options)


def _gemma3() -> Any:
    pictures = pictures_of("gemma3", "Gemma3ImageProcessorPil", size=SIZE)
    tokens = tokenizer(boi_token="<boi>", eoi_token="<eoi>", image_token="<img>")
    return transformers.Gemma3Processor(pictures, tokens, image_seq_length=4, **template("<boi>"))


def _idefics2() -> Any:
    size = {"shortest_edge": 28, "longest_edge": 56}
    pictures = pictures_of("idefics2", "Idefics2ImageProcessorPil", size=size, do_image_splitting=False)
    tokens = tokenizer("<image>", "<fake_token_around_image>")
    return transformers.Idefics2Processor(pictures, tokens, image_seq_len=4, **template("<image>"))


def _idefics3() -> Any:
    pictures = pictures_of("idefics3", "Idefics3ImageProcessorPil", **TILES)
    tokens = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    return transformers.Idefics3Processor(pictures, tokens, image_seq_len=4, **template("<image>"))


def _internvl() -> Any:
    pictures = pictures_of("got_ocr2", "GotOcr2ImageProcessorPil", size=SIZE, crop_to_patches=True)
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    tokens = tokenizer(**names, context_image_token="<ctx>")
    return pictures_only(transformers.InternVLProcessor)(pictures, tokens, image_seq_length=4, **template("<ctx>"))


def _pixtral() -> Any:
    options = {"size": {"longest_edge": 112}, "patch_size": {"height": 14, "width": 14}}
    pictures = pictures_of("pixtral", "PixtralImageProcessorPil", **options)
    tokens = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    return transformers.PixtralProcessor(pictures, tokens, patch_size=14, **template("[IMG]"))


def _mllama() -> Any:
    tokens = tokenizer("<|image|>", "<|python_tag|>")
    return transformers.MllamaProcessor(
        pictures_of("mllama", "MllamaImageProcessorPil", size=SIZE), tokens, **template("<|image|>")
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen2_5_vl": _qwen,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "gemma3": _gemma3,
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "pixtral": _pixtral,
    "mllama": _mllama,
}
