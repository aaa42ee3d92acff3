"""Recording across forwards that continue a KV cache: caches of all kinds, other decoding, loops of one's own."""

from typing import Any

import pytest
import tiny_vlms
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Cache, DynamicCache, GenerationConfig, StaticCache

from vgpo_kernels.integrations.transformers import Recorder, focus_from_attention, record_visual_attention, sequence

GREEDY = {"max_new_tokens": 7, "do_sample": False, "suppress_tokens": tiny_vlms.NOT_WORDS}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "gemma3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> Any:
    model = tiny_vlms.make(family)
    model.set_attn_implementation("vgpo")
    return model


def generate(model: Any, batch: dict[str, Any], queries: str, **options: Any) -> tuple[Tensor, Recorder]:
    with record_visual_attention(model, "all", "image/query/generated", "all", columns=True, queries=queries) as rec:
        sequences = model.generate(**batch, **{**GREEDY, **options})
    return sequences, rec


def over_the_whole(
    model: Any, family: str, batch: dict[str, Any], completion: Tensor, queries: str, mask: Tensor | None = None
) -> Recorder:
    """Records one forward over the whole, which test_transformers_recorded_mass compares with eager maps."""
    whole = tiny_vlms.continued(family, batch, completion, mask)
    with (
        torch.no_grad(),
        record_visual_attention(
            model, "all", "image/query/generated", "all", columns=True, queries=queries,
            prompt_length=batch["input_ids"].shape[1],
        ) as rec,
    ):  # fmt: skip
        model(**whole)
    return rec


@pytest.mark.parametrize("queries", ["token", "predicting"])
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"return_dict_in_generate": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_generate(model: Any, family: str, queries: str, options: dict[str, Any]) -> None:
    batch = tiny_vlms.make_batch(family)
    prompt = batch["input_ids"].shape[1]
    result, rec = generate(model, batch, queries, **options)
    sequences = getattr(result, "sequences", result)
    # "token" has one token less, since the last one sampled is never run.
    count = 7 - (queries == "token")
    expected = over_the_whole(model, family, batch, sequences[:, prompt : prompt + count], queries)
    assert_close(rec.mass, expected.mass)
    assert_close(rec.columns, expected.columns)
    assert torch.equal(rec.visual_positions, expected.visual_positions)


@pytest.mark.parametrize("queries", ["token", "predicting"])
def test_prompt_in_pieces(queries: str) -> None:
    """Models take their pictures with the first piece, so there are none here."""
    model, batch = tiny_vlms.make("gemma3"), tiny_vlms.make_batch("gemma3")
    model.set_attn_implementation("vgpo")
    batch = {"input_ids": batch["input_ids"].clamp(max=89), "attention_mask": batch["attention_mask"]}
    sequences, rec = generate(model, batch, queries, prefill_chunk_size=7)
    count = 7 - (queries == "token")
    expected = over_the_whole(model, "internvl", batch, sequences[:, 25 : 25 + count], queries)
    assert_close(rec.mass, expected.mass)
    assert rec.columns.shape == expected.columns.shape == (3, 3, 4, 0)


@pytest.mark.parametrize("cache", [None, "static"])
def test_layers_that_drop_all_queries_but_the_last(cache: str | None) -> None:
    model = tiny_vlms.make_shared_keys()
    ids = torch.randint(1, 90, (2, 9))
    ids[0, 1:5] = tiny_vlms.IMAGE
    options = {**GREEDY, "cache_implementation": cache, "output_logits": True, "return_dict_in_generate": True}
    results = {}
    for attention in ("eager", "vgpo"):
        model.set_attn_implementation(attention)
        results[attention] = model.generate(ids, **options)
    assert_close(results["vgpo"].logits, results["eager"].logits)
    with record_visual_attention(model, "all", heads="all", queries="predicting") as rec:
        recorded = model.generate(ids, **options)
    assert_close(recorded.logits, results["eager"].logits)
    with record_visual_attention(model, "last", queries="predicting") as last:
        model.generate(ids, **options)
    whole = recorded.sequences
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(whole, output_attentions=True).attentions)[..., 8:-1, :]
    expected = (maps * (whole == tiny_vlms.IMAGE)[:, None, None]).sum(-1, keepdim=True)
    assert_close(rec.mass, expected)
    assert_close(last.mass, expected[-1:].mean(2))


def test_rows_that_end_early(model: Any, family: str) -> None:
    """Columns of a row do not depend on how long others go on."""
    batch = tiny_vlms.make_batch(family)
    prompt = batch["input_ids"].shape[1]
    free, _ = generate(model, batch, "predicting")
    end = int(free[0, prompt + 3])
    sequences, rec = generate(model, batch, "predicting", eos_token_id=end)
    completion = sequences[:, prompt:]
    ended = ((completion == end).cumsum(1) - (completion == end).int()) > 0
    assert ended[0].any()
    real = ~ended
    expected = over_the_whole(model, family, batch, completion, "predicting", real.long())
    assert_close(rec.columns[:, 0], expected.columns[:, 0])
    focus, wanted = focus_from_attention(rec, real), focus_from_attention(expected, real)
    assert_close(focus, wanted)


