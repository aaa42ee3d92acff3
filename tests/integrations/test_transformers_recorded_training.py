"""Training steps that are recorded: gradients under checkpointing of both kinds, and under autocast."""

from typing import Any

import pytest
import tiny_vlms
import torch
from tiny_vlms import recorded
from torch import Tensor
from torch.testing import assert_close

from vgpo_kernels.integrations.transformers import record_visual_attention, sequence

FAMILY = "qwen2_5_vl"  # sliding and full layers


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("family", [FAMILY, "soft_capped"])
def test_training_step_under_checkpointing(
    reentrant: bool, inside: bool, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = sequence.attention_mass

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return real(*args, **kwargs)

    batch, gradients = tiny_vlms.make_batch(family), []
    for attention in ("eager", "vgpo"):
        model = tiny_vlms.make(family).train()
        model.set_attn_implementation(attention)
        expected = None
        if attention == "vgpo":
            expected = recorded(model, batch, [0, 2], prompt_length=9)
            monkeypatch.setattr(sequence, "attention_mass", counting)
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
            with record_visual_attention(model, [0, 2], prompt_length=9) as rec:
                loss = _loss(model, batch)
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            assert len(calls) == 2
            assert torch.equal(rec.mass, expected)
            assert not rec.mass.requires_grad
        else:
            _loss(model, batch).backward()
        gradients.append([layer.self_attn.k_proj.weight.grad for layer in model.model.language_model.layers])
    for eager, ours in zip(*gradients, strict=True):
        assert_close(ours / eager.abs().max(), eager / eager.abs().max())


def _loss(model: Any, batch: dict[str, Any]) -> Tensor:
    logits = model(**batch, use_cache=False).logits
    return logits[batch["attention_mask"].bool()].square().mean()


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("family", [FAMILY, "internvl", "soft_capped"])
def test_training_step_under_autocast(family: str, checkpointing: str | None) -> None:
    """Rotary embeddings leave queries and keys in fp32 while values are bf16."""
    batch, masses, gradients = tiny_vlms.make_batch(family), [], []
    image = (batch["input_ids"] == tiny_vlms.IMAGE)[:, None, None]
    real = batch["attention_mask"].bool()[:, None]
    for attention, dtype in (("eager", None), ("eager", torch.bfloat16), ("vgpo", torch.bfloat16)):
        model = tiny_vlms.make(family).train()
        model.set_attn_implementation(attention)
        if attention == "vgpo" and checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            model.enable_input_require_grads()
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None)
        if attention == "vgpo":
            with record_visual_attention(model, "all", heads="all") as rec:
                with autocast:
                    loss = _loss(model, batch)
                loss.backward()
            mass = rec.mass[..., 0]
        else:
            with autocast:
                output = model(**batch, use_cache=False, output_attentions=True)
                output.logits[batch["attention_mask"].bool()].square().mean().backward()
            mass = (torch.stack(output.attentions).float() * image).sum(-1)
        masses.append((mass.detach() * real).flatten())
        layers = model.model.language_model.layers
        gradients.append(torch.cat([layer.self_attn.k_proj.weight.grad.flatten() for layer in layers]))
    for exact, eager, ours in (masses, gradients):
        # bf16 rounds ours no worse than eager; they round at different places.
        assert (ours - exact).norm() <= 2.0 * (eager - exact).norm()
