"""Rollouts on a real tiny checkpoint: what is never sampled, where completions end, whose settings count."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from train_tools import PlainEngine, collator, mixed_samples
from transformers import GenerationConfig

from vgpo_train.config import ConfigError, RolloutConfig
from vgpo_train.model import load_model, load_processor, visual_token_ids
from vgpo_train.rl.rollout import Completions, TransformersEngine, build_rollout_engine, completion_mask, register


def _engine(model, *, suppressed: list[int] | None = None, ends: list[int] | None = None, **settings):
    text = model.config.text_config
    config = RolloutConfig(max_new_tokens=6, gather="never", **settings)
    return TransformersEngine(
        config, PlainEngine(model), suppressed or [], text.pad_token_id, ends or [text.eos_token_id]
    )


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint: Path, pictures: Path) -> dict[str, torch.Tensor]:
    return collator(tiny_checkpoint)(mixed_samples(pictures, "pptp")).tensors()


@pytest.fixture
def biased(tiny_checkpoint: Path):
    """The tiny model with a head that likes the tokens of pictures and videos above all."""
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=True)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[visual_token_ids(model.config, None)] = 60.0
    model.lm_head = head
    return model


@pytest.mark.usefixtures("lone_process")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_of_pictures_are_never_sampled(biased, tiny_checkpoint, inputs, temperature: float) -> None:
    visual = torch.tensor(visual_token_ids(biased.config, load_processor(tiny_checkpoint)))
    free = _engine(biased).generate(inputs, temperature=temperature)
    assert torch.isin(free.ids, visual).all(), "without suppression this head samples nothing else"
    suppressed = _engine(biased, suppressed=visual.tolist()).generate(inputs, temperature=temperature)
    assert not torch.isin(suppressed.ids, visual).any()
    assert {biased.config.image_token_id, biased.config.video_token_id} <= set(visual.tolist())


@pytest.mark.usefixtures("lone_process")
def test_a_checkpoints_own_sampling_settings_would_leak_into_an_explicit_configuration(
    tiny_checkpoint: Path, inputs
) -> None:
    # Why the engine's builder replaces them; that it does is tested on two processes.
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    model.generation_config = GenerationConfig(repetition_penalty=30.0)
    leaky = _engine(model).generate(inputs, temperature=0.0)
    model.generation_config = GenerationConfig()
    clean = _engine(model).generate(inputs, temperature=0.0)
    assert not torch.equal(leaky.ids, clean.ids)


@pytest.mark.usefixtures("lone_process")
def test_sampling_follows_the_rollouts_settings_and_the_seed(tiny_checkpoint: Path, inputs) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.float32)

    def sample(seed: int, temperature: float, **settings) -> torch.Tensor:
        torch.manual_seed(seed)
        return (
            _engine(model, ends=[model.config.text_config.vocab_size], **settings)
            .generate(inputs, temperature=temperature)
            .ids
        )

    greedy = sample(0, 0.0)
    assert torch.equal(greedy, sample(1, 0.0))
    assert torch.equal(sample(0, 1.0), sample(0, 1.0))
    assert not torch.equal(sample(0, 1.0), sample(1, 1.0))
    assert torch.equal(sample(0, 1.0, top_k=1), greedy)
    assert torch.equal(sample(0, 1.0, top_p=1e-6), greedy)
    assert torch.equal(sample(0, 1e-4), greedy)


@pytest.mark.usefixtures("lone_process")
def test_a_session_samples_in_eval_mode_and_goes_back_to_training(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    model.train()
    with _engine(model).session():
        assert not model.training
    assert model.training


def test_the_mask_ends_with_the_first_end_even_where_padding_is_an_end() -> None:
    ids = torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8], [2, 5, 6, 2], [5, 6, 3, 2]])
    mask = completion_mask(ids, [2, 3])
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]


def test_an_engine_is_found_by_its_registered_name() -> None:
    @register("echo")
    class Echo:
        def __init__(self, config, engine, suppressed, pad_token_id, eos_token_ids) -> None:  # noqa: ARG002
            self.suppressed = suppressed

        def generate(self, prompts, *, temperature: float) -> Completions:  # noqa: ARG002
            return Completions(prompts["input_ids"], prompts["input_ids"] > 0)

    def build(name: str):
        return build_rollout_engine(RolloutConfig(engine=name), None, suppressed=[7], pad_token_id=0, eos_token_ids=[1])

    assert build("echo").suppressed == [7]
    with pytest.raises(ConfigError, match=r"rollout.engine: expected one of .*'transformers', got 'transformer'; did "):
        build("transformer")


def test_completions_end_where_the_checkpoints_generation_settings_say(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from vgpo_train.model import end_tokens

    tokenizer = load_processor(tiny_checkpoint).tokenizer
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    assert end_tokens(str(folder), tokenizer) == [end]
    GenerationConfig(eos_token_id=[end, pad]).save_pretrained(folder)
    assert end_tokens(str(folder), tokenizer) == [end, pad]
    (folder / "generation_config.json").unlink()
    assert end_tokens(str(folder), tokenizer) == [end]
    tokenizer.eos_token = None
    assert end_tokens(str(folder), tokenizer) == [end], "config.json names it, too"
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"]):
        part.pop("eos_token_id", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r".* names no end-of-sequence token"):
        end_tokens(str(folder), tokenizer)
