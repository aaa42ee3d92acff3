"""The context manager: what it leaves behind, which calls it records, masks of the caller, errors."""

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_vlms
import torch
from head_cases import Wrapper
from tiny_vlms import recorded
from torch import nn
from torch.testing import assert_close
from transformers import Qwen2Config, Qwen2ForCausalLM

from vgpo_kernels.integrations.transformers import focus_from_attention, record_visual_attention, recorder_base

FAMILY = "qwen2_5_vl"  # sliding and full layers


@pytest.fixture
def model() -> Any:
    model = tiny_vlms.make(FAMILY)
    model.set_attn_implementation({"text_config": "vgpo"})
    return model


@pytest.fixture
def batch() -> dict[str, Any]:
    return tiny_vlms.make_batch(FAMILY)


@pytest.fixture(autouse=True)
def nothing_stays_behind(model: Any) -> Iterator[None]:
    yield
    assert recorder_base.ACTIVE == []
    assert "generate" not in model.__dict__
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_last_forward_is_what_is_read(model: Any, batch: dict[str, Any]) -> None:
    other = tiny_vlms.make_batch(FAMILY, words=9, seed=5)
    first, second = recorded(model, batch, "all"), recorded(model, other, "all")
    with torch.no_grad(), record_visual_attention(model, "all") as rec:
        model(**batch)
        assert torch.equal(rec.mass, first)
        model(**other)
    assert torch.equal(rec.mass, second)
    with torch.no_grad(), rec:
        model(**batch)
    assert torch.equal(rec.mass, first)


def test_nested_recorders_both_record(model: Any, batch: dict[str, Any]) -> None:
    last, every = recorded(model, batch), recorded(model, batch, "all", "image/query/generated", "all")
    with torch.no_grad(), record_visual_attention(model) as outer:
        with record_visual_attention(model, "all", "image/query/generated", "all") as inner:
            model(**batch)
        assert_close(outer.mass, last)  # the layers below run with the kernels that the other recorder asks for
        assert torch.equal(inner.mass, every)
        model(**tiny_vlms.make_batch(FAMILY, words=9))
    assert outer.mass.shape[2] > last.shape[2]
    assert torch.equal(inner.mass, every)


def test_two_models_are_told_apart(model: Any, batch: dict[str, Any]) -> None:
    other, other_batch = tiny_vlms.make("gemma3", seed=3), tiny_vlms.make_batch("gemma3")
    other.set_attn_implementation("vgpo")
    expected = recorded(model, batch, "all"), recorded(other, other_batch, "all")
    with torch.no_grad(), record_visual_attention(model, "all") as one, record_visual_attention(other, "all") as two:
        model(**batch)
        other(**other_batch)
        assert torch.equal(one.mass, expected[0])
        assert torch.equal(two.mass, expected[1])
    unrecorded = tiny_vlms.make(FAMILY)
    unrecorded.set_attn_implementation("vgpo")
    with torch.no_grad(), record_visual_attention(model, "all") as one:
        model(**batch)
        unrecorded(**tiny_vlms.make_batch(FAMILY, words=9))
    assert torch.equal(one.mass, expected[0])


def test_exception_in_a_forward_or_the_body_leaves_nothing(model: Any, batch: dict[str, Any]) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("in the model")

    before = model(**batch).logits
    handle = model.model.language_model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(KeyError, match="in the model"), record_visual_attention(model):
        model(**batch)
    with record_visual_attention(model) as rec:
        with pytest.raises(KeyError, match="in the model"):
            model(**batch)
        handle.remove()
        with pytest.raises(RuntimeError, match="nothing has been recorded"):
            _ = rec.mass
        model(**batch)
    assert torch.equal(rec.mass, recorded(model, batch))
    with pytest.raises(KeyError, match="in the body"), record_visual_attention(model):
        raise KeyError("in the body")
    assert torch.equal(model(**batch).logits, before)


def test_interrupted_forward_is_not_taken_for_the_outermost_one(model: Any, batch: dict[str, Any]) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.language_model.layers[1].mlp.register_forward_hook(interrupt)
    with torch.no_grad(), record_visual_attention(model) as rec:
        with pytest.raises(KeyboardInterrupt):
            model(**batch)
        handle.remove()
        model(**batch)
    assert torch.equal(rec.mass, recorded(model, batch))


