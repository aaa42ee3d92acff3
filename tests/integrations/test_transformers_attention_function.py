"""Without a recorder, "vgpo" is transformers' own sdpa, mask included; what it cannot take raises."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_vlms
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from vgpo_kernels.integrations.transformers import attention_function, record_visual_attention

SDPA_FAMILIES = [name for name in tiny_vlms.FAMILIES if name != "soft_capped"]
PADDED = torch.tensor([[False, False, True, True, True], [True] * 5])


def test_both_functions_are_registered() -> None:
    assert AttentionInterface()["vgpo"] is attention_function.vgpo_attention
    assert AttentionMaskInterface()["vgpo"] is attention_function.vgpo_mask


@pytest.mark.parametrize("attention_mask", [None, torch.ones(2, 5, dtype=torch.bool), PADDED])
@pytest.mark.parametrize("mask_function", [causal_mask_function, sliding_window_causal_mask_function(3)])
@pytest.mark.parametrize("skip", [True, False])
def test_mask_is_sdpas_without_a_recorder(attention_mask: Any, mask_function: Any, skip: bool) -> None:
    arguments = {
        "batch_size": 2,
        "q_length": 5,
        "kv_length": 5,
        "q_offset": 0,
        "kv_offset": 0,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": skip,
        "dtype": torch.float32,
        "config": tiny_vlms.make("qwen2_vl").config,
        "use_vmap": False,
        "device": torch.device("cpu"),
    }
    expected, got = sdpa_mask(**arguments), attention_function.vgpo_mask(**arguments)
    assert (expected is None) == (got is None)
    assert expected is None or torch.equal(expected, got)


@pytest.mark.parametrize("name", SDPA_FAMILIES)
def test_model_is_bit_identical_to_sdpa_without_a_recorder(name: str) -> None:
    model, batch = tiny_vlms.make(name), tiny_vlms.make_batch(name)
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": tiny_vlms.NOT_WORDS}
    results = []
    for attention in ("sdpa", "vgpo", {"text_config": "vgpo", "vision_config": "sdpa"}):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            results.append((model(**batch).logits, model.generate(**batch, **options)))
    for logits, sequences in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert torch.equal(sequences, results[0][1])


@pytest.mark.parametrize("name", SDPA_FAMILIES)
def test_layers_that_are_not_recorded_get_what_sdpa_gets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: dict[str, list[Any]] = {"plain": [], "recorded": []}
    real = attention_function.sdpa_attention_forward

    def spy(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(module, "layer_idx", None) in (0, 1) and "Vision" not in type(module).__name__:
            masks[now].append(mask)
        return real(module, q, k, v, mask, *args, **kwargs)

    monkeypatch.setattr(attention_function, "sdpa_attention_forward", spy)
    model, batch = tiny_vlms.make(name), tiny_vlms.make_batch(name)
    model.set_attn_implementation({"text_config": "vgpo"})
    with torch.no_grad():
        now = "plain"
        model(**batch)
        now = "recorded"
        with record_visual_attention(model, "last"):
            model(**batch)
    assert len(masks["plain"]) == len(masks["recorded"]) == 2
    for plain, recorded in zip(masks["plain"], masks["recorded"], strict=True):
        assert torch.equal(plain, recorded)


def test_soft_capped_model_attends_with_ours_without_a_recorder() -> None:
    model, batch = tiny_vlms.make("soft_capped"), tiny_vlms.make_batch("soft_capped")
    real = batch["attention_mask"].bool()
    logits = {}
    for attention in ("eager", "vgpo"):
        model.set_attn_implementation(attention)
        logits[attention] = model(**batch).logits[real]
        logits[attention].square().sum().backward()
        logits[attention + " gradient"] = model.model.language_model.layers[0].self_attn.q_proj.weight.grad
        model.zero_grad()
    assert_close(logits["vgpo"], logits["eager"])
    scale = logits["eager gradient"].abs().max()
    assert_close(logits["vgpo gradient"] / scale, logits["eager gradient"] / scale)


def test_soft_capped_attention_takes_masks_from_elsewhere() -> None:
    """The four-dimensional mask that a caller prepares never meets the mask function."""
    model, batch = tiny_vlms.make("soft_capped"), tiny_vlms.make_batch("soft_capped")
    text, ids = model.model.language_model, batch["input_ids"][:, :9]
    dense = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(3, 1, 9, 9)
    additive = torch.where(dense, 0.0, torch.finfo(torch.float32).min)
    results = []
    for attention, mask in (("eager", additive), ("vgpo", additive), ("vgpo", dense)):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            both = {"full_attention": mask, "sliding_attention": mask}
            results.append(text(input_ids=ids, attention_mask=both).last_hidden_state)
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


def test_from_pretrained_with_vgpo_for_the_text_alone(tmp_path: Path) -> None:
    tiny_vlms.make("qwen2_5_vl").save_pretrained(tmp_path)
    load = AutoModelForImageTextToText.from_pretrained
    model = load(tmp_path, attn_implementation={"text_config": "vgpo"}).eval()
    eager = load(tmp_path, attn_implementation="eager").eval()
    assert model.config.text_config._attn_implementation == "vgpo"
    assert model.config.vision_config._attn_implementation == "sdpa"
    batch = tiny_vlms.make_batch("qwen2_5_vl")
    real = batch["attention_mask"].bool()
    with torch.no_grad(), record_visual_attention(model, [1], heads="all") as rec:
        model(**batch)
        maps = eager(**batch, output_attentions=True).attentions[1]
    expected = (maps * (batch["input_ids"] == tiny_vlms.IMAGE)[:, None, None]).sum(-1)
    assert_close(rec.mass[0, ..., 0] * real[:, None], expected * real[:, None])


class Attention(nn.Module):
    """An attention layer as the interface sees one."""

    layer_idx = 3
    is_causal = True


def call(softcap: float | None = None, lengths: tuple[int, int] = (4, 4), **options: Any) -> Any:
    q, k = torch.randn(1, 2, lengths[0], 8), torch.randn(1, 2, lengths[1], 8)
    mask = options.pop("attention_mask", None)
    return attention_function.vgpo_attention(Attention(), q, k, k, mask, softcap=softcap, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s_aux": torch.zeros(2)}, r"Attention of layer 3: .* cannot take attention sinks \(s_aux\)"),
        ({"sinks": torch.zeros(1, 2, 4, 1)}, r"Attention of layer 3: .* cannot take attention sinks \(sinks\); use"),
        ({"indices": torch.zeros(2)}, r"Attention of layer 3: .* chosen keys \(indices\) of shape \(2,\); expected"),
        (
            {"softcap": 5.0, "indices": torch.zeros(1, 4, 1)},
            r"chosen keys \(indices\) where it is recorded",
        ),
        (
            {"block_indices": torch.zeros(2)},
            r"cannot take chosen keys \(block_indices\); use attn_implementation='eager'",
        ),
        ({"softcap": 5.0, "dropout": 0.1}, r"Attention of layer 3: .* cannot take attention dropout 0\.1; set"),
        ({"softcap": 5.0, "position_bias": torch.zeros(1)}, r"cannot take a bias on the scores \(position_bias\)"),
        ({"softcap": 5.0, "cache": object()}, "cannot take a paged cache"),
        (
            {"softcap": 5.0, "lengths": (4, 6), "attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)},
            "cannot take 6 keys under a mask of 4",
        ),
    ],
)
def test_what_attention_cannot_take_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**options)


def test_values_may_be_shorter_than_keys() -> None:
    """As in latent attention."""
    q, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 5)
    out, _ = attention_function.vgpo_attention(Attention(), q, q, v, None, softcap=50.0)
    scores = torch.tanh(q @ q.mT * 8**-0.5 / 50.0) * 50.0
    probabilities = scores.masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    assert_close(out, (probabilities @ v).transpose(1, 2))


def test_importing_the_library_does_not_import_transformers() -> None:
    code = "import sys, vgpo_kernels; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
