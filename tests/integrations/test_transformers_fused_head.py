"""Log-probabilities and loss from a model whose head is replaced, against the dense logits of the same model."""

import copy
from typing import Any

import pytest
import tiny_vlms
import torch
from head_cases import (
    CONFIG,
    LENGTH,
    LENGTHS,
    MODELS,
    PROMPT,
    READ_AGAIN,
    SMALL,
    TEMPERATURE,
    VOCABULARY,
    Adapted,
    Case,
    NoLogits,
    Wrapper,
    assert_all_equal,
    forbidden_head,
    gradients_of,
    make_text,
)
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from vgpo_kernels import PolicyLossConfig
from vgpo_kernels.integrations.transformers import (
    fused_logprobs,
    head_patch,
    model_logprobs,
    record_visual_attention,
)
from vgpo_kernels.testing import assert_error_budget


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(name)
    exact, dense = (case.dense(dtype, CONFIG) for dtype in (torch.float64, torch.float32))
    with forbidden_head(case.model, monkeypatch), NoLogits():
        found = case.fused(CONFIG)
    assert found.keys() == exact.keys()
    assert any("vision" in key or "visual" in key for key in found) == ("pixel_values" in case.batch)
    assert_all_equal(found, dense, exact)


@pytest.mark.parametrize("name", [SMALL, "final_soft_cap", "granite", "cohere", *READ_AGAIN])
def test_log_probabilities_are_those_of_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(name)
    given = {"prompt_length": case.prompt, "temperature": TEMPERATURE, "entropy": True}
    with forbidden_head(case.model, monkeypatch), NoLogits():
        found = model_logprobs(case.model, case.batch, completion_mask=case.mask, **given)
        by_attention_mask = model_logprobs(case.model, case.batch, **given)
    assert torch.equal(found.logps, by_attention_mask.logps)
    exact, dense = (case.dense(dtype, CONFIG) for dtype in (torch.float64, torch.float32))
    assert_error_budget("logps", found.logps, dense["logps"], exact["logps"])
    assert_error_budget("entropy", found.entropy, dense["entropy"], exact["entropy"])
    assert found.hidden_states is None
    assert found.logps.requires_grad


