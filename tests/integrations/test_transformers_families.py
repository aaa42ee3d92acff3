"""Families that need more than the interface: shared keys, wrappers, pictures of their own grids, chosen keys."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_vlms
import torch
from head_cases import Case
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    DeepseekV3Config,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from vgpo_kernels import VGPOConfig, vgpo_weights, visual_focus_score
from vgpo_kernels.attention.checks import HEAD_DIM
from vgpo_kernels.integrations.transformers import (
    focus_from_attention,
    fused_logprobs,
    image_ids,
    model_logprobs,
    record_visual_attention,
    visual_token_mask,
)

IMAGE = tiny_vlms.IMAGE
TEXT = {**tiny_vlms.TEXT, "num_hidden_layers": 2}
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}


def kimi() -> tuple[Any, dict[str, Tensor]]:
    text = DeepseekV3Config(**{**TEXT, "num_key_value_heads": 4}, **LATENT, first_k_dense_replace=2)
    vision = {**SMALL, "hidden_size": 32, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4}
    special = {**tiny_vlms.SPECIAL, "projection_hidden_size": 32}
    model = Kimi_K25ForConditionalGeneration(Kimi_K25Config(text_config=text, vision_config=vision, **special))
    return model, {"pixel_values": torch.randn(32, 3, 4, 4), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 8]])}


def video_llama() -> tuple[Any, dict[str, Tensor]]:
    text = {**TEXT, "model_type": "qwen2"}
    config = VideoLlama3Config(text_config=text, vision_config={**SMALL, "patch_size": 4}, image_token_id=IMAGE)
    pixels = {"pixel_values": torch.randn(8, 48), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 1, 4]])}
    return VideoLlama3ForConditionalGeneration(config), {**pixels, "image_merge_sizes": torch.ones(2, dtype=torch.long)}


def hunyuan() -> tuple[Any, dict[str, Tensor]]:
    """A token at the end of each row, one before and one after: 2 x 1 and 1 x 2 tokens come as 6 and 5."""
    vision = {**SMALL, "patch_size": 4, "out_hidden_size": 32, "text_hidden_size": 32, "max_image_size": 16}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}
    config = HunYuanVLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE
    )
    model = HunYuanVLForConditionalGeneration(config)
    return model, {"pixel_values": torch.randn(16, 48), "image_grid_thw": torch.tensor([[1, 4, 2], [1, 2, 4]])}


@pytest.mark.parametrize(
    ("make", "tokens", "shapes"),
    [(kimi, (4, 4), [(2, 2), (1, 4)]), (video_llama, (4, 4), [(2, 2), (1, 4)]), (hunyuan, (6, 5), [(2, 1), (1, 2)])],
)
def test_generate_is_recorded_whatever_makes_a_token(make: Callable[[], Any], tokens: Any, shapes: Any) -> None:
    torch.manual_seed(0)
    model, pictures = make()
    tiny_vlms.with_large_weights(model)
    ids = torch.tensor([[1, 93, *[IMAGE] * tokens[0], 94, 2, 93, *[IMAGE] * tokens[1], 94, 3]])
    typed = make is hunyuan

    def batch_of(ids: Tensor) -> dict[str, Tensor]:
        types = {"mm_token_type_ids": (ids == IMAGE).int()} if typed else {}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures, **types}

    model.set_attn_implementation({"text_config": "vgpo"})
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": tiny_vlms.NOT_WORDS}
    with record_visual_attention(model, "all", queries="predicting", columns=True) as rec:
        sequences = model.generate(**batch_of(ids), **options)
    assert rec.mass.shape == (2, 1, 3, 1)
    assert [tuple(rec.heatmap(0, image).shape) for image in (0, 1)] == shapes
    # Once more in one forward, against the maps of eager attention.
    length = ids.shape[1]
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        maps = torch.stack(model(**batch_of(sequences), output_attentions=True).attentions).mean(2)[
            :, 0, length - 1 : -1
        ]
    assert_close(rec.mass[:, 0, :, 0], maps[..., sequences[0] == IMAGE].sum(-1), atol=1e-5, rtol=1e-4)


def shared_keys(**sizes: Any) -> Any:
    config = Gemma4TextConfig(
        **{**TEXT, "num_hidden_layers": 4},
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=tiny_vlms.VOCABULARY,
        **sizes,
    )
    config.image_token_id = IMAGE
    torch.manual_seed(0)
    return tiny_vlms.with_large_weights(Gemma4ForCausalLM(config))


def test_hidden_states_are_those_of_all_tokens_where_upper_layers_share_keys() -> None:
    model = shared_keys(head_dim=8, global_head_dim=16)
    ids = torch.tensor([[0, IMAGE, 1, 2, 3, 4], [5, 6, IMAGE, 2, 3, 4]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with torch.no_grad():
        found = model_logprobs(model, batch, prompt_length=4, hidden_states=True)
        without = model_logprobs(model, batch, prompt_length=4)
        states = model.model(**batch).last_hidden_state
    assert_close(found.hidden_states, states)
    assert_close(found.logps, without.logps)
    assert without.hidden_states is None


def gemma4(**fields: Any) -> Any:
    """Heads as published: 256 elements in sliding layers, 512 in full ones."""
    kinds = ["sliding_attention", "full_attention"] * 2
    text = Gemma4TextConfig(
        **{**TEXT, "num_hidden_layers": 4},
        layer_types=kinds,
        sliding_window=6,
        vocab_size_per_layer_input=100,
        **fields,
    )
    vision = {**SMALL, "model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4}
    vision |= {"pooling_kernel_size": 2, "position_embedding_size": 16}
    marks = {"image_token_id": IMAGE, "boi_token_id": tiny_vlms.START, "eoi_token_id": tiny_vlms.END}
    torch.manual_seed(0)
    model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=vision, **marks))
    assert [layer.self_attn.head_dim for layer in model.model.language_model.layers] == [256, 512] * 2
    return tiny_vlms.with_large_weights(model)


def gemma4_batch() -> dict[str, Tensor]:
    """Two rows of one picture, 2 x 1 tokens of 2 x 2 patches; the last three tokens are a completion."""
    ids = torch.tensor([[0, 5, 93, IMAGE, IMAGE, 94, 6, 7, 8, 9], [4, 5, 93, IMAGE, IMAGE, 94, 6, 9, 8, 7]])
    places = torch.tensor([[[x, y] for y in range(2) for x in range(4)]] * 2)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "mm_token_type_ids": (ids == IMAGE).int()}
    return {**batch, "pixel_values": torch.rand(2, 8, 48), "image_position_ids": places}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"hidden_size_per_layer_input": 0}, id="31B"),
        pytest.param({"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}, id="E2B"),
    ],
)
def test_gemma_4_with_its_own_head_sizes_trains_by_both_sources(fields: dict[str, Any]) -> None:
    model, batch = gemma4(**fields), gemma4_batch()
    ids, prompt, mask = batch["input_ids"], 7, torch.ones(2, 3)
    model.set_attn_implementation({"text_config": "vgpo"})
    with torch.no_grad(), record_visual_attention(model, "all", heads="all", prompt_length=prompt) as rec:
        old = model_logprobs(model, batch, prompt_length=prompt, hidden_states=True)
    assert old.hidden_states is not None
    assert old.hidden_states.shape == (2, 10, 32)
    attention = focus_from_attention(rec, mask)
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        maps = torch.stack(model(**batch, output_attentions=True).attentions)
    assert_close(rec.mass[..., 0], maps[..., prompt:, 3:5].sum(-1), atol=2e-5, rtol=1e-4)
    model.set_attn_implementation({"text_config": "vgpo"})
    completion = torch.cat([torch.zeros(2, prompt), mask], dim=1)
    visual = visual_token_mask(model.config, ids)
    images = image_ids(model.config, batch, [1, 1])
    similarity = visual_focus_score(old.hidden_states, visual, completion, image_ids=images)[:, prompt:]
    for source, focus in (("attention", attention), ("similarity", similarity)):
        config = VGPOConfig.from_recipe("balanced")
        weights = vgpo_weights(focus, mask, torch.tensor([0, 0]), config, has_visual=visual.any(1), source=source)
        model.zero_grad()
        with fused_logprobs(model) as fused:
            loss = fused.policy_loss(
                batch,
                old.logps,
                torch.tensor([1.0, -1.0]),
                mask,
                prompt_length=prompt,
                token_weights=weights.token_weights,
                trajectory_weights=weights.trajectory_weights,
            ).loss
        loss.backward()
        gradients = [p.grad for p in model.model.language_model.layers.parameters() if p.grad is not None]
        assert all(bool(grad.isfinite().all()) for grad in gradients)
        assert any(bool(grad.any()) for grad in gradients)


def test_a_layer_of_too_large_heads_is_named_before_any_forward() -> None:
    config = Gemma4TextConfig(
        **TEXT, layer_types=["sliding_attention", "full_attention"], head_dim=HEAD_DIM, global_head_dim=2 * HEAD_DIM
    )
    config.hidden_size_per_layer_input = 0
    config.image_token_id = IMAGE
    with torch.device("meta"):
        model = Gemma4ForCausalLM(config)
    message = (
        f"layers: expected layers of a head size of at most {HEAD_DIM}, got layer 1 of Gemma4ForCausalLM with "
        rf"{2 * HEAD_DIM}; those that can be recorded: \[0\]"
    )
    with pytest.raises(ValueError, match=message), record_visual_attention(model, "last"):
        raise AssertionError("a recorder was made")
    with record_visual_attention(model, [0]) as rec:
        assert rec.layers == (0,)


def llama4(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Tensor]]:
    # transformers 5.24 reads this field of an output that has none.
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
    text = {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8}
    vision = {**SMALL, "intermediate_size": 64, "image_size": 4, "patch_size": 2, "pixel_shuffle_ratio": 0.5}
    vision |= {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    config = Llama4Config(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return Llama4ForConditionalGeneration(config), {"pixel_values": torch.randn(1, 3, 4, 4)}


def blip2(_: pytest.MonkeyPatch) -> tuple[Any, dict[str, Tensor]]:
    opt = {"model_type": "opt", "vocab_size": tiny_vlms.VOCABULARY, "ffn_dim": 16, "word_embed_proj_dim": 16}
    return _blip(Blip2ForConditionalGeneration, Blip2Config, {**SMALL, **opt, "max_position_embeddings": 32})


def _blip(kind: Any, config: Any, text: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    parts = {
        "vision_config": {**SMALL, "image_size": 4, "patch_size": 2},
        "qformer_config": {**SMALL, "vocab_size": 20, "encoder_hidden_size": 16},
    }
    model = kind(config(text_config=text, **parts, num_query_tokens=2, image_token_index=IMAGE))
    return model, {"pixel_values": torch.randn(1, 3, 4, 4)}


def nemotron(_: pytest.MonkeyPatch) -> tuple[Any, dict[str, Tensor]]:
    """One of four blocks has attention; the whole hands out no head."""
    text = {
        **TEXT,
        "model_type": "nemotron_h",
        "layers_block_type": ["mamba", "attention", "moe", "mlp"],
        "head_dim": 8,
    }
    del text["num_hidden_layers"]
    text |= {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "n_routed_experts": 2}
    text |= {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}
    vision = {**SMALL, "model_type": "radio", "image_size": 8, "patch_size": 4, "video_temporal_patch_size": 2}
    sizes = {"vision_hidden_size": 16, "projector_hidden_size": 16, "image_token_id": IMAGE}
    config = NemotronH_Omni_Reasoning_V3_Config(text_config=text, vision_config=vision, **sizes)
    return NemotronH_Omni_Reasoning_V3(config), {}


@pytest.mark.parametrize(("make", "tokens"), [(llama4, 1), (blip2, 2), (nemotron, 2)])
def test_a_causal_model_inside_another_is_looked_into(
    make: Callable[..., Any], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, pixels = make(monkeypatch)
    tiny_vlms.with_large_weights(model)
    ids = torch.tensor([[5, *[IMAGE] * tokens, 6, 7, 8, 9]])
    batch = {"input_ids": ids, **pixels}
    model.set_attn_implementation({"text_config": "vgpo"})
    with torch.no_grad(), record_visual_attention(model, prompt_length=ids.shape[1] - 2) as rec:
        found = model_logprobs(model, batch, prompt_length=ids.shape[1] - 2, hidden_states=True)
        logits = model(**batch).logits
    assert found.hidden_states is not None
    head = model.get_output_embeddings() or model.get_decoder().get_output_embeddings()
    assert_close(head(found.hidden_states), logits)
    assert_close(found.logps, logits[:, -3:-1].log_softmax(-1).gather(-1, ids[:, -2:, None])[..., 0])
    assert rec.mass.shape == (1, 1, 2, 1)


def test_an_encoder_decoder_is_one_where_only_its_text_half_says_so() -> None:
    t5 = {"model_type": "t5", "vocab_size": tiny_vlms.VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16}
    t5 |= {"num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model, pixels = _blip(InstructBlipForConditionalGeneration, InstructBlipConfig, t5)
    batch = {"input_ids": torch.tensor([[IMAGE, IMAGE, 1, 2]]), **pixels, "decoder_input_ids": torch.tensor([[0, 1]])}
    with pytest.raises(ValueError, match=r"InstructBlip.* got an encoder-decoder"):
        model_logprobs(model, batch, prompt_length=3)
    with pytest.raises(ValueError, match=r"InstructBlip.* got an encoder-decoder"), record_visual_attention(model):
        pass
    with pytest.raises(ValueError, match="expected prompt and completion together in input_ids, got decoder_input_ids"):
        model_logprobs(Case("internvl").model, {**batch, "input_ids": torch.ones(1, 4).long()}, prompt_length=2)


def test_an_image_token_named_by_the_vision_half_and_modules_that_are_no_layer() -> None:
    vision = {**SMALL, "image_size": 16, "patch_size": 4, "crop_size": 16, "image_token_id": IMAGE}
    audio = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "input_size": 8}
    audio |= dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), 16)
    config = Phi4MultimodalConfig(
        **TEXT, vision_config=vision, audio_config=audio, original_max_position_embeddings=128
    )
    model = tiny_vlms.with_large_weights(Phi4MultimodalForCausalLM(config))
    ids = torch.tensor([[IMAGE, IMAGE, 1, 2, 3]])
    model.set_attn_implementation("vgpo")
    with torch.no_grad(), record_visual_attention(model, "all", heads="all") as rec:
        model(input_ids=ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(input_ids=ids, output_attentions=True).attentions)
    assert rec.layers == (0, 1)
    assert_close(rec.mass[..., 0], maps[..., :2].sum(-1))


@pytest.mark.parametrize("padded", [False, True])
def test_chosen_keys_are_those_of_sdpa_and_named_when_recorded(padded: bool) -> None:
    sizes = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 3, "first_k_dense_replace": 2}
    config = DeepseekV32Config(**{**TEXT, "num_key_value_heads": 4}, **LATENT, **sizes)
    config.image_token_id = IMAGE
    torch.manual_seed(0)
    model = tiny_vlms.with_large_weights(DeepseekV32ForCausalLM(config))
    ids = torch.tensor([[IMAGE, IMAGE, 1, 2, 3, 4, 5, 6]])
    mask = torch.ones_like(ids)
    mask[:, : 2 * padded] = 0
    logits = {}
    for implementation in ("sdpa", "vgpo"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(ids, attention_mask=mask).logits[:, 2 * padded :]
    assert_close(logits["vgpo"], logits["sdpa"])
    message = r"DeepseekV32ForCausalLM: .* the indexer of DeepseekV32Attention chooses keys \(indices\)"
    with pytest.raises(ValueError, match=message), record_visual_attention(model):
        raise AssertionError("a recorder was made")


@pytest.mark.parametrize("compiled", ["model.compile", "torch.compile"])
def test_the_first_forward_of_a_compiled_model_gives_what_the_plain_one_gives(compiled: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=9, **SMALL)
    plain, inside = LlamaForCausalLM(config), LlamaForCausalLM(config)
    inside.load_state_dict(plain.state_dict())
    model: Any = inside
    if compiled == "torch.compile":
        model = torch.compile(inside, backend="eager")
    else:
        inside.compile(backend="eager")
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]])}
    given = {"prompt_length": 2, "temperature": 0.5}
    # The first forward asks for no entropy: what reads the head's logits is traced with it.
    for options in ({}, {"entropy": True, "hidden_states": True}):
        with torch.no_grad():
            found, expected = (model_logprobs(each, batch, **given, **options) for each in (model, plain))
        for name, value in expected._asdict().items():
            assert_close(getattr(found, name), value)


def test_a_compiled_model_is_recorded_as_it_is_when_plain() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(**TEXT)
    config.image_token_id = IMAGE
    model = tiny_vlms.with_large_weights(LlamaForCausalLM(config))
    model.set_attn_implementation("vgpo")
    batch = {"input_ids": torch.tensor([[5, IMAGE, IMAGE, 6, 7, 8, 9]])}

    def recorded() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), record_visual_attention(model, "all") as whole:
            model(**batch)
        with record_visual_attention(model, queries="predicting") as sampled:
            model.generate(**batch, max_new_tokens=3, do_sample=False)
        return whole.mass, sampled.mass

    expected = recorded()
    model.compile(backend="eager")
    assert_close(recorded(), expected)
    compiled: list[Any] = []
    one_more = torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(graph) or graph)
    one_more(torch.ones(1))
    assert compiled, "what is compiled runs compiled again afterwards"
