"""VGPOTrainer beside TRL's own GRPOTrainer: real training steps of a tiny model on real pictures."""

import itertools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("trl", minversion="1.16")
from datasets import Dataset
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from vgpo_kernels import VGPOConfig, vgpo_weights
from vgpo_kernels.integrations.trl import VGPOTrainer
from vgpo_train.make_pictures import make_pictures
from vgpo_train.model import load_processor
from vgpo_train.tiny_model import build_tiny_model

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
LENGTH = 9  # of a completion: odd, so that no tile and no row length fits by chance
UNWEIGHTED = VGPOConfig.balanced(intra=False, inter=False)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), train=16, test=4, seed=0)


@pytest.fixture(scope="module")
def checkpoint(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen2.5-VL whose words are still nearly random."""
    return build_tiny_model(tmp_path_factory.mktemp("checkpoint"), pictures=pictures, warm_start_steps=6)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL counts the trainers that are made; tests send nothing."""
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)


def dataset(pictures: Path, *, without_picture: tuple[int, ...] = (), split: str = "train") -> Any:
    rows = [json.loads(line) for line in (pictures / f"{split}.jsonl").read_text().splitlines()]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["problem"]}],
                "images": [
                    Image.open(pictures / path).copy() for path in row["images"] if number not in without_picture
                ],
                "answer": row["answer"],
            }
            for number, row in enumerate(rows)
        ]
    )


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    """Differs within every group: completions of a random model are not alike."""
    return [float(len(completion[0]["content"])) for completion in completions]


@pytest.fixture
def make(checkpoint: Path, pictures: Path, tmp_path: Path):
    """Builds a trainer, by default one that generates for two prompts of four completions a step."""

    def build(
        trainer: type = VGPOTrainer,
        *,
        model: Any = None,
        data: Any = None,
        processor: Any = None,
        trainer_options: Any = None,
        **options: Any,
    ) -> Any:
        settings = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_completion_length": LENGTH,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "shuffle_dataset": False,
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            **options,
        }
        return trainer(
            str(checkpoint) if model is None else model,
            length_reward,
            args=GRPOConfig(**settings),
            train_dataset=dataset(pictures) if data is None else data,
            processing_class=load_processor(checkpoint) if processor is None else processor,
            **(trainer_options or {}),
        )

    return build


def batch_for(trainer: Any, *, ragged: bool = True) -> dict[str, Any]:
    """A generated batch of two groups of four, with ragged completions where TRL's own would all be as long."""
    trainer.model.train()
    rows = [row for row in (trainer.train_dataset[0], trainer.train_dataset[1]) for _ in range(4)]
    if ragged:
        generate = trainer._generate_single_turn

        def shorter(*arguments: Any) -> Any:
            completions, logps = generate(*arguments)
            lengths = [LENGTH, 4, 1, 7, 5, LENGTH, 2, 8]
            return [ids[:length] for ids, length in zip(completions, lengths, strict=True)], logps

        trainer._generate_single_turn = shorter
    try:
        return trainer._generate_and_score_completions(rows)
    finally:
        if ragged:
            del trainer._generate_single_turn


