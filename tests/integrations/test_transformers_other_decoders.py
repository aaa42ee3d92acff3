"""Decoders the code was not written for: chunked and latent attention, layers without any, and families it refuses.

They are text models whose configuration is made to name an image token; its embedding stands for the picture.
"""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_vlms
import torch
from torch.testing import assert_close
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    InklingForCausalLM,
    InklingTextConfig,
    KimiLinearConfig,
    KimiLinearForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MiniMaxConfig,
    MiniMaxForCausalLM,
)

from vgpo_kernels.integrations.transformers import record_visual_attention

TEXT = {**tiny_vlms.TEXT, "num_hidden_layers": 4}


def llama4() -> Any:
    """Chunks shorter than the row, counted from where the padding ends."""
    options = {"intermediate_size_mlp": 48, "attention_chunk_size": 5, "num_local_experts": 2, "head_dim": 8}
    return Llama4ForCausalLM(Llama4TextConfig(**TEXT, **options))


def lfm2() -> Any:
    return Lfm2ForCausalLM(Lfm2Config(**TEXT, layer_types=["conv", "full_attention"] * 2))


def deepseek() -> Any:
    """Keys of 16 and values of 12."""
    config = DeepseekV3Config(
        **{**TEXT, "num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        first_k_dense_replace=4,
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
    )
    return DeepseekV3ForCausalLM(config)


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4))


def falcon() -> Any:
    return FalconForCausalLM(FalconConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))


def gpt_oss() -> Any:
    options = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 5}
    return GptOssForCausalLM(GptOssConfig(**TEXT, **options))


def inkling() -> Any:
    """A bias by distance on the scores."""
    options = {"num_hidden_layers": 2, "head_dim": 8, "d_rel": 4}
    with torch.device("meta"):
        return InklingForCausalLM(InklingTextConfig(**{**TEXT, **options}))


def ready(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    model.config.image_token_id = tiny_vlms.IMAGE
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model


def make_batch() -> dict[str, Any]:
    ids = torch.randint(1, 90, (2, 12))
    ids[0, 2:6] = ids[1, 4:7] = tiny_vlms.IMAGE
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("make", "layers"), [(llama4, (0, 1, 2, 3)), (lfm2, (1, 3)), (deepseek, (0, 1, 2, 3)), (gpt2, (0, 1))]
)
def test_against_eager_maps(make: Callable[[], Any], layers: tuple[int, ...]) -> None:
    model, batch = ready(make), make_batch()
    real = batch["attention_mask"].bool()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack([each for each in model(**batch, output_attentions=True).attentions if each is not None])
    model.set_attn_implementation("vgpo")
    with torch.no_grad(), record_visual_attention(model, "all", heads="all") as rec:
        model(**batch)
    assert rec.layers == layers
    expected = (maps * (batch["input_ids"] == tiny_vlms.IMAGE)[:, None, None]).sum(-1)
    assert_close(rec.mass[..., 0] * real[:, None], expected * real[:, None])


def test_family_that_bypasses_theattention_function() -> None:
    model = ready(falcon)
    model.set_attn_implementation("vgpo")  # transformers warns that it cannot
    message = r"ran with attn_implementation='sdpa'.*a family that will not take it bypasses transformers' attention"
    with torch.no_grad(), pytest.raises(RuntimeError, match=message), record_visual_attention(model):
        model(**make_batch())


def test_text_model_is_told_to_set_the_whole() -> None:
    model = ready(gpt2)
    model.set_attn_implementation("sdpa")
    message = r"ran with attn_implementation='sdpa'.*call model\.set_attn_implementation\('vgpo'\)"
    with torch.no_grad(), pytest.raises(RuntimeError, match=message), record_visual_attention(model):
        model(**make_batch())


def test_family_with_attention_sinks() -> None:
    model = ready(gpt_oss)
    model.set_attn_implementation("vgpo")
    with torch.no_grad(), pytest.raises(ValueError, match=r"GptOssAttention of layer 0: .* attention sinks \(s_aux\)"):
        model(**make_batch())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gpt_oss, r"GptOssForCausalLM: .* GptOssAttention has attention sinks \(sinks\)"),
        (inkling, r"InklingForCausalLM: .* InklingAttention has a bias on the scores \(rel_logits_proj\)"),
    ],
)
def test_attention_that_is_no_plain_softmax_is_named_before_any_forward(make: Callable[[], Any], message: str) -> None:
    model = make()
    model.config.image_token_id = tiny_vlms.IMAGE
    model.set_attn_implementation("vgpo")
    with pytest.raises(ValueError, match=message), record_visual_attention(model):
        raise AssertionError("a recorder was made")


MIXED = ["linear_attention", "full_attention"] * 2


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (KimiLinearForCausalLM, lambda: KimiLinearConfig(**TEXT, layer_types=MIXED)),  # its KimiLinearAttention has one
        (MiniMaxForCausalLM, lambda: MiniMaxConfig(**TEXT, layer_types=MIXED)),
    ],
)
def test_layers_without_a_softmax_are_left_out(kind: Any, config: Callable[[], Any]) -> None:
    with torch.device("meta"):
        model = kind(config())
    model.config.image_token_id = tiny_vlms.IMAGE
    model.set_attn_implementation("vgpo")
    with record_visual_attention(model, "all") as rec:
        assert rec.layers == (1, 3)
