"""The policy's forward on a real tiny Qwen2.5-VL: inputs, log-probabilities, focus, the dummy."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from train_tools import PlainEngine, collator, eager_attention, logprobs, mixed_samples, no_head, random_completions
from transformers import Idefics3Config, Qwen2Config, Qwen2ForCausalLM

from vgpo_kernels.integrations.transformers import focus_from_attention, record_visual_attention
from vgpo_train.config import ConfigError, FocusConfig, ModelConfig, OptimConfig, RolloutConfig, TrainConfig
from vgpo_train.data import PromptBatch, dummy_prompt
from vgpo_train.model import load_model
from vgpo_train.rl import scoring
from vgpo_train.rl.scoring import Scorer, check_head, check_pictures, check_recordable, focus_of, model_inputs
from vgpo_train.rl.types import Batch, Completions, Scores


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> PlainEngine:
    return PlainEngine(load_model(tiny_checkpoint, dtype=torch.float32, attn_implementation="vgpo"))


@pytest.fixture(scope="module")
def eager(tiny_checkpoint: Path) -> PlainEngine:
    """The same policy with attention maps."""
    return PlainEngine(load_model(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager"))


@pytest.fixture(scope="module")
def prompts(tiny_checkpoint: Path, pictures: Path) -> PromptBatch:
    # One picture, none, two: three prompt lengths.
    return collator(tiny_checkpoint)(mixed_samples(pictures, "ptd"))


@pytest.fixture
def completions() -> Completions:
    return random_completions([7, 1, 4])


def _row(completions: Completions, row: int) -> Completions:
    length = int(completions.mask[row].sum())
    return Completions(completions.ids[[row], :length], completions.mask[[row], :length])


def _score(
    engine: PlainEngine,
    prompts: PromptBatch,
    completions: Completions,
    *,
    per_image: bool = False,
    layers: str | list[int] | None = "last",
    reference: PlainEngine | None = None,
) -> Scores:
    config = TrainConfig(rollout=RolloutConfig(temperature=0.7), focus=FocusConfig(per_image=per_image))
    if layers is None:
        config.model.attn_implementation = "sdpa"
    else:
        config.focus.layers = layers
    dummy = prompts.take([0])  # of a picture
    return Scorer(config, engine, reference, dummy, wants_focus=True).forward(Batch(prompts, completions))


def test_inputs_keep_token_types_and_leave_vision_inputs_alone(prompts: PromptBatch, completions: Completions) -> None:
    before = prompts.tensors()
    width = before["input_ids"].shape[1]
    inputs = model_inputs(before, completions)
    assert set(inputs) == set(before)
    assert "mm_token_type_ids" in before
    for name, tail in (
        ("input_ids", completions.ids),
        ("attention_mask", completions.mask.long()),
        ("mm_token_type_ids", torch.zeros_like(completions.ids)),
    ):
        assert torch.equal(inputs[name], torch.cat([before[name], tail], dim=1))
    assert inputs["mm_token_type_ids"][:, :width].any(), "the pictures' token types must survive"
    for name in ("pixel_values", "image_grid_thw"):
        assert inputs[name] is before[name]


def test_a_vision_input_of_the_prompts_shape_is_not_extended(completions: Completions) -> None:
    # Three rows of five tokens, and by chance a (3, 5) floating vision input.
    inputs = {"input_ids": torch.ones(3, 5, dtype=torch.long), "pixel_values": torch.ones(3, 5)}
    assert model_inputs(inputs, completions)["pixel_values"].shape == (3, 5)


def test_dropping_token_types_would_change_log_probabilities(
    engine: PlainEngine, prompts: PromptBatch, completions: Completions
) -> None:
    # Without them the tower's patches get text positions (or the model refuses): what the first test guards.
    inputs = prompts.take([0]).tensors()
    own = _row(completions, 0)
    right = logprobs(engine, inputs, own, 1.0).logps
    del inputs["mm_token_type_ids"]
    try:
        wrong = logprobs(engine, inputs, own, 1.0).logps
    except (ValueError, TypeError):
        return
    assert not torch.allclose(right, wrong, atol=1e-3)


def test_log_probabilities_are_those_of_each_token_given_all_before(
    engine: PlainEngine, prompts: PromptBatch, completions: Completions
) -> None:
    logps = logprobs(engine, prompts.tensors(), completions, 0.7).logps
    for row in range(3):
        own = _row(completions, row)
        inputs = model_inputs(prompts.take([row]).tensors(), own)
        length = own.ids.shape[1]
        logits = engine.module(**inputs).logits[0, -length - 1 : -1].double() / 0.7
        expected = torch.log_softmax(logits, -1)[torch.arange(length), own.ids[0]]
        assert logps.dtype == torch.float32
        # Attention over a padded row adds in another order.
        torch.testing.assert_close(logps[row, :length].double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("per_image", [False, True])
def test_left_padding_changes_neither_log_probabilities_nor_focus(
    engine: PlainEngine, prompts: PromptBatch, completions: Completions, per_image: bool
) -> None:
    assert len(set(prompts.prompt_lengths)) == 3, "rows of one length would not be padded"
    together = _score(engine, prompts, completions, per_image=per_image)
    assert together.has_visual.tolist() == [True, False, True]
    for row in range(3):
        own = _row(completions, row)
        length = own.ids.shape[1]
        alone = _score(engine, prompts.take([row]), own, per_image=per_image)
        torch.testing.assert_close(together.old_logps[row, :length], alone.old_logps[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(
            together.focus_similarity[row, :length], alone.focus_similarity[0], atol=2e-6, rtol=0
        )
        assert not together.focus_similarity[row, length:].any()
    assert not together.focus_similarity[1].any(), "a row without a picture has no focus"
    assert together.focus_similarity[0].abs().min() > 0
    assert not together.attention[1, :, 0].any(), "a row without a picture looks at none"


@pytest.mark.parametrize(("layers", "chosen"), [("last", [1]), ("all", [0, 1]), ([0], [0]), ([-1, 0], [0, 1])], ids=str)
def test_attention_is_that_of_an_eager_forward(
    engine: PlainEngine,
    eager: PlainEngine,
    prompts: PromptBatch,
    completions: Completions,
    layers: str | list[int],
    chosen: list[int],
) -> None:
    found = _score(engine, prompts, completions, layers=layers).attention
    expected = eager_attention(eager.module, prompts.tensors(), completions, chosen)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), atol=2e-6, rtol=0)
    valid = completions.mask
    assert (found[valid].sum(-1) - 1).abs().max() < 2e-6, "each key is in one segment"
    assert found[0, :, 0].min() > 0
    assert not found[~valid].any()


def test_attention_gives_the_focus_of_the_drop_in(
    engine: PlainEngine, prompts: PromptBatch, completions: Completions
) -> None:
    inputs = prompts.tensors()
    with record_visual_attention(engine.module, layers="all", prompt_length=inputs["input_ids"].shape[1]) as record:
        engine(**model_inputs(inputs, completions))
    scores = _score(engine, prompts, completions, layers="all")
    focus = focus_of("attention", scores.focus_similarity, scores.attention)
    torch.testing.assert_close(focus, focus_from_attention(record, completions.mask), atol=1e-7, rtol=0)
    assert focus_of("similarity", scores.focus_similarity, scores.attention) is scores.focus_similarity
    assert focus_of("attention", scores.focus_similarity, None) is None


def test_recording_changes_no_other_score_and_ends_with_the_pass(
    engine: PlainEngine, eager: PlainEngine, prompts: PromptBatch, completions: Completions
) -> None:
    # The eager reference model would refuse to be recorded.
    recorded = _score(engine, prompts, completions, reference=eager)
    plain = _score(engine, prompts, completions, layers=None, reference=eager)
    assert plain.attention is None
    for name in ("old_logps", "focus_similarity"):
        torch.testing.assert_close(getattr(recorded, name), getattr(plain, name), atol=2e-5, rtol=0)
    assert torch.equal(recorded.ref_logps, plain.ref_logps)
    assert not any(module._forward_pre_hooks for module in engine.module.modules())


def test_a_micro_batch_split_changes_no_score(
    engine: PlainEngine, prompts: PromptBatch, completions: Completions, tiny_checkpoint: Path
) -> None:
    dummy = dummy_prompt(collator(tiny_checkpoint))

    def scores(size: int) -> Scores:
        # Rows by themselves: the one without a picture gets the dummy beside it.
        config = TrainConfig(optim=OptimConfig(micro_batch=size), rollout=RolloutConfig(temperature=0.7))
        return Scorer(config, engine, engine, dummy, wants_focus=True)(prompts, completions)

    whole = scores(3)
    for size in (1, 2):
        split = scores(size)
        for name in ("old_logps", "ref_logps", "entropy", "focus_similarity", "attention"):
            found, expected = getattr(split, name), getattr(whole, name)
            inside = completions.mask if expected.dim() == 2 else completions.mask[..., None]
            torch.testing.assert_close(found * inside, expected * inside, atol=2e-5, rtol=0, msg=f"{name} of {size}")
        assert torch.equal(split.has_visual, whole.has_visual)
    assert whole.attention.shape == (3, 7, 3)


@pytest.mark.parametrize(
    ("attn_implementation", "wants_focus", "similarity", "attention"),
    [("vgpo", True, True, True), ("sdpa", True, True, False), ("vgpo", False, False, False)],
)
def test_what_is_scored_follows_the_configuration(
    engine: PlainEngine,
    prompts: PromptBatch,
    completions: Completions,
    tiny_checkpoint: Path,
    attn_implementation: str,
    wants_focus: bool,
    similarity: bool,
    attention: bool,
) -> None:
    config = TrainConfig(model=ModelConfig(attn_implementation=attn_implementation))
    dummy = dummy_prompt(collator(tiny_checkpoint))
    scores = Scorer(config, engine, None, dummy, wants_focus=wants_focus)(prompts, completions)
    assert (scores.focus_similarity is not None, scores.attention is not None) == (similarity, attention)


def test_a_model_whose_attention_cannot_be_recorded_is_named(tiny_checkpoint: Path) -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text_alone = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2))
    message = "model.attn_implementation: 'vgpo' .*Qwen2ForCausalLM: .*image token.*; with sdpa"
    with pytest.raises(ConfigError, match=message):
        check_recordable(PlainEngine(text_alone), dummy_prompt(collator(tiny_checkpoint)), "last")


def test_attention_dropout_is_refused_before_the_first_rollout(tiny_checkpoint: Path) -> None:
    policy = PlainEngine(load_model(tiny_checkpoint, dtype=torch.float32, attn_implementation="vgpo"))
    dummy = dummy_prompt(collator(tiny_checkpoint))
    for module in policy.module.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    policy.eval()
    check_recordable(policy, dummy, "last")
    policy.train()
    with pytest.raises(ConfigError, match=r"'vgpo' records .* attention dropout 0.1; .*; with sdpa"):
        check_recordable(policy, dummy, "last")


def test_generating_leaves_no_trace_in_the_next_forward(
    engine: PlainEngine, prompts: PromptBatch, completions: Completions
) -> None:
    # Qwen2.5-VL remembers the position offsets of its last prefill.
    before = _score(engine, prompts, completions)
    inputs = prompts.take([2, 0, 1]).tensors()
    engine.module.generate(**inputs, max_new_tokens=3, do_sample=False)
    after = _score(engine, prompts, completions)
    assert torch.equal(before.old_logps, after.old_logps)
    assert torch.equal(before.focus_similarity, after.focus_similarity)
    assert torch.equal(before.attention, after.attention)


def test_the_dummy_changes_no_gradient(tiny_checkpoint: Path, pictures: Path) -> None:
    engine = PlainEngine(load_model(tiny_checkpoint, dtype=torch.float32))
    make = collator(tiny_checkpoint)
    prompts, completions = make(mixed_samples(pictures, "tt")), random_completions([5, 3])
    dummy = dummy_prompt(make)
    batch = Batch(prompts, completions).take([0, 1], dummy)
    assert batch.prompts.images_per_row == [0, 0, 1]
    assert batch.completions.mask.sum(1).tolist() == [5, 3, 0]

    def gradients(inputs, own: Completions) -> dict[str, torch.Tensor]:
        engine.module.zero_grad()
        logps = logprobs(engine, inputs, own, 1.0).logps
        logps.masked_fill(~own.mask, 0.0).sum().backward()
        return {name: p.grad for name, p in engine.module.named_parameters() if p.grad is not None}

    without = gradients(prompts.tensors(), completions)
    with_dummy = gradients(batch.prompts.tensors(), batch.completions)
    assert not any("visual" in name for name in without), "text alone does not reach the tower"
    assert any("visual" in name for name in with_dummy), "the dummy runs the tower forward and backward"
    for name, gradient in with_dummy.items():
        expected = without.get(name, torch.zeros_like(gradient))
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            gradient, expected, atol=1e-5 * scale, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


class Adapted(torch.nn.Module):
    """A head that is more than a linear layer."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.base(states) + 1.0