def test_wrapped_models_and_calls_of_inner_ones(model: Any, batch: dict[str, Any]) -> None:
    expected = recorded(model, batch, "all")
    assert torch.equal(recorded(Wrapper(Wrapper(model)), batch, "all"), expected)
    assert torch.equal(recorded(model.model, batch, "all"), expected)
    with torch.no_grad(), record_visual_attention(model, "all") as rec:
        model.model(**batch)
    assert torch.equal(rec.mass, expected)


def test_arguments_by_position(model: Any, batch: dict[str, Any]) -> None:
    options = {"layers": "all", "segments": "image/query/generated", "columns": True}
    rest = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    ids = batch["input_ids"]
    batch["attention_mask"][0, -2:] = 0  # padding behind a picture, which its queries see
    with torch.no_grad():
        with record_visual_attention(model, **options) as expected:
            model(**batch)
        with record_visual_attention(model, **options) as rec:
            model(ids, batch["attention_mask"], **rest)
            assert torch.equal(rec.mass, expected.mass)
            assert torch.equal(rec.columns, expected.columns)
            message = r"was given pixel_values but no visual token"
            with pytest.raises(ValueError, match=message):
                model(
                    ids.clamp(max=89), batch["attention_mask"], None, None, None, None, None, rest.pop("pixel_values"),
                    **rest,
                )  # fmt: skip


@pytest.mark.parametrize("generic", [False, True], ids=["4-D", "dict"])
def test_columns_want_to_know_the_padding(model: Any, batch: dict[str, Any], generic: bool) -> None:
    mask = torch.ones(3, 1, 25, 25, dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None, None]
    given = {"full_attention": mask, "sliding_attention": mask} if generic else mask
    shape = "dict" if generic else r"\(3, 1, 25, 25\)"
    message = rf"attention_mask: expected \(B, T\) with columns=True, .*, got {shape}"
    with pytest.raises(ValueError, match=message):
        recorded(model, {**batch, "attention_mask": given}, columns=True)


def test_mask_prepared_by_the_caller(model: Any, batch: dict[str, Any]) -> None:
    """It never meets the mask function, so the layer finds out by itself."""
    real = batch["attention_mask"].bool()
    expected = recorded(model, batch, [1], columns=True)
    causal = torch.ones(25, 25, dtype=torch.bool).tril() & real[:, None]
    window = torch.arange(25)[:, None] - torch.arange(25) < 7
    masks = {"full_attention": causal[:, None], "sliding_attention": (causal & window)[:, None]}
    positions = model.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )[0]
    prepared = {**batch, "attention_mask": masks, "position_ids": positions}
    got = recorded(model, prepared, [1])
    assert_close(got * real[..., None], expected * real[..., None])


