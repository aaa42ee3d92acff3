"""What is recorded against the same weights run eagerly with output_attentions=True, per layer and head, in fp32."""

from typing import Any

import pytest
import tiny_vlms
import torch
from torch import Tensor
from torch.testing import assert_close

from vgpo_kernels.integrations.transformers import record_visual_attention

FAMILIES = list(tiny_vlms.FAMILIES)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    model = tiny_vlms.make(family)
    model.set_attn_implementation("vgpo")
    return model


def eager(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns attention maps (layers, B, H, L, L), zero for queries that are padding, and logits."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            output = model(**batch, output_attentions=True)
    finally:
        model.set_attn_implementation("vgpo")
    real = batch["attention_mask"].bool()
    return torch.stack(output.attentions) * real[None, :, None, :, None], output.logits


def segment_masses(maps: Tensor, batch: dict[str, Any], prompt: int) -> Tensor:
    """Returns (layers, B, H, L, 3): attention on pictures, the prompt's other tokens and the completion."""
    ids = batch["input_ids"]
    image = ids == tiny_vlms.IMAGE
    generated = (torch.arange(ids.shape[1]) >= prompt).expand(ids.shape)
    members = (
        torch.stack([image, ~image & ~generated, generated & ~image], dim=-1)
        & batch["attention_mask"].bool()[..., None]
    )
    return torch.einsum("lbhqk,bks->lbhqs", maps, members.to(maps.dtype))


def columns_of(maps: Tensor, positions: Tensor) -> Tensor:
    """Returns (layers, B, H, n): the attention that each position received from all queries of `maps`."""
    index = positions.clamp(min=0)[None, :, None].expand(*maps.shape[:3], -1)
    return maps.sum(-2).gather(-1, index) * (positions >= 0)[None, :, None]


def test_forward_without_completion_records_every_token(model: Any, family: str) -> None:
    batch = tiny_vlms.make_batch(family)
    maps, logits = eager(model, batch)
    with torch.no_grad(), record_visual_attention(model, "all", "image/query/generated", "all", columns=True) as rec:
        output = model(**batch)
    real = batch["attention_mask"].bool()
    mass = rec.mass * real[None, :, None, :, None]
    assert_close(mass, segment_masses(maps, batch, prompt=batch["input_ids"].shape[1]))
    assert_close(mass.sum(-1), real.float()[None, :, None].expand(mass.shape[:-1]))
    assert rec.visual_positions.tolist()[1] == [-1] * (2 * tiny_vlms.FAMILIES[family].tokens)
    assert_close(rec.columns, columns_of(maps, rec.visual_positions))
    assert_close(output.logits[real], logits[real])


def test_forward_with_completion_and_padding_on_both_sides(model: Any, family: str) -> None:
    batch = tiny_vlms.make_batch(family)
    prompt = batch["input_ids"].shape[1]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    whole = tiny_vlms.continued(family, batch, torch.randint(1, 90, mask.shape) * mask, mask)
    maps, _ = eager(model, whole)
    with torch.no_grad():
        with record_visual_attention(
            model, "all", "image/query/generated", "all", columns=True, prompt_length=prompt
        ) as at_token:
            model(**whole)
        with record_visual_attention(
            model, "all", "visual", "mean", columns=True, prompt_length=prompt, queries="predicting"
        ) as before_token:
            model(**whole)
    masses = segment_masses(maps, whole, prompt)
    real = mask.bool()[None, :, None, :, None]
    assert_close(at_token.mass * real, masses[..., prompt:, :] * real)
    assert_close(at_token.columns, columns_of(maps[..., prompt:, :], at_token.visual_positions))
    producing = masses[..., prompt - 1 : -1, :1].mean(2)
    assert_close(before_token.mass * real[:, :, 0], producing * real[:, :, 0])
    produced = maps[..., prompt - 1 : -1, :] * real
    assert_close(before_token.columns, columns_of(produced, before_token.visual_positions).mean(2))


@pytest.mark.parametrize("queries", ["token", "predicting"])
def test_generate_follows_prefill_and_decode(model: Any, family: str, queries: str) -> None:
    batch = tiny_vlms.make_batch(family)
    prompt, new = batch["input_ids"].shape[1], 6
    options = {"max_new_tokens": new, "do_sample": False, "suppress_tokens": tiny_vlms.NOT_WORDS}
    with record_visual_attention(model, "all", "image/query/generated", "all", columns=True, queries=queries) as rec:
        sequences = model.generate(**batch, **options)
    whole = tiny_vlms.continued(family, batch, sequences[:, prompt:])
    maps, logits = eager(model, whole)
    logits[..., tiny_vlms.NOT_WORDS] = -torch.inf
    assert torch.equal(sequences[:, prompt:], logits[:, prompt - 1 : -1].argmax(-1))
    first = prompt if queries == "token" else prompt - 1
    maps = maps[..., first:-1, :]
    assert rec.mass.shape == (3, 3, 4, new - (queries == "token"), 3)
    assert_close(rec.mass, segment_masses(maps, whole, prompt))
    assert_close(rec.columns, columns_of(maps, rec.visual_positions))


def test_chosen_layers_come_in_the_order_asked_for(model: Any, family: str) -> None:
    batch = tiny_vlms.make_batch(family)
    maps, _ = eager(model, batch)
    expected = segment_masses(maps, batch, prompt=10**6)[..., :1].mean(2)
    real = batch["attention_mask"].bool()[None, :, :, None]
    with torch.no_grad():
        with record_visual_attention(model, [-1, 0]) as two:
            model(**batch)
        with record_visual_attention(model) as last:
            model(**batch)
    assert two.layers == (2, 0)
    assert last.layers == (2,)
    assert_close(two.mass * real, expected[[2, 0]])
    assert_close(last.mass * real, expected[[2]])
