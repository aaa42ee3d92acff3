"""What the replaced head leaves behind, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_vlms
import torch
from head_cases import PROMPT, SMALL, Adapted, Case, make_text
from torch import Tensor, nn
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from vgpo_kernels.integrations.transformers import fused_logprobs, model_logprobs


def test_the_head_is_back_afterwards_also_after_an_exception() -> None:
    case = Case(SMALL)
    head = case.model.lm_head
    before, hooks = case.model(**case.batch).logits, len(head._forward_hooks)
    with pytest.raises(KeyError, match="mine"), fused_logprobs(case.model):
        raise KeyError("mine")
    assert "forward" not in vars(head)
    assert len(head._forward_hooks) == hooks
    assert torch.equal(case.model(**case.batch).logits, before)


def test_an_exception_in_the_model_leaves_a_head_that_works() -> None:
    case = Case(SMALL)
    with fused_logprobs(case.model) as fused:
        lacking = case.batch | {"pixel_values": case.batch["pixel_values"][:1]}
        with pytest.raises(ValueError, match="tokens"):
            fused.logprobs(lacking, prompt_length=case.prompt)
        assert fused.logprobs(case.batch, prompt_length=case.prompt).logps.any()


def test_nothing_else_may_call_the_head_meanwhile() -> None:
    case = Case(SMALL)
    with fused_logprobs(case.model) as fused:
        with pytest.raises(RuntimeError, match="InternVLForConditionalGeneration: its output head was called inside"):
            case.model(**case.batch)
        with pytest.raises(RuntimeError, match="replaced already, by fused_logprobs"), fused_logprobs(case.model):
            pass
        assert fused.logprobs(case.batch, prompt_length=case.prompt).logps.any(), "the outer one goes on"


def test_the_patch_is_gone_after_the_with() -> None:
    case = Case("granite")
    with fused_logprobs(case.model) as fused:
        pass
    with pytest.raises(RuntimeError, match="GraniteForCausalLM: its output head is replaced only inside"):
        fused.logprobs(case.batch, prompt_length=PROMPT)


def test_a_head_that_is_called_twice_in_a_forward() -> None:
    class Twice(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            super().forward(input_ids=input_ids, attention_mask=attention_mask)
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    case = Case("llama", make_text(Twice, LlamaConfig)())
    with pytest.raises(RuntimeError, match="Twice: its output head was called inside fused_logprobs"):
        model_logprobs(case.model, case.batch, prompt_length=PROMPT)


def test_an_unknown_head_is_named() -> None:
    case = Case(SMALL)
    case.model.lm_head = Adapted(case.model.lm_head)
    with pytest.raises(TypeError, match=r"InternVLForConditionalGeneration: expected a plain .*Adapted"):
        model_logprobs(case.model, case.batch, prompt_length=case.prompt)
    case.model.lm_head = None
    with pytest.raises(ValueError, match=r"expected a model with an output head .*, got none"):
        model_logprobs(case.model, case.batch, prompt_length=case.prompt)
    with pytest.raises(ValueError, match=r"InternVLModel: expected a model with an output head .*, got none"):
        model_logprobs(case.model.model, case.batch, prompt_length=case.prompt)
    with pytest.raises(TypeError, match="model: expected a transformers model, wrapped or not, got Linear"):
        model_logprobs(nn.Linear(2, 2), case.batch, prompt_length=case.prompt)


def test_an_encoder_decoder_is_named() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration: .* got an encoder-decoder"):
        model_logprobs(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)}, prompt_length=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 0.5,
        lambda logits: logits + (torch.arange(logits.shape[-1]) == 5),
        lambda logits: logits[..., :-3],
        lambda logits: 3.0 * torch.tanh(logits / 3.0),
    ],
    ids=["another scale", "one token", "fewer tokens", "a soft-cap that no field names"],
)
def test_what_comes_after_the_head_must_be_known(change: Callable[[Tensor], Tensor]) -> None:
    class Odd(GraniteForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = change(output.logits)
            return output

    model = make_text(Odd, GraniteConfig, logits_scaling=3.0)()
    case = Case("granite", model)
    with pytest.raises(ValueError, match="Odd: what it does with the logits of its head is no scale or soft-cap"):
        model_logprobs(model, case.batch, prompt_length=case.prompt)
    assert "forward" not in vars(model.lm_head)


def test_a_model_that_passes_its_head_by() -> None:
    class Lone(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 2)})()

    case = Case("llama", make_text(Lone, LlamaConfig)())
    with pytest.raises(RuntimeError, match="Lone: its forward has not called its output head"):
        model_logprobs(case.model, case.batch, prompt_length=case.prompt)


@pytest.mark.parametrize(
    ("changes", "options", "error", "match"),
    [
        ({"labels": torch.ones(3, 15)}, {}, ValueError, "batch: expected no labels"),
        ({"logits_to_keep": 3}, {}, ValueError, "batch: expected no logits_to_keep"),
        ({"input_ids": None}, {}, TypeError, r"batch\['input_ids'\]: expected a tensor, got NoneType"),
        ({}, {"prompt_length": 0}, ValueError, "prompt_length: expected an int from 1 to 14, got 0"),
        ({}, {"prompt_length": 15}, ValueError, "prompt_length: expected an int from 1 to 14, got 15"),
        ({}, {"prompt_length": 9.0}, TypeError, "prompt_length: expected an int, got 9.0"),
        ({}, {"prompt_length": 8}, ValueError, r"completion_mask: expected shape \(3, 7\), got \(3, 6\)"),
        ({}, {"completion_mask": [1]}, TypeError, "completion_mask: expected a tensor, got list"),
        ({}, {"temperature": 0.0}, ValueError, "temperature: expected a number in"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], options: dict[str, Any], error: type, match: str) -> None:
    case = Case("granite")
    given = {"prompt_length": PROMPT, "completion_mask": case.mask, **options}
    with fused_logprobs(case.model) as fused:
        with pytest.raises(error, match=match):
            fused.logprobs(case.batch | changes, **given)
        if "completion_mask" not in options:
            with pytest.raises(error, match=match):
                fused.policy_loss(case.batch | changes, None, case.advantages, **given)
    with pytest.raises(TypeError, match="batch: expected a mapping of the model's arguments, got Tensor"):
        model_logprobs(case.model, case.batch["input_ids"], prompt_length=PROMPT)


def test_meta_tensors_are_named() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**tiny_vlms.TEXT))
    with pytest.raises(ValueError, match="LlamaForCausalLM: expected an output head with weights, got meta tensors"):
        model_logprobs(model, {"input_ids": torch.tensor([[1, 2, 3]])}, prompt_length=2)