def loss_and_gradients(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """The loss of a batch, its gradients, and what was logged of it."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.grad is not None}
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), gradients, logged


def assert_same(ours: Any, theirs: Any) -> None:
    """Losses to the rounding of float32, gradients to 1e-5 of their norm, and every metric of TRL."""
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    assert ours[2].keys() == theirs[2].keys()
    for name, value in theirs[2].items():
        assert ours[2][name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name


def off_policy(batch: dict[str, Any], beta: float) -> dict[str, Any]:
    """The batch as if it had been sampled by another policy: ratios around 1, some of them beyond the clips."""
    generator = torch.Generator().manual_seed(1)
    logps = -6.0 + 0.0 * batch["completion_mask"]  # near those of a random model, log(1 / vocabulary)
    inputs = batch | {"old_per_token_logps": logps + 0.7 * torch.randn(logps.shape, generator=generator)}
    if beta:
        inputs["ref_per_token_logps"] = logps + 0.7 * torch.randn(logps.shape, generator=generator)
    return inputs


@pytest.mark.parametrize(
    ("loss_type", "level", "beta"), list(itertools.product(LOSS_TYPES, ("token", "sequence"), (0.0, 0.04)))
)
def test_without_weights_loss_gradients_and_metrics_are_trls(make, monkeypatch, loss_type, level, beta):
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": beta,
        "epsilon_high": 1.3 if loss_type == "cispo" else 0.28,
        "delta": None if loss_type == "cispo" else 1.5,
        "temperature": 0.9,
        "steps_per_generation": 4,
        "use_bias_correction_kl": False,
    }
    theirs = make(GRPOTrainer, **options)
    ours = make(trainer_options={"vgpo_config": UNWEIGHTED}, **options)
    # Two processes of like size: only the number counts tokens of all of them.
    monkeypatch.setattr(type(ours.accelerator), "num_processes", 2)
    for trainer in (ours, theirs):
        trainer.current_gradient_accumulation_steps = 2
    batch = batch_for(theirs)
    assert len({int(length) for length in batch["completion_mask"].sum(1)}) > 3
    for inputs in (batch, off_policy(batch, beta)):
        assert_same(loss_and_gradients(ours, inputs), loss_and_gradients(theirs, inputs))


@pytest.mark.parametrize("shape", ["row", "token"])
def test_the_correction_for_vllms_log_probabilities_is_trls(make, shape):
    """The factor on a token's loss, which the KL does not get; vLLM itself only generates."""
    options = {"beta": 0.04, "use_bias_correction_kl": False}
    theirs, ours = make(GRPOTrainer, **options), make(trainer_options={"vgpo_config": UNWEIGHTED}, **options)
    inputs = off_policy(batch_for(theirs), 0.04)
    mask = inputs["completion_mask"]
    inputs["importance_sampling_ratio"] = 2 * torch.rand(len(mask), 1 if shape == "row" else mask.shape[1])
    inputs["importance_sampling_ratio"][1] = 0.0  # what "sequence_mask" makes of a row
    for trainer in (ours, theirs):
        trainer.use_vllm = True
        trainer.current_gradient_accumulation_steps = 1
    assert_same(loss_and_gradients(ours, inputs), loss_and_gradients(theirs, inputs))


@torch.no_grad()
def dense_forward(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and last states at the completion's tokens, and the states' cosine to the mean visual state."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    output = trainer.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        output_hidden_states=True,
        **{name: batch[name] for name in names if name in batch},
    )
    states, start = output.hidden_states[-1], batch["prompt_ids"].shape[1]
    visual = (input_ids == trainer.model.config.image_token_id)[..., None]
    prototype = (states * visual).sum(1, keepdim=True) / visual.sum(1, keepdim=True).clamp(min=1)
    cosine = torch.cosine_similarity(states, prototype, dim=-1)[:, start:]
    return output.logits[:, start - 1 : -1], states[:, start:], cosine


def test_weights_come_from_the_last_states_over_whole_groups_and_enter_the_loss(make):
    trainer = make()
    trainer.current_gradient_accumulation_steps = 1
    batch = batch_for(trainer)
    logits, _, cosine = dense_forward(trainer, batch)
    mask = batch["completion_mask"]
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    expected = vgpo_weights(cosine, mask, groups, VGPOConfig.balanced())
    torch.testing.assert_close(batch["token_weights"], expected.token_weights, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch["trajectory_weights"], expected.trajectory_weights, rtol=1e-4, atol=1e-4)
    assert batch["token_weights"][mask != 0].std() > 0.05
    assert batch["trajectory_weights"].std() > 0.05

    # The loss of "dapo" on-policy is -sum of weighted advantages / tokens; its gradient tells the weights, too.
    loss, gradients, _ = loss_and_gradients(trainer, batch)
    weighted = batch["advantages"][:, None] * batch["token_weights"] * batch["trajectory_weights"][:, None] * mask
    torch.testing.assert_close(loss, -weighted.sum() / mask.sum() * 2)  # a generation serves two optimizer steps
    plain, _, _ = loss_and_gradients(trainer, {**batch, "token_weights": None, "trajectory_weights": None})
    assert (plain - loss).abs() > 1e-3

    theirs = make(GRPOTrainer)
    theirs.current_gradient_accumulation_steps = 1
    # TRL takes advantages by token: the same weights, brought to its own loss.
    by_hand = loss_and_gradients(theirs, batch | {"advantages": weighted})
    torch.testing.assert_close(loss, by_hand[0])
    for name, gradient in by_hand[1].items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    assert logits.shape[:2] == mask.shape


def heads_own_calls(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every call of the head's own forward, and whether it served generation."""
    head, calls, generating = trainer.model.get_output_embeddings(), [], []
    forward, generate = torch.nn.Linear.forward, trainer.model.generate

    def noting(self: Any, states: Tensor) -> Tensor:
        if self is head:
            calls.append("generation" if generating else "training")
        return forward(self, states)

    def noted(*arguments: Any, **options: Any) -> Any:
        generating.append(True)
        try:
            return generate(*arguments, **options)
        finally:
            generating.pop()

    monkeypatch.setattr(torch.nn.Linear, "forward", noting)
    monkeypatch.setattr(trainer.model, "generate", noted)
    return calls


def test_training_learns_logs_and_never_calls_the_head(make, monkeypatch):
    trainer = make(
        num_iterations=2, max_steps=3, beta=0.04, use_bias_correction_kl=False, mask_truncated_completions=False
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    calls = heads_own_calls(trainer, monkeypatch)
    trainer.train()
    assert set(calls) == {"generation"}
    assert all(not torch.equal(before[name], value) for name, value in trainer.model.named_parameters())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    assert {"entropy", "kl", "clip_ratio/region_mean", "reward", "vgpo/focus_mean"} <= logged[0].keys()
    assert logged[0]["vgpo/token_weight_std"] > 0.05
    assert logged[0]["vgpo/trajectory_weight_std"] > 0.05
    assert logged[0]["vgpo/token_weight_mean"] == pytest.approx(1.0, abs=1e-5)
    assert logged[0]["vgpo/visual_rows"] == 1.0
    assert logged[0]["kl"] == pytest.approx(0.0, abs=1e-6)  # the reference is the start
    assert logged[1]["kl"] > 1e-6


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_one_forward_scores_a_batch(make, num_iterations):
    """Old log-probabilities and focus come from the same forward, with and without use for the former."""
    trainer = make(num_iterations=num_iterations)
    rows: list[int] = []

    def note(_module: Any, options: dict[str, Any]) -> None:
        if not options["use_cache"]:  # generation uses one
            rows.append(len(options["attention_mask"]))

    decoder = trainer.model.get_decoder()
    decoder.register_forward_pre_hook(lambda module, _, options: note(module, options), with_kwargs=True)
    batch = batch_for(trainer)
    assert rows == [4, 4]
    assert ("old_per_token_logps" in batch) == (num_iterations == 2)
    assert batch["token_weights"].std() > 0.05


def mixing_processor(checkpoint: Path) -> Any:
    """Takes what TRL 1.16 makes of a batch in which some rows have no picture: None instead of an empty list."""
    processor = load_processor(checkpoint)

    class Mixing(type(processor)):
        def __call__(self, images: Any = None, **options: Any) -> Any:
            return super().__call__(images=[own or [] for own in images] if images else None, **options)

    processor.__class__ = Mixing
    return processor


def test_rows_without_a_picture_keep_their_advantages(make, checkpoint, pictures):
    data = dataset(pictures, without_picture=(1,))
    # One forward for all rows: transformers' vision tower takes no batch without any picture.
    trainer = make(data=data, processor=mixing_processor(checkpoint), per_device_train_batch_size=8)
    trainer.current_gradient_accumulation_steps = 1
    batch = batch_for(trainer)
    assert torch.equal(batch["token_weights"][4:], torch.ones(4, LENGTH))
    assert torch.equal(batch["trajectory_weights"][4:], torch.ones(4))
    assert batch["token_weights"][:4].std() > 0.05
    assert trainer._metrics["train"]["vgpo/visual_rows"] == [0.5]
    only_text = make(data=dataset(pictures, without_picture=tuple(range(16))), max_steps=1)
    only_text.train()
    logged = only_text.state.log_history[0]
    assert logged["vgpo/visual_rows"] == 0.0
    assert logged["vgpo/focus_mean"] is None


def test_attention_as_the_source_is_the_mass_that_eager_attention_shows(make):
    options = {"model_init_kwargs": {"attn_implementation": {"text_config": "vgpo"}}}
    trainer = make(trainer_options={"focus_source": "attention", "focus_layers": "all"}, **options)
    batch = batch_for(trainer)
    trainer.model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        output = trainer.model(
            input_ids=(ids := torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)),
            attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            output_attentions=True,
            **{name: batch[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids")},
        )
    visual = (ids == trainer.model.config.image_token_id).float()
    maps = torch.stack(output.attentions).mean((0, 2))  # (B, L, L), over layers and heads
    mass = (maps @ visual[..., None]).squeeze(-1)[:, batch["prompt_ids"].shape[1] :]
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    expected = vgpo_weights(mass, batch["completion_mask"], groups, VGPOConfig.balanced(), source="attention")
    torch.testing.assert_close(batch["token_weights"], expected.token_weights, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch["trajectory_weights"], expected.trajectory_weights, rtol=1e-3, atol=1e-3)
    assert batch["token_weights"].std() > 0.05


def test_evaluation_weighs_by_its_own_group_size(make, pictures):
    trainer = make(
        num_generations_eval=2,
        trainer_options={"eval_dataset": dataset(pictures, split="test"), "vgpo_config": VGPOConfig.paper()},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_vgpo/token_weight_std"] > 0.05
    # Two rows a group: the min-max over a group makes them 0 and 1, and its mean is one half.
    assert metrics["eval_vgpo/trajectory_weight_std"] == pytest.approx(0.5, abs=1e-5)


def test_warm_up_counts_optimizer_steps(make):
    trainer = make(trainer_options={"vgpo_config": VGPOConfig.balanced(warmup_steps=2)}, max_steps=3)
    trainer.train()
    spreads = [entry["vgpo/token_weight_std"] for entry in trainer.state.log_history if "loss" in entry]
    assert spreads[0] == 0.0
    assert spreads[1] == pytest.approx(spreads[2] / 2, rel=0.5)


REFUSED = {
    "loss_type": ({"loss_type": "sapo"}, "loss_type: expected one of 'grpo', .*, got 'sapo': policy_loss has no other"),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel: expected False, got True: .*drop token weights"),
    "head": ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32: expected False, got True"),
    "entropy mask": ({"top_entropy_quantile": 0.2}, r"top_entropy_quantile: expected 1\.0, got 0\.2: it drops tokens"),
    "entropy bonus": ({"entropy_coef": 0.01}, r"entropy_coef: expected 0\.0, got 0\.01: an entropy bonus"),
    "adaptive entropy": ({"use_adaptive_entropy": True}, "use_adaptive_entropy: expected False, got True"),
    "off-policy mask": ({"off_policy_mask_threshold": 0.5}, r"off_policy_mask_threshold: expected None, got 0\.5"),
    "compile": ({"torch_compile": True}, "torch_compile: expected False, got True"),
    "KL": ({"beta": 0.04}, r"use_bias_correction_kl: expected False with beta=0\.04, got True"),
    "level": ({"importance_sampling_level": "word"}, "importance_sampling_level: expected one of"),
    "cispo": ({"loss_type": "cispo"}, "epsilon_high: with loss_type 'cispo'"),
    "delta": ({"loss_type": "cispo", "epsilon_high": 2.0, "delta": 3.0}, "delta: expected None with loss_type 'cispo'"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_options_that_would_make_another_loss_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def nothing(*_: Any, **__: Any) -> None:
    """Stands for a tool, an environment or a rollout."""


ARGUMENTS = {
    "tools": ({"tools": [nothing]}, ValueError, "tools: expected None, got .*did not generate"),
    "environment": ({"environment_factory": nothing}, ValueError, "environment_factory: expected None, got "),
    "rollout": ({"rollout_func": nothing}, ValueError, "rollout_func: expected None, got "),
    "config": ({"vgpo_config": "balanced"}, TypeError, "vgpo_config: expected a VGPOConfig or None, got str"),
    "source": ({"focus_source": "gaze"}, ValueError, "focus_source: expected one of 'similarity', 'attention'"),
    "sdpa": ({"focus_source": "attention"}, ValueError, "focus_source: expected 'similarity' for .*not to 'sdpa'"),
    "prompt learning": (
        {"peft_config": SimpleNamespace(is_prompt_learning=True)},
        ValueError,
        "peft_config: expected adapters inside the layers, got SimpleNamespace",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_arguments_are_checked_when_the_trainer_is_made(make, options, error, message):
    with pytest.raises(error, match=message):
        make(trainer_options=options)


def test_a_mixture_of_experts_is_refused_with_its_auxiliary_loss(make, checkpoint):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint)
    model.config.text_config.output_router_logits = False  # what says so, with TRL
    model.config.text_config.router_aux_loss_coef = 0.01
    with pytest.raises(ValueError, match=r"router_aux_loss_coef: expected 0\.0, got 0\.01"):
        make(model=model)


def test_a_model_without_pictures_is_refused(make, checkpoint):
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=11, num_key_value_heads=2, **size))
    with pytest.raises(ValueError, match="Qwen2ForCausalLM: expected a configuration that names the image token"):
        make(model=model, processor=load_processor(checkpoint).tokenizer)


def test_groups_span_processes(checkpoint, pictures, tmp_path):
    """Two processes of six rows, three groups of four: the middle group has rows of both, of other lengths."""
    results = run_processes(checkpoint, pictures, tmp_path)
    assert results[0]["mask"].shape[1] != results[1]["mask"].shape[1]
    longest = max(result["mask"].shape[1] for result in results)

    def whole(name: str) -> Tensor:
        parts = [result[name] for result in results]
        return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])

    mask, groups = whole("mask"), torch.arange(12) // 4
    expected = vgpo_weights(whole("focus"), mask, groups, VGPOConfig.balanced())
    torch.testing.assert_close(whole("token_weights")[mask != 0], expected.token_weights[mask != 0])
    torch.testing.assert_close(torch.cat([r["trajectory_weights"] for r in results]), expected.trajectory_weights)
    apart = vgpo_weights(whole("focus"), mask, torch.arange(12) // 2, VGPOConfig.balanced())
    assert (apart.trajectory_weights - expected.trajectory_weights).abs().max() > 0.05
    assert results[0]["logged"] == results[1]["logged"]
    for name, value in results[0]["parameters"].items():
        assert torch.equal(value, results[1]["parameters"][name]), name
        assert not torch.equal(value, results[0]["before"][name]), name


def run_processes(checkpoint: Path, pictures: Path, folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = Path(__file__).with_name("trl_worker.py")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_DISABLE_TELEMETRY": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(checkpoint), str(pictures), str(folder)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_the_example_of_the_documentation_runs(checkpoint, pictures, tmp_path, monkeypatch, capsys):
    """Its code as it stands, on a checkpoint and pictures made beforehand as the page says."""
    page = (ROOT / "docs/trl.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "tiny").symlink_to(checkpoint)
    (tmp_path / "pictures").symlink_to(pictures)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/trl.md", "exec"), {"__name__": "__main__"})
    assert "vgpo/focus_mean" in capsys.readouterr().out
