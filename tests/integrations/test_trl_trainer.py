"""VGPOTrainer beside TRL's own GRPOTrainer: real training steps of a tiny model on real pictures."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", minversion="1.16")
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOTrainer
from trl_trainers import (
    LENGTH,
    assert_same,
    batch_for,
    dataset,
    dense_focus,
    heads_own_calls,
    loss_and_gradients,
    mixing_processor,
    off_policy,
    run_processes,
)

from vgpo_kernels import VGPOConfig, vgpo_weights
from vgpo_train.model import load_processor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
UNWEIGHTED = VGPOConfig.balanced(intra=False, inter=False)
ROOT = Path(__file__).parents[2]


# Each loss type and level with a KL term, one of its two kinds each; without a KL, each loss type at one level.
@pytest.mark.parametrize(
    ("loss_type", "level", "beta", "weighted_kl"),
    [
        case
        for number, loss_type in enumerate(LOSS_TYPES)
        for case in (
            (loss_type, "token", 0.04, number % 2 == 0),
            (loss_type, "sequence", 0.04, number % 2 == 1),
            (loss_type, ("token", "sequence")[number % 2], 0.0, True),
        )
    ],
)
def test_without_weights_loss_gradients_and_metrics_are_trls(make, monkeypatch, loss_type, level, beta, weighted_kl):
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "beta": beta,
        "epsilon_high": 1.3 if loss_type == "cispo" else 0.28,
        "delta": None if loss_type == "cispo" else 1.5,
        "temperature": 0.9,
        "steps_per_generation": 4,
        "use_bias_correction_kl": weighted_kl,
    }
    theirs, ours = make(GRPOTrainer, **options), make(trainer_options={"vgpo_config": UNWEIGHTED}, **options)
    # Two processes of like size: only the number counts tokens of all of them.
    monkeypatch.setattr(type(ours.accelerator), "num_processes", 2)
    for trainer in (ours, theirs):
        trainer.current_gradient_accumulation_steps = 2
    batch = batch_for(theirs)
    assert len(batch["completion_mask"].sum(1).unique()) > 3
    on_policy = {name: value for name, value in batch.items() if name != "old_per_token_logps"}
    for inputs in (on_policy, off_policy(batch)):
        expected = loss_and_gradients(theirs, inputs)
        assert_same(loss_and_gradients(ours, inputs), expected)
    if loss_type != "cispo" and level == "token":
        assert 0.1 < expected[2]["clip_ratio/region_mean"] < 0.9
    losses = []
    for trainer in (ours, theirs):  # evaluation accumulates nothing
        trainer.model.eval()
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, dict(inputs)))
    torch.testing.assert_close(*losses)
    assert losses[0] != expected[0]


@pytest.mark.parametrize("shape", ["row", "token"])
def test_the_correction_for_vllms_log_probabilities_is_trls(make, shape):
    """The factor on a token's loss, which the KL does not get; vLLM itself only generates."""
    options = {"beta": 0.04, "num_iterations": 2}
    theirs, ours = make(GRPOTrainer, **options), make(trainer_options={"vgpo_config": UNWEIGHTED}, **options)
    inputs = off_policy(batch_for(theirs))
    mask = inputs["completion_mask"]
    inputs["importance_sampling_ratio"] = 2 * torch.rand(len(mask), 1 if shape == "row" else mask.shape[1])
    inputs["importance_sampling_ratio"][1] = 0.0  # what "sequence_mask" makes of a row
    for trainer in (ours, theirs):
        trainer.use_vllm = True
        trainer.current_gradient_accumulation_steps = 1
    assert_same(loss_and_gradients(ours, inputs), loss_and_gradients(theirs, inputs))


def test_weights_come_from_the_last_states_over_whole_groups_and_enter_the_loss(make):
    trainer = make()
    trainer.current_gradient_accumulation_steps = 1
    batch = batch_for(trainer)
    cosine = dense_focus(trainer, batch)
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


def test_training_learns_logs_and_never_calls_the_head(make, monkeypatch, tmp_path):
    trainer = make(num_iterations=2, max_steps=3, beta=0.04, mask_truncated_completions=False)
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
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "trained with VGPO" in card
    assert "Cite VGPO as:" in card
    assert "arXiv:2604.09349" in card


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


def test_a_batch_without_any_picture_warns_once(make, pictures, caplog):
    """Also if its pictures are in a column that TRL does not read."""
    data = dataset(pictures).rename_column("images", "picture")
    trainer = make(data=data, num_iterations=1, steps_per_generation=2, max_steps=4)
    trainer.train()
    said = [record.message for record in caplog.records if record.name.startswith("vgpo_kernels.integrations.trl")]
    assert len(said) == 1
    assert "no row has a picture" in said[0]
    assert "'image' or 'images'" in said[0]


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
    "level": ({"importance_sampling_level": "word"}, "importance_sampling_level: expected one of"),
    "cispo": ({"loss_type": "cispo"}, r"epsilon_high: expected .*'cispo', got None, .* epsilon=0\.2: set epsilon_high"),
    "epsilon": ({"epsilon": 1.5}, r"epsilon: expected a number from 0 to 1 with loss_type 'dapo', got 1\.5"),
    "ratio": ({"loss_type": "cispo", "epsilon_high": 0.3}, "epsilon_high: with loss_type 'cispo'"),
    "delta": ({"loss_type": "cispo", "epsilon_high": 2.0, "delta": 3.0}, "delta: expected None with loss_type 'cispo'"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_options_that_would_make_another_loss_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_epsilon_alone_is_the_largest_ratio_of_cispo_where_it_can_be(make):
    trainers = [make(loss_type="cispo", steps_per_generation=4, **{name: 1.3}) for name in ("epsilon", "epsilon_high")]
    batch = off_policy(batch_for(trainers[0]))
    for trainer in trainers:
        trainer.current_gradient_accumulation_steps = 2
    assert_same(*(loss_and_gradients(trainer, batch) for trainer in trainers))


def test_a_compiled_model_trains_as_a_plain_one(make, pictures):
    torch._dynamo.reset()
    logged = []
    without_pictures = dataset(pictures).remove_columns("images")  # the vision tower takes long to compile
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = make(data=without_pictures, max_steps=1, **options)
        trainer.train()
        assert hasattr(trainer.model_wrapped, "_orig_mod") == bool(options)
        logged.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)
    assert logged[0][1] > 1.0


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


def test_what_cannot_be_recorded_is_refused_when_the_trainer_is_made_and_only_for_attention(make, checkpoint):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, attn_implementation={"text_config": "vgpo"})
    attention = {"focus_source": "attention"}
    with pytest.raises(ValueError, match=r"layers: expected indices of layers with attention, .* got 99"):
        make(model=model, trainer_options={**attention, "focus_layers": [99]})
    model.model.language_model.layers[0].self_attn.indexer = torch.nn.Identity()  # as those of layers that choose keys
    with pytest.raises(ValueError, match=r"the indexer of Qwen2_5_VLAttention chooses keys"):
        make(model=model, trainer_options=attention)
    make(model=model)  # similarity records nothing


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


@pytest.mark.usefixtures("offline")
def test_the_example_of_the_documentation_runs(checkpoint, pictures, tmp_path, monkeypatch, capsys):
    """Its code as it stands, on a checkpoint and pictures made beforehand as the page says."""
    page = (ROOT / "docs/trl.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "tiny").symlink_to(checkpoint)
    (tmp_path / "pictures").symlink_to(pictures)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/trl.md", "exec"), {"__name__": "__main__"})
    assert "vgpo/focus_mean" in capsys.readouterr().out
