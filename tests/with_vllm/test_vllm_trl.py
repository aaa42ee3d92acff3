"""VGPOTrainer and TRL's own trainer with a real vLLM in their process ("colocate"), on pictures."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed here: make vllm-test makes its environment")
from trl import GRPOTrainer
from trl_trainers import build_trainer, dataset

from vgpo_kernels.integrations.trl import VGPOTrainer

OPTIONS = {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1, "vllm_max_model_length": 256}


@pytest.fixture(scope="module")
def rows(pictures: Path) -> Any:
    """Eight rows, of two pictures side by side and of one, in turns."""
    data = dataset(pictures)
    two, one = data[0] | {"images": [data[0]["images"][0], data[1]["images"][0].resize((84, 112))]}, data[1]
    return type(data).from_list([two, one] * 4)


@pytest.fixture(scope="module")
def generated(checkpoint: Path, pictures: Path, rows: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[type, Any]:
    """Of each trainer: the batch it made, what vLLM was sent and what it completed. One vLLM serves both."""
    found: dict[type, Any] = {}
    engine = None
    for kind in (GRPOTrainer, VGPOTrainer):
        options = OPTIONS | {"use_vllm": True, "temperature": 0.8}
        folder = tmp_path_factory.mktemp("trainer")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)
            if engine is not None:
                patch.setattr("trl.generation.vllm_generation.LLM", lambda llm=engine, **_: llm)
            trainer = build_trainer(kind, checkpoint, pictures, folder, data=rows, **options)
        engine = trainer.vllm_generation.llm
        note: dict[str, Any] = {"trainer": trainer}

        def noting(prompts: Any, note: Any = note, generate: Any = engine.generate, **arguments: Any) -> Any:
            outputs = generate(prompts, **arguments)
            note["sent"] = [list(prompt["prompt_token_ids"]) for prompt in prompts]
            note["completed"] = [list(output.prompt_token_ids) for output in outputs]
            note["sampling"] = arguments["sampling_params"]
            return outputs

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "generate", noting)
            # vLLM has read the very weights, and on CPUs its layers do not take others afterwards.
            patch.setattr(trainer.vllm_generation, "sync_weights", lambda: None)
            trainer.model.train()
            note["batch"] = trainer._generate_and_score_completions([rows[row // 4] for row in range(8)])
        found[kind] = note
    return found


def trained(note: dict[str, Any]) -> list[list[int]]:
    batch = note["batch"]
    return [ids[mask != 0].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]


def test_trl_alone_trains_on_other_prompts_than_vllm_completes(generated):
    """The defect that VGPOTrainer works around; once this fails, the installed TRL no longer has it."""
    note = generated[GRPOTrainer]
    pad = note["trainer"].model.config.image_token_id
    for ours, theirs, pictures in zip(trained(note), note["completed"], [2] * 4 + [1] * 4, strict=True):
        assert theirs.count(pad) == 2 * ours.count(pad) - pictures
    assert note["batch"]["importance_sampling_ratio"].max() < 0.01  # so that nothing is learnt


def test_vgpo_trains_on_the_prompts_that_vllm_completes(generated):
    note = generated[VGPOTrainer]
    pad = note["trainer"].model.config.image_token_id
    assert note["completed"] == trained(note)
    assert [ids.count(pad) for ids in note["sent"]] == [2] * 4 + [1] * 4
    ratio = note["batch"]["importance_sampling_ratio"]
    assert 0.8 < ratio.min() <= ratio.max() < 1.25  # the same prompts, read by two implementations
    assert note["batch"]["token_weights"].std() > 0.01
    config = note["trainer"].model.config
    assert note["sampling"].logit_bias == {config.image_token_id: -100.0, config.video_token_id: -100.0}
    note["trainer"].current_gradient_accumulation_steps = 1
    assert note["trainer"].compute_loss(note["trainer"].model, note["batch"]).isfinite()


def test_placeholders_are_banned_even_if_the_model_prefers_them(generated):
    """Their bias outweighs any logit: with it the other way round, nothing else is sampled."""
    from vllm import SamplingParams

    trainer = generated[VGPOTrainer]["trainer"]
    pad = trainer.model.config.image_token_id
    prompt = {"prompt_token_ids": generated[VGPOTrainer]["completed"][0][-5:]}
    for bias, expected in ((100.0, {pad}), (-100.0, set())):
        options = SamplingParams(max_tokens=8, logit_bias={pad: bias}, ignore_eos=True)
        (output,) = trainer.vllm_generation.llm.generate([prompt], sampling_params=options, use_tqdm=False)
        assert set(output.outputs[0].token_ids) & {pad} == expected
