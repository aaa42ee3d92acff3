"""VGPOTrainer's prompts to a vLLM in its process, here a fake one; tests/with_vllm has the real one."""

import inspect
import math
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

pytest.importorskip("trl", minversion="1.16")
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
from trl import GRPOTrainer
from trl.generation import vllm_generation
from trl_trainers import dataset

from vgpo_kernels.integrations.trl import VGPOTrainer, vllm
from vgpo_kernels.integrations.trl.vllm import UnexpandedEngine, unexpanded_prompts, without_placeholders


class FakeEngine:
    """Takes what TRL gives to vLLM, and expands the first placeholder of each picture, as vLLM's processor does."""

    more = 0  # placeholders a picture beyond those of the trainer's processor

    def __init__(self, *, processing_class: Any, generation_kwargs: Any, **_: Any) -> None:
        self.processor, self.generation_kwargs = processing_class, generation_kwargs or {}
        self.pad = processing_class.tokenizer.convert_tokens_to_ids(processing_class.image_token)

    def sync_weights(self) -> None:
        """Has none."""

    def expand(self, ids: list[int], pictures: list[Any]) -> list[int]:
        expanded, at = [], 0
        for picture in pictures:
            mark = ids.index(self.pad, at)
            grid = self.processor.image_processor(images=[picture])["image_grid_thw"][0]
            expanded += ids[at:mark] + [self.pad] * (math.prod(map(int, grid)) // 4 + self.more)
            at = mark + 1
        return expanded + ids[at:]

    def generate(self, prompts: list[list[int]], images: list[Any], num_generations: int, profiler: Any = None) -> Any:
        assert profiler is not None
        self.sent = prompts
        seen = images or [None] * len(prompts)
        self.completed = [self.expand(ids, own or []) for ids, own in zip(prompts, seen, strict=True)]
        completions = [[1 + row, 2, 3 + num_generations][: 1 + row % 3] for row in range(len(prompts))]
        return self.completed, completions, [[[-3.0]] * len(ids) for ids in completions], None


@pytest.fixture
def trainer_of(make, monkeypatch):
    """Builds trainers whose vLLM is the fake one."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", FakeEngine)
    return lambda trainer, **options: make(trainer, use_vllm=True, vllm_mode="colocate", **options)


def prompt_ids(batch: dict[str, Any]) -> list[list[int]]:
    pairs = zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    return [ids[mask != 0].tolist() for ids, mask in pairs]


def two_pictures(pictures: Any) -> Any:
    """Rows of two pictures side by side, one of them larger, and of one."""
    data = dataset(pictures)
    larger = data[1]["images"][0].resize((84, 112))
    rows = [data[0] | {"images": [data[0]["images"][0], larger]}, data[1]]
    return type(data).from_list([rows[0], rows[1]] * 4)


def test_vllm_completes_the_prompts_that_are_trained_on(trainer_of, pictures):
    """In TRL alone it completes others: if this fails, the installed TRL no longer has the defect."""
    data = two_pictures(pictures)
    generated = {}
    for kind in (GRPOTrainer, VGPOTrainer):
        trainer = trainer_of(kind, data=data)
        trainer.model.train()
        batch = trainer._generate_and_score_completions([data[row // 4] for row in range(8)])
        engine = trainer.vllm_generation
        assert isinstance(engine, FakeEngine)
        generated[kind] = (engine, prompt_ids(batch))
    engine, trained = generated[GRPOTrainer]
    pictures_of = [2] * 4 + [1] * 4
    for ids, completed, count in zip(trained, engine.completed, pictures_of, strict=True):
        assert completed.count(engine.pad) == 2 * ids.count(engine.pad) - count
    engine, trained = generated[VGPOTrainer]
    assert engine.completed == trained
    assert [ids.count(engine.pad) for ids in engine.sent] == pictures_of
    assert trained[0].count(engine.pad) > trained[4].count(engine.pad) + 4  # the larger one is there, too
    assert batch["token_weights"].shape == batch["completion_mask"].shape
    assert batch["importance_sampling_ratio"].isfinite().all()


def test_another_prompt_at_vllm_is_an_error(trainer_of, pictures, monkeypatch):
    monkeypatch.setattr(FakeEngine, "more", 2)
    trainer = trainer_of(VGPOTrainer)
    with pytest.raises(
        RuntimeError, match=r"prompt 0: expected vLLM to complete the (\d+) tokens .*, got \d+ tokens, "
    ):
        trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)
    assert isinstance(trainer.vllm_generation, FakeEngine)
    # Nothing is compared without a picture.
    data = dataset(pictures, without_picture=tuple(range(16)))
    trainer._generate_and_score_completions([data[0]] * 4)


def test_placeholders_are_never_sampled(trainer_of):
    given = {"seed": 3, "logit_bias": {5: 1.0}}
    trainer = trainer_of(VGPOTrainer, generation_kwargs=given)
    config = trainer.model.config
    bias = {5: 1.0, config.image_token_id: -100.0, config.video_token_id: -100.0}
    assert trainer.vllm_generation.generation_kwargs == {"seed": 3, "logit_bias": bias}
    assert given["logit_bias"] == {5: 1.0}
    assert without_placeholders(None, [7]) == {"logit_bias": {7: -100.0}}


def test_the_defects_are_looked_for_in_the_installed_trl(trainer_of, monkeypatch):
    assert vllm.expands_twice()
    assert vllm.samples_placeholders()
    source = inspect.getsource(vllm_generation)
    mended = source.replace('{"prompt_token_ids": ids}', '{"prompt_token_ids": collapse(ids)}') + "# logit_bias"
    monkeypatch.setattr(inspect, "getsource", lambda _: mended)
    assert not vllm.expands_twice()
    assert not vllm.samples_placeholders()
    trainer = trainer_of(VGPOTrainer)
    assert trainer.vllm_generation.generation_kwargs == {}
    with pytest.raises(RuntimeError, match="prompt 0"):  # sent as they are, to a vLLM that expands them again
        trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)


def llava_processor() -> LlavaProcessor:
    """A placeholder a patch, and nothing around a picture."""
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "<image>", "what", "is", "it"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 28, "width": 28}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template="{{ bos_token }} {% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}",
    )


def test_pictures_that_touch_are_one_mark_each():
    processor = llava_processor()
    picture = {"type": "image", "image": Image.new("RGB", (28, 28))}
    content = [picture, picture, {"type": "text", "text": " what is it"}]
    prompts = [[{"role": "user", "content": content}], [{"role": "user", "content": content[1:]}]]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    expanded = processor.apply_chat_template(prompts, **options)["input_ids"]
    assert expanded[0] == [1] + [2] * 8 + [3, 4, 5]
    assert unexpanded_prompts(processor, prompts) == [[1, 2, 2, 3, 4, 5], [1, 2, 3, 4, 5]]


def test_everything_else_is_the_engines_own():
    engine = FakeEngine(processing_class=llava_processor(), generation_kwargs=None)
    assert UnexpandedEngine(engine, None).sync_weights == engine.sync_weights