def test_several_samples_of_a_prompt(model: Any, family: str) -> None:
    # A row of one picture: older transformers deal the pictures of several out in another order.
    batch = {name: value[2:] for name, value in tiny_vlms.make_batch(family).items()}
    batch["pixel_values"] = batch["pixel_values"][-16 if "image_grid_thw" in batch else -1 :]
    prompt = batch["input_ids"].shape[1]
    sequences, rec = generate(model, batch, "predicting", do_sample=True, num_return_sequences=3)
    assert rec.mass.shape[1] == 3
    repeated = {name: torch.cat([value] * 3) for name, value in batch.items()}
    expected = over_the_whole(model, family, repeated, sequences[:, prompt:], "predicting")
    assert_close(rec.mass, expected.mass)
    assert_close(rec.columns, expected.columns)


def test_assisted_decoding_forgets_refused_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []
    real = sequence.SequenceRecord._truncate

    def spy(self: Any, length: int) -> None:
        refused.append(self.tokens.length - length)
        real(self, length)

    monkeypatch.setattr(sequence.SequenceRecord, "_truncate", spy)
    family = "internvl"
    model, batch = tiny_vlms.make(family), tiny_vlms.make_batch(family)
    model.set_attn_implementation("vgpo")
    row = {name: value[:1] for name, value in batch.items()}
    row["pixel_values"] = batch["pixel_values"][:2]
    # Words said again, so that candidates for what follows are looked up.
    row["input_ids"][0, -4:] = row["input_ids"][0, -8:-4]
    prompt = row["input_ids"].shape[1]
    options = {**GREEDY, "max_new_tokens": 20, "prompt_lookup_num_tokens": 3}
    with record_visual_attention(model, "all", queries="predicting") as rec:
        sequences = model.generate(**row, **options)
    assert any(count > 0 for count in refused)
    expected = over_the_whole(model, family, row, sequences[:, prompt:], "predicting")
    assert_close(rec.mass, expected.mass[..., :1].mean(2))
    with (
        pytest.raises(ValueError, match="columns: expected generation without rejected tokens, got assisted decoding"),
        record_visual_attention(model, columns=True),
    ):
        model.generate(**row, **options)


# The Qwen families leave positions after a prompt to generate.
@pytest.mark.parametrize("family", ["gemma3", "internvl"])
@pytest.mark.parametrize("queries", ["token", "predicting"])
@pytest.mark.parametrize("known", [False, True], ids=["", "prompt_length"])
def test_loop_of_ones_own(family: str, queries: str, known: bool) -> None:
    model = tiny_vlms.make(family)
    model.set_attn_implementation("vgpo")
    batch = tiny_vlms.make_batch(family)
    prompt = batch["input_ids"].shape[1]
    options = {"queries": queries, "prompt_length": prompt if known else None, "columns": known}
    completion = []
    with torch.no_grad(), record_visual_attention(model, "all", "image/query/generated", "all", **options) as rec:
        output = model(**batch, use_cache=True)
        mask = batch["attention_mask"]
        for _ in range(4):
            output.logits[..., tiny_vlms.NOT_WORDS] = -torch.inf
            token = output.logits[:, -1:].argmax(-1)
            completion.append(token)
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            output = model(input_ids=token, attention_mask=mask, past_key_values=output.past_key_values)
    expected = over_the_whole(model, family, batch, torch.cat(completion, 1), queries)
    # The last query produces a token that has not been sampled yet.
    last = slice(None, 4)
    assert rec.mass.shape[-2] == 4 + (queries == "predicting")
    assert_close(rec.mass[..., last, :], expected.mass)
    if known and queries == "token":
        assert_close(rec.columns, expected.columns)


def test_generate_with_a_cache_that_holds_earlier_turns(model: Any, family: str) -> None:
    batch = tiny_vlms.make_batch(family)
    prompt = batch["input_ids"].shape[1]
    # Where generate puts tokens after padding; a plain forward would count the padding, too.
    mask = batch["attention_mask"]
    positions = {} if family == "qwen2_5_vl" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        cache = model(**batch, **positions, use_cache=True).past_key_values
    turn = tiny_vlms.continued(family, batch, torch.randint(1, 90, (3, 4)))
    again = {name: turn[name] for name in ("input_ids", "attention_mask")}
    sequences, rec = generate(model, again, "predicting", past_key_values=cache)
    expected = over_the_whole(model, family, turn, sequences[:, prompt + 4 :], "predicting")
    assert_close(rec.mass, expected.mass)
    assert_close(rec.columns, expected.columns)