@pytest.mark.parametrize("name", READ_AGAIN)
def test_the_transform_of_logits_is_read_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first forward, which is run again; later ones, inside this `with` or another, are not."""
    reads: list[int] = []
    forwards: list[int] = []
    real = head_patch.HeadPatch._read
    monkeypatch.setattr(head_patch.HeadPatch, "_read", lambda self, logits: reads.append(1) or real(self, logits))
    case = Case(name)
    case.model.register_forward_hook(lambda *_: forwards.append(1))
    with fused_logprobs(case.model) as fused:
        first = fused.logprobs(case.batch, prompt_length=case.prompt).logps
        assert (len(reads), len(forwards)) == (1, 2)
        second = fused.logprobs(case.batch, prompt_length=case.prompt).logps
    assert torch.equal(first, second)
    model_logprobs(case.model, case.batch, prompt_length=case.prompt)
    assert (len(reads), len(forwards)) == (1, 4)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "cispo"])
def test_every_loss(loss_type: str, level: str) -> None:
    high = 5.0 if loss_type == "cispo" else 0.2
    config = PolicyLossConfig(loss_type=loss_type, importance_sampling_level=level, epsilon_high=high)
    case = Case("granite")
    exact, dense = (case.dense(dtype, config) for dtype in (torch.float64, torch.float32))
    assert_all_equal(case.fused(config), dense, exact)


def test_through_the_kernels(device: str) -> None:
    case = Case("granite").to(device)
    exact, dense = (case.dense(dtype, CONFIG) for dtype in (torch.float64, torch.float32))
    assert_all_equal(case.fused(CONFIG, impl="triton"), dense, exact)


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_through_log_probabilities_and_entropy(tied: bool) -> None:
    make = make_text(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=tied)
    case = Case("llama", make())

    def gradients(model: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
        if dtype is None:
            given = {"prompt_length": case.prompt, "completion_mask": case.mask, "entropy": True}
            found = model_logprobs(model, case.batch, **given)
            logps, entropy = found.logps, found.entropy
        else:
            model = copy.deepcopy(model).to(dtype)
            log_p = model(**case.batch).logits[:, case.prompt - 1 : -1].log_softmax(-1)
            logps = log_p.gather(-1, case.targets[..., None])[..., 0]
            entropy = -(log_p.exp() * log_p).sum(-1)
        weights = case.noise * case.mask
        ((weights * logps).sum() + 0.3 * (weights * entropy).sum()).backward()
        return gradients_of(model)

    exact, dense, found = (gradients(case.model, dtype) for dtype in (torch.float64, torch.float32, None))
    assert found.keys() == exact.keys()
    assert ("gradient of lm_head.weight" in found) != tied
    assert_all_equal(found, dense, exact)


def test_a_frozen_head_gets_no_gradient() -> None:
    case = Case("qwen2_vl")
    case.model.lm_head.requires_grad_(False)
    exact, dense = (case.dense(dtype, CONFIG) for dtype in (torch.float64, torch.float32))
    found = case.fused(CONFIG)
    assert "gradient of lm_head.weight" not in found
    assert_all_equal(found, dense, exact)


def test_a_head_with_a_bias() -> None:
    case = Case(SMALL)
    case.model.lm_head = nn.Linear(32, VOCABULARY)
    exact, dense = (case.dense(dtype, CONFIG) for dtype in (torch.float64, torch.float32))
    found = case.fused(CONFIG)
    assert "gradient of lm_head.bias" in found
    assert_all_equal(found, dense, exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_recording_beside_it(reentrant: bool) -> None:
    case = Case("qwen2_5_vl")
    case.model.set_attn_implementation({"text_config": "vgpo"})
    plain = case.fused(CONFIG)
    case.model.train()
    case.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        case.model.enable_input_require_grads()
    with record_visual_attention(case.model, prompt_length=case.prompt) as record:
        found = case.fused(CONFIG)
    assert record.mass.shape == (1, 3, LENGTH, 1)
    for key, value in found.items():
        torch.testing.assert_close(value, plain[key], atol=1e-6, rtol=1e-4)


def test_under_autocast() -> None:
    case = Case(SMALL)
    exact = case.dense(torch.float64, CONFIG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense, found = case.dense(torch.float32, CONFIG), case.fused(CONFIG)
    for key in exact:
        # bf16 products round at other places; the log-probabilities themselves are not rounded to bf16.
        assert (found[key] - exact[key]).norm() <= 2.0 * (dense[key] - exact[key]).norm() + 1e-6, key
    assert found["logps"].dtype == torch.float32


def test_left_padding_moves_nothing() -> None:
    case = Case(SMALL)
    together = model_logprobs(case.model, case.batch, prompt_length=case.prompt)
    pictures = {0: [0, 1], 2: [2]}
    for row, length in enumerate(LENGTHS):
        padding = int((case.batch["attention_mask"][row, : case.prompt] == 0).sum())
        kept = slice(padding, case.prompt + length)
        alone = {name: case.batch[name][[row], kept] for name in ("input_ids", "attention_mask")}
        if row in pictures:
            alone["pixel_values"] = case.batch["pixel_values"][pictures[row]]
        logps = model_logprobs(case.model, alone, prompt_length=case.prompt - padding).logps
        torch.testing.assert_close(together.logps[[row], :length], logps, atol=2e-5, rtol=0)
        assert not together.logps[row, length:].any()


def test_hidden_states_are_those_after_the_final_norm() -> None:
    case = Case(SMALL)
    expected = case.model(**case.batch, output_hidden_states=True).hidden_states[-1]
    with fused_logprobs(case.model) as fused:
        found = fused.logprobs(case.batch, prompt_length=case.prompt, hidden_states=True)
        torch.testing.assert_close(found.hidden_states, expected)
        given = {"prompt_length": case.prompt, "hidden_states": True}
        fused.policy_loss(case.batch, None, case.advantages, case.mask, **given)
        torch.testing.assert_close(fused.hidden_states, expected)
        fused.logprobs(case.batch, prompt_length=case.prompt)
        assert fused.hidden_states is None


def test_without_gradient_there_is_no_graph() -> None:
    case = Case(SMALL)
    with torch.no_grad(), fused_logprobs(case.model) as fused:
        assert not fused.logprobs(case.batch, prompt_length=case.prompt).logps.requires_grad
        given = {"prompt_length": case.prompt}
        assert not fused.policy_loss(case.batch, None, case.advantages, case.mask, **given).loss.requires_grad


def test_masked_targets_may_hold_anything() -> None:
    case = Case("granite")
    plain = model_logprobs(case.model, case.batch, prompt_length=case.prompt)
    other = case.batch["input_ids"].clone()
    other[:, case.prompt :][~case.mask] = 7
    changed = model_logprobs(case.model, case.batch | {"input_ids": other}, prompt_length=case.prompt)
    assert torch.equal(plain.logps, changed.logps)


def test_a_batch_whose_tokens_are_all_masked_runs_backward() -> None:
    case = Case(SMALL)
    with fused_logprobs(case.model) as fused:
        out = fused.policy_loss(
            case.batch, case.old(), case.advantages, torch.zeros_like(case.mask), prompt_length=case.prompt
        )
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0
    gradients = gradients_of(case.model)
    assert any("vision" in name for name in gradients), "the vision tower runs backward, too"
    assert not any(gradient.any() for gradient in gradients.values())


def test_adapters_on_other_layers_in_a_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(SMALL)
    case.model.requires_grad_(False)
    for layer in case.model.model.language_model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
    exact, dense = (case.dense(dtype, CONFIG) for dtype in (torch.float64, torch.float32))
    with forbidden_head(case.model, monkeypatch):
        found = case.fused(CONFIG, Wrapper(case.model))
    found = {key.replace("gradient of module.", "gradient of "): value for key, value in found.items()}
    assert_all_equal(found, dense, exact)


def test_outputs_that_are_tuples() -> None:
    case = Case("llama", make_text(LlamaForCausalLM, LlamaConfig)())
    expected = model_logprobs(case.model, case.batch, prompt_length=case.prompt).logps
    batch = case.batch | {"return_dict": False}
    found = model_logprobs(case.model, batch, prompt_length=case.prompt, hidden_states=True)
    assert torch.equal(found.logps, expected)
    assert found.hidden_states.shape == (3, PROMPT + LENGTH, 32)


def test_a_model_without_logits_to_keep_gives_its_head_every_state() -> None:
    class Whole(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = True) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    case = Case("llama", make_text(Whole, LlamaConfig)())
    exact, dense = (case.dense(dtype, CONFIG) for dtype in (torch.float64, torch.float32))
    assert_all_equal(case.fused(CONFIG), dense, exact)


def test_gpt2_with_tied_embeddings() -> None:
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32}
    case = Case("gpt2", tiny_vlms.with_large_weights(GPT2LMHeadModel(GPT2Config(**size))))
    exact, dense = (case.dense(dtype, CONFIG) for dtype in (torch.float64, torch.float32))
    assert_all_equal(case.fused(CONFIG), dense, exact)