def test_an_unknown_head_is_named_before_the_first_rollout(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    model.lm_head = Adapted(model.lm_head)
    dummy = dummy_prompt(collator(tiny_checkpoint))
    message = r"model.path: Qwen2_5_VLForConditionalGeneration: expected a plain .*, got .*Adapted"
    with pytest.raises(ConfigError, match=message):
        Scorer(TrainConfig(), PlainEngine(model), None, dummy, wants_focus=False)


def test_scores_are_those_of_the_models_logits(
    engine: PlainEngine, prompts: PromptBatch, completions: Completions
) -> None:
    scores = _score(engine, prompts, completions, reference=engine)
    inputs = model_inputs(prompts.tensors(), completions)
    with torch.no_grad():
        logits = engine.module(**inputs).logits[:, -completions.ids.shape[1] - 1 : -1].double() / 0.7
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    logps = log_p.gather(-1, completions.ids[..., None])[..., 0]
    for found, expected in ((scores.old_logps, logps), (scores.ref_logps, logps), (scores.entropy, entropy)):
        torch.testing.assert_close(found.double(), expected * completions.mask, atol=2e-5, rtol=0)


def test_scoring_never_runs_the_head(engine: PlainEngine, prompts: PromptBatch, completions: Completions) -> None:
    scorer = Scorer(TrainConfig(), engine, engine, prompts, wants_focus=True)  # a check does
    with no_head(engine.module):
        assert scorer(prompts, completions).old_logps.any()
        with pytest.raises(AssertionError, match="the head's own forward"):
            engine(**prompts.tensors())


def test_pictures_that_cannot_be_told_apart_are_refused_before_the_first_rollout(
    engine: PlainEngine, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dummy = dummy_prompt(collator(tiny_checkpoint))
    config = TrainConfig(model=ModelConfig(attn_implementation="sdpa"), focus=FocusConfig(per_image=True))
    Scorer(config, engine, None, dummy, wants_focus=True)
    unknown = Idefics3Config(image_token_id=engine.module.config.image_token_id)
    unknown_family = SimpleNamespace(module=SimpleNamespace(config=unknown), device=engine.device)
    undescribed = SimpleNamespace(tensors=lambda device: {"input_ids": torch.ones(1, 2, dtype=torch.long)})  # noqa: ARG005
    message = "focus.per_image: where a picture of Idefics3Config ends is said neither .*; leave it out for one"
    with pytest.raises(ConfigError, match=message):
        check_pictures(unknown_family, undescribed)
    refused: list[object] = []
    monkeypatch.setattr(scoring, "check_pictures", lambda *given: refused.append(given))
    Scorer(config, engine, None, dummy, wants_focus=True)
    assert refused == [(engine, dummy)]


def test_hidden_states_that_cannot_be_had_are_refused_before_the_first_rollout(
    engine: PlainEngine, tiny_checkpoint: Path
) -> None:
    dummy = dummy_prompt(collator(tiny_checkpoint))
    decoder = engine.module.get_decoder()
    cut = decoder.register_forward_hook(
        lambda _module, _args, output: type(output)(last_hidden_state=output.last_hidden_state[:, -2:])
    )
    try:
        check_head(engine, dummy)
        with pytest.raises(ConfigError, match=r"model.path: .*expected a last_hidden_state of all \(1, \d+\) tokens"):
            check_head(engine, dummy, hidden_states=True)
    finally:
        cut.remove()