@pytest.mark.parametrize("holes", [False, True])
def test_mask_that_was_copied_on_the_way(model: Any, batch: dict[str, Any], holes: bool) -> None:
    """As by layers on devices of their own; layer 0 is not recorded and attends with sdpa."""

    def copy(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"].clone()}

    if holes:
        batch["attention_mask"][0, 18] = 0
    expected = recorded(model, batch, [1, 2], columns=True)
    layers = model.model.language_model.layers
    handles = [layer.register_forward_pre_hook(copy, with_kwargs=True) for layer in layers]
    got = recorded(model, batch, [1, 2], columns=True)
    for handle in handles:
        handle.remove()
    assert torch.equal(got, expected)


def test_compiled_layer(model: Any, batch: dict[str, Any]) -> None:
    """One graph without a recorder; a later recorder records."""
    attention = model.model.language_model.layers[2].self_attn
    with torch.no_grad():
        plain, mass = model(**batch).logits, recorded(model, batch)
        attention.compile(backend="eager", fullgraph=True)
        assert torch.equal(model(**batch).logits, plain)
        attention.compile(backend="eager")
        assert torch.equal(model(**batch).logits, plain)
        assert torch.equal(recorded(model, batch), mass)
        assert torch.equal(model(**batch).logits, plain)
    torch._dynamo.reset()


def test_packed_rows(model: Any, batch: dict[str, Any]) -> None:
    """Two sequences in one row, told apart by their positions alone, attend within themselves."""
    model = tiny_vlms.make("internvl")
    model.set_attn_implementation("vgpo")
    batch = tiny_vlms.make_batch("internvl")
    row = batch["input_ids"][:1]
    length = row.shape[1]
    pixels = batch["pixel_values"][:2]
    alone = recorded(model, {"input_ids": row, "pixel_values": pixels}, "all")
    packed = {"input_ids": row.repeat(1, 2), "pixel_values": pixels.repeat(2, 1, 1, 1), "use_cache": False}
    packed["position_ids"] = torch.arange(length).repeat(2)[None]
    assert_close(recorded(model, packed, "all"), alone.repeat(1, 1, 2, 1))


def test_text_without_pictures_looks_at_none(model: Any) -> None:
    ids = torch.randint(1, 90, (2, 6))
    with torch.no_grad(), record_visual_attention(model, columns=True) as rec:
        model(input_ids=ids)
    assert torch.equal(rec.mass, torch.zeros(1, 2, 6, 1))
    assert rec.columns.shape == (1, 2, 0)
    assert rec.visual_positions.shape == (2, 0)


def test_focus_is_the_mean_of_layers_and_heads(model: Any, batch: dict[str, Any]) -> None:
    mask = torch.ones(3, 5)
    mask[1, 2:] = 0
    with (
        torch.no_grad(),
        record_visual_attention(model, "all", "image/query/generated", "all", prompt_length=20) as rec,
    ):
        model(**batch)
    focus = focus_from_attention(rec, mask)
    assert focus.dtype == torch.float32
    assert_close(focus, rec.mass[..., 0].mean(dim=(0, 2)) * mask)
    assert_close(focus_from_attention(rec, mask.bool()), focus)
    with pytest.raises(
        ValueError, match=r"one column for each of the 5 recorded tokens, got 6; .*queries='predicting'"
    ):
        focus_from_attention(rec, torch.ones(3, 6))
    with pytest.raises(ValueError, match=r"completion_mask: expected shape \(3, T\)"):
        focus_from_attention(rec, torch.ones(2, 5))


def test_focus_of_a_broken_record(model: Any, batch: dict[str, Any]) -> None:
    """NaN outside the mask does not raise."""
    with torch.no_grad(), record_visual_attention(model, "all", prompt_length=20) as rec:
        model(**batch)
    mask = torch.ones(3, 5)
    mask[1, 2:] = 0
    good = focus_from_attention(rec, mask)
    step = rec._sequence.steps[0]
    step.masses[1][1, 3] = torch.nan
    assert torch.equal(focus_from_attention(rec, mask), good)
    step.masses[1][2, 4] = torch.nan
    with pytest.raises(ValueError, match=r"rec\.mass: expected numbers .* got NaN in row 2, token 4"):
        focus_from_attention(rec, mask)


class TestErrors:
    def test_model_set_to_another_attention(self, model: Any, batch: dict[str, Any]) -> None:
        model.set_attn_implementation("sdpa")
        message = r"ran with attn_implementation='sdpa'.*set_attn_implementation\(\{'text_config': 'vgpo'\}\)"
        with pytest.raises(RuntimeError, match=message), record_visual_attention(model):
            model(**batch)

    def test_model_that_bypasses_theattention_function(
        self, model: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for layer in model.model.language_model.layers:
            monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
        with pytest.raises(RuntimeError, match="set to 'vgpo' but none of its layers called it: it bypasses"):
            recorded(model, batch)

    def test_layer_that_bypasses_theattention_function(
        self, model: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attention = model.model.language_model.layers[2].self_attn
        monkeypatch.setattr(attention, "forward", lambda hidden_states, **_: (hidden_states, None))
        with pytest.raises(
            RuntimeError, match=r"layers \[2\] of .* have no attention to record; those that have: \[0, 1\]"
        ):
            recorded(model, batch)

    def test_no_input_ids(self, model: Any, batch: dict[str, Any]) -> None:
        embeds = model.get_input_embeddings()(batch["input_ids"])
        with pytest.raises(ValueError, match="was called without input_ids"):
            recorded(model, {"inputs_embeds": embeds})

    def test_pictures_without_tokens(self, model: Any, batch: dict[str, Any]) -> None:
        ids = batch["input_ids"].clamp(max=89)
        with pytest.raises(
            ValueError, match=r"was given pixel_values but no visual token \(id \[95, 96\]\) in input_ids"
        ):
            recorded(model, {**batch, "input_ids": ids})

    def test_model_without_pictures(self) -> None:
        text = Qwen2ForCausalLM(Qwen2Config(**tiny_vlms.TEXT))
        with (
            pytest.raises(ValueError, match="Qwen2ForCausalLM: expected a configuration that names the image token"),
            record_visual_attention(text),
        ):
            pass

    def test_no_model_of_transformers(self) -> None:
        with (
            pytest.raises(TypeError, match="model: expected a transformers model, wrapped or not, got Linear"),
            record_visual_attention(nn.Linear(1, 1)),
        ):
            pass

    def test_pictures_by_cross_attention(self, model: Any) -> None:
        class TextCrossAttention(nn.Module):
            pass

        model.model.language_model.layers[0].crossing = TextCrossAttention()
        with pytest.raises(ValueError, match="through cross-attention"), record_visual_attention(model):
            pass

    def test_dropout_while_recording(self, model: Any, batch: dict[str, Any]) -> None:
        model.train()
        for layer in model.model.language_model.layers:
            layer.self_attn.attention_dropout = 0.1
        model(**batch)  # sdpa knows dropout
        message = r"Qwen2_5_VLAttention of layer 2: .* cannot take attention dropout 0\.1"
        with pytest.raises(ValueError, match=message):
            recorded(model, batch)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"layers": "first"}, ValueError, "layers: expected 'last', 'all' or a list of layer indices, got 'first'"),
            ({"layers": 1}, TypeError, "layers: expected 'last', 'all' or a list of layer indices, got 1"),
            ({"layers": [3]}, ValueError, r"layers: expected indices of layers with attention, \[0, 1, 2\], got 3"),
            ({"layers": [0.5]}, TypeError, "layers: expected integers, got 0.5"),
            ({"layers": [1, -2]}, ValueError, "layers: expected each layer once, got -2 again"),
            ({"layers": []}, ValueError, "layers: expected at least one layer, got none"),
            ({"segments": "images"}, ValueError, "segments: expected one of 'visual', 'image/query/generated'"),
            ({"heads": "each"}, ValueError, "heads: expected one of 'mean', 'all', got 'each'"),
            ({"queries": "next"}, ValueError, "queries: expected one of 'token', 'predicting', got 'next'"),
            ({"prompt_length": 1.5}, TypeError, "prompt_length: expected an int or None, got 1.5"),
            ({"columns": "no"}, TypeError, "columns: expected a bool, got 'no'"),
            ({"prompt_length": 0}, ValueError, "prompt_length: expected at least 1, got 0"),
        ],
    )
    def test_arguments(self, model: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message), record_visual_attention(model, **options):
            pass

    @pytest.mark.parametrize("prompt_length", [25, 1000], ids=["no completion", "beyond the sequence"])
    @pytest.mark.parametrize("queries", ["token", "predicting"])
    def test_prompt_as_long_as_the_sequence(
        self, model: Any, batch: dict[str, Any], prompt_length: int, queries: str
    ) -> None:
        options = {"columns": True, "prompt_length": prompt_length, "queries": queries}
        with torch.no_grad(), record_visual_attention(model, **options) as rec:
            model(**batch)
        message = f"prompt_length: expected less than the sequence's 25 tokens, got {prompt_length}"
        for read in (lambda: rec.mass, lambda: rec.columns, lambda: rec.visual_positions, lambda: rec.heatmap(0)):
            with pytest.raises(ValueError, match=message):
                read()

    def test_predicting_without_completion(self, model: Any, batch: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="queries='predicting': expected a completion"):
            recorded(model, batch, queries="predicting")

    def test_columns_that_were_not_asked_for(self, model: Any, batch: dict[str, Any]) -> None:
        with torch.no_grad(), record_visual_attention(model) as rec:
            model(**batch)
        for read in (lambda: rec.columns, lambda: rec.visual_positions, lambda: rec.heatmap(0)):
            with pytest.raises(ValueError, match="columns: expected a recorder with columns=True"):
                read()
