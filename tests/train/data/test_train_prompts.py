"""Token ids are the processor's own, and unlike pictures are joined as the processor joins them, in every family."""

import io
from typing import Any

import pytest
import torch
from PIL import Image
from train_processors import FAMILIES, pictures_of, template
from transformers.utils import is_torchvision_available

from vgpo_train.data import PromptBatch, PromptCollator, PromptError, Sample
from vgpo_train.data.batches import learn_joins


def _png(size: tuple[int, int], colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


WIDE, TALL, SMALL = _png((300, 200), "red"), _png((120, 340), "blue"), _png((64, 48), "green")
SAMPLES = [
    Sample("wide", "Is it red?", "1", (WIDE,)),
    Sample("two", "Is <image> or <image>, the second one, larger?", "1", (TALL, SMALL)),
]
TEXT = Sample("text", "No picture?", "1")


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "mllama"])
def collator(request: pytest.FixtureRequest) -> PromptCollator:
    if request.param == "pixtral" and not is_torchvision_available():
        pytest.skip("transformers asks for torchvision")
    return PromptCollator(FAMILIES[request.param](), system_prompt="Think.", max_prompt_length=9999)


def _conversation(collator: PromptCollator, sample: Sample) -> list[dict[str, Any]]:
    messages = collator.messages(sample)
    pictures = iter(sample.open_images())
    for part in messages[-1]["content"]:
        if part["type"] == "image":
            part["image"] = next(pictures)
    return messages


def test_token_ids_are_those_of_the_processors_chat_template(collator: PromptCollator) -> None:
    bos = collator.processor.tokenizer.bos_token_id
    for sample, row in zip([*SAMPLES, TEXT], collator([*SAMPLES, TEXT]).rows, strict=True):
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
        own = collator.processor.apply_chat_template(_conversation(collator, sample), **options)
        assert torch.equal(row["input_ids"], own["input_ids"])
        assert row["input_ids"][0].tolist().count(bos) == 1


def test_unlike_pictures_are_joined_as_the_processor_joins_them(collator: PromptCollator) -> None:
    found = collator(SAMPLES).tensors()
    processor = collator.processor
    conversations = [collator.messages(sample) for sample in SAMPLES]
    texts = processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    expected = processor(
        images=[sample.open_images() for sample in SAMPLES],
        text=texts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=not texts[0].startswith("<s>"),
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_prompt_without_a_picture_is_joined_as_the_processor_joins_it(collator: PromptCollator) -> None:
    samples = [SAMPLES[0], TEXT]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    expected = collator.processor.apply_chat_template(
        [_conversation(collator, sample) for sample in samples],
        **options,
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    found = collator(samples).tensors()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_start_mark_that_the_template_leaves_to_the_tokenizer_is_kept() -> None:
    processor = FAMILIES["llava"]()
    processor.chat_template = template("<image>", bos="")["chat_template"]
    (row,) = PromptCollator(processor, max_prompt_length=999)([SAMPLES[0]]).rows
    assert row["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) == 1


def test_a_family_that_cannot_be_joined_is_refused_by_name() -> None:
    collator = PromptCollator(FAMILIES["mllama"](), max_prompt_length=999)
    message = r"MllamaProcessor: prompts with unlike pictures cannot be joined: aspect_ratio_mask of .* in a batch"
    with pytest.raises(PromptError, match=message):
        collator([SAMPLES[0]])


def test_a_processor_without_a_chat_template_is_refused_by_name() -> None:
    processor = FAMILIES["llava"]()
    processor.chat_template = None
    with pytest.raises(PromptError, match=r"LlavaProcessor: .*does not have a chat template"):
        PromptCollator(processor, max_prompt_length=999).joining  # noqa: B018


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        # Pictures of sizes of their own, padded at the right and at the bottom.
        (
            "pixtral",
            "PixtralImageProcessorPil",
            {"size": {"longest_edge": 112}, "patch_size": {"height": 14, "width": 14}},
        ),
        # Patches of all pictures of a prompt side by side in one long picture.
        ("minicpmv4_6", "MiniCPMV4_6ImageProcessorPil", {}),
        (
            "smolvlm",
            "SmolVLMImageProcessorPil",
            {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}},
        ),
    ],
)
def test_what_an_image_processor_does_is_read_off(module: str, name: str, options: dict[str, Any]) -> None:
    process = pictures_of(module, name, **options)

    def inputs(pictures: list[list[Image.Image]], length: int) -> dict[str, torch.Tensor]:
        made = process(images=pictures, return_tensors="pt")
        ids = torch.zeros(len(pictures), length, dtype=torch.long)
        return {"input_ids": ids} | {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}

    pictures = [sample.open_images() for sample in SAMPLES]
    rows = [inputs([own], length) for own, length in zip(pictures, (3, 5), strict=True)]
    batch = inputs(pictures, 5)
    joined = PromptBatch(SAMPLES, rows, *learn_joins(rows, batch)).tensors()
    assert {key: torch.equal(joined[key], value) for key, value in batch.items()} == dict.fromkeys(batch, True)


def test_a_mask_that_is_padded_with_ones_is_read_off() -> None:
    # As Phi-4's: crops that a picture does not have are 0, and count as seen.
    def parts(*crops: int, most: int) -> dict[str, torch.Tensor]:
        pixels, mask = torch.zeros(len(crops), most, 3, 8, 8), torch.ones(len(crops), most, 4, 4)
        for picture, count in enumerate(crops):
            pixels[picture, :count] = picture + 1
            mask[picture, :count, 2:] = 0
        return {"pixels": pixels, "mask": mask}

    rows = [{"input_ids": torch.zeros(1, length, dtype=torch.long)} for length in (3, 5)]
    rows = [rows[0] | parts(4, most=4), rows[1] | parts(1, 2, most=2)]
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long)}
    batch |= {name: torch.cat([rows[0][name], parts(1, 2, most=4)[name]]) for name in ("pixels", "mask")}
    pad_values, joins = learn_joins(rows, batch)
    assert (joins["pixels"].fill, joins["mask"].fill) == (0, 1)
    for name, value in PromptBatch(SAMPLES, rows, pad_values, joins).tensors().items():
        assert torch.equal(value, batch[name])


def test_patches_of_unlike_pictures_are_padded_with_zeros() -> None:
    rows = [
        {"input_ids": torch.zeros(1, 4, dtype=torch.long), "pixel_values": torch.ones(1, n, 3, 28, 28)} for n in (5, 4)
    ]
    pixels = PromptBatch(SAMPLES, rows, {"input_ids": 0}).tensors()["pixel_values"]
    assert pixels.shape == (2, 5, 3, 28, 28)
    assert pixels[0].all()
    assert pixels[1, :4].all()
    assert not pixels[1, 4].any()


def test_the_quickstarts_prompt_gets_one_start_mark(tiny_checkpoint) -> None:
    from tokenizers.processors import TemplateProcessing

    from vgpo_train.model import load_processor

    processor = load_processor(tiny_checkpoint)
    tokens = processor.tokenizer
    tokens.bos_token = "<|endoftext|>"
    bos = tokens.convert_tokens_to_ids(tokens.bos_token)
    marks = [("<|endoftext|>", bos)]
    tokens._tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=marks)
    processor.chat_template = tokens.chat_template = "{{ bos_token }}" + tokens.chat_template
    (row,) = PromptCollator(processor, max_prompt_length=500)([SAMPLES[0]]).rows
    assert row["input_ids"][0].tolist().count(bos) == 1