def test_cache_of_another_batch(model: Any, family: str) -> None:
    """Its tokens are not those of the forward before, though as many."""
    batch, other = tiny_vlms.make_batch(family), tiny_vlms.make_batch(family, seed=7)
    token = batch["input_ids"][:, -1:]
    mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], dim=1)
    message = "past_key_values: expected the cache of the forward before, got another one, of 25 tokens"
    for options in ({"use_cache": True}, {"use_cache": False}):
        with torch.no_grad(), record_visual_attention(model, "all"):
            cache = model(**batch, use_cache=True).past_key_values
            model(**other, **options)
            with pytest.raises(ValueError, match=message):
                model(input_ids=token, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("kind", ["given", "static", "returned as a tuple"])
def test_caches_that_are_continued(kind: str) -> None:
    model, batch = tiny_vlms.make("gemma3"), tiny_vlms.make_batch("gemma3")
    model.set_attn_implementation("vgpo")
    token = batch["input_ids"][:, -1:]
    mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], dim=1)
    text = model.config.get_text_config()
    cache = {"given": DynamicCache(config=text), "static": StaticCache(text, max_cache_len=40)}.get(kind)
    with torch.no_grad(), record_visual_attention(model, "all", prompt_length=25) as rec:
        output = model(**batch, use_cache=True, past_key_values=cache, return_dict=cache is not None)
        cache = cache or next(value for value in output if isinstance(value, Cache))
        model(input_ids=token, attention_mask=mask, past_key_values=cache)
        assert rec.mass.shape == (3, 3, 1, 1)


def test_exception_in_generate_leaves_nothing(model: Any, family: str) -> None:
    batch = tiny_vlms.make_batch(family)

    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 28:
            raise KeyError("in a processor")
        return scores

    with record_visual_attention(model) as rec:
        model.generate(**batch, **GREEDY)
        with pytest.raises(KeyError, match="in a processor"):
            model.generate(**batch, **GREEDY, logits_processor=[fail])
        with pytest.raises(RuntimeError, match="nothing has been recorded"):
            _ = rec.mass
        model.generate(**batch, **GREEDY)
        with pytest.raises(ValueError, match="num_beams"):
            model.generate(**batch, **GREEDY, num_beams=2)
    with pytest.raises(RuntimeError, match="nothing has been recorded"):
        _ = rec.mass


def test_cache_longer_than_the_prompt(model: Any, family: str) -> None:
    """As a model may bring one of its own."""
    batch = tiny_vlms.make_batch(family)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values

    def swap(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
        # Named `cache` from transformers 5.24 on.
        return args, {**kwargs, "cache" if "cache" in kwargs else "past_key_values": cache}

    handle = model.register_forward_pre_hook(swap, with_kwargs=True)
    short = {name: batch[name][1:, :3] for name in ("input_ids", "attention_mask")}
    message = "past_key_values: expected a cache of at most the prompt's 3 tokens where generate begins, got one of 25"
    with pytest.raises(ValueError, match=message), record_visual_attention(model):
        model.generate(**short, **GREEDY)
    handle.remove()


def test_single_new_token_has_no_query_of_its_own(model: Any, family: str) -> None:
    batch = tiny_vlms.make_batch(family)
    _, rec = generate(model, batch, "token", max_new_tokens=1)
    assert rec.mass.shape == (3, 3, 4, 0, 3)
    assert not rec.columns.any()
    with pytest.raises(
        ValueError, match=r"each of the 0 recorded tokens, got 1; under generate .* queries='predicting'"
    ):
        focus_from_attention(rec, torch.ones(3, 1))


def test_what_cannot_be_followed(model: Any, family: str) -> None:
    batch = tiny_vlms.make_batch(family)
    with pytest.raises(ValueError, match="num_beams: expected 1 while visual attention is recorded"):
        generate(model, batch, "token", num_beams=2)
    for options in ({"guidance_scale": 1.5}, {"generation_config": GenerationConfig(guidance_scale=1.5)}):
        with pytest.raises(ValueError, match=r"guidance_scale: expected 1 or None while .* is recorded .*, got 1\.5"):
            generate(model, batch, "token", **options)
    generate(model, batch, "token", guidance_scale=1.0)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match=r"generate: expected input_ids \(B, L\)"), record_visual_attention(model):
        model.generate(inputs_embeds=embeds, max_new_tokens=1)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        token = batch["input_ids"][:, -1:]
        mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], dim=1)
        with (
            pytest.raises(ValueError, match="continues a cache of 25 tokens that were not recorded"),
            record_visual_attention(model),
        ):
            model(input_ids=token, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"columns": True},
            "prompt_length: expected a number where a KV cache is continued with columns=True, got None",
        ),
        ({"queries": "predicting", "prompt_length": 20}, "expected a first forward of the prompt alone"),
    ],
)
def test_loops_that_cannot_be_followed(model: Any, family: str, options: dict[str, Any], message: str) -> None:
    batch = tiny_vlms.make_batch(family)
    token = batch["input_ids"][:, -1:]
    mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], dim=1)
    with torch.no_grad(), record_visual_attention(model, **options):
        cache = model(**batch, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=message):
            model(input_ids=token, attention_mask=mask, past_key_values=cache)


def test_generate_is_not_compiled_while_recorded(model: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps would bypass the recorder."""
    seen = []
    real = type(model).generate

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("disable_compile"))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", spy)
    batch = tiny_vlms.make_batch(family)
    generate(model, batch, "token")
    model.generate(**batch, **GREEDY)
    assert seen == [True, None]
