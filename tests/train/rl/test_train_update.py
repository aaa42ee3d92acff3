"""Exact accumulation: micro-batches of ragged, partly text-only rows give the gradient of one big batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_tools import (
    PlainEngine,
    collator,
    dense_logps,
    mixed_samples,
    no_head,
    random_completions,
    weighted_batch,
)

from vgpo_kernels import PolicyLossConfig, policy_loss
from vgpo_train.data import dummy_prompt
from vgpo_train.model import load_model
from vgpo_train.rl.scoring import model_inputs
from vgpo_train.rl.types import Batch, Completions
from vgpo_train.rl.update import Update

LOSSES = {
    "grpo": PolicyLossConfig(loss_type="grpo"),
    "bnpo": PolicyLossConfig(loss_type="bnpo"),
    "dr_grpo": PolicyLossConfig(loss_type="dr_grpo", max_completion_length=9),
    "dapo": PolicyLossConfig(loss_type="dapo"),
    "cispo": PolicyLossConfig(loss_type="cispo", epsilon_high=5.0),
    "dapo with KL": PolicyLossConfig(loss_type="dapo", beta=0.1),
    "grpo by sequence": PolicyLossConfig(loss_type="grpo", importance_sampling_level="sequence"),
}
# Ragged: the longest completion, one of a single token, and one of none.
LENGTHS = [5, 1, 9, 0, 7, 3, 4]
ROWS = [0, 1, 2, 3, 4, 6]  # row 5 was filtered out


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> PlainEngine:
    return PlainEngine(load_model(tiny_checkpoint, dtype=torch.float32))


@pytest.fixture(scope="module")
def made(engine: PlainEngine, tiny_checkpoint: Path, pictures: Path) -> tuple[Batch, object]:
    make = collator(tiny_checkpoint)
    # The last micro-batch of two holds text alone, and so does the second one of three.
    prompts = make(mixed_samples(pictures, "pdptttt"))
    return weighted_batch(engine, prompts, random_completions(LENGTHS)), dummy_prompt(make)


def _gradients(engine: PlainEngine) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for _, p in engine.module.named_parameters()])


def _one_batch(engine: PlainEngine, made: Batch, config: PolicyLossConfig) -> tuple[torch.Tensor, float]:
    engine.module.zero_grad()
    own = Completions(made.completions.ids[ROWS], made.completions.mask[ROWS])
    output = policy_loss(
        dense_logps(engine, made.prompts.take(ROWS).tensors(), own, 0.8),
        made.old_logps[ROWS],
        made.advantages[ROWS],
        own.mask,
        ref_logps=made.ref_logps[ROWS],
        token_weights=made.token_weights[ROWS],
        trajectory_weights=made.trajectory_weights[ROWS],
        config=config,
    )
    output.loss.backward()
    return _gradients(engine), float(output.loss.detach())


@pytest.mark.usefixtures("lone_process")
# 1: a completion of no token stands alone; 2 and 4: the last micro-batch is text alone or partial; 6: one.
@pytest.mark.parametrize(
    ("loss", "micro_batch"),
    [*((loss, 2) for loss in LOSSES), *((loss, n) for loss in ("grpo", "bnpo", "dapo with KL") for n in (1, 4, 6))],
)
def test_micro_batches_add_up_to_one_batch(engine, made, loss: str, micro_batch: int) -> None:
    config = LOSSES[loss]
    rows, dummy = made
    expected, expected_loss = _one_batch(engine, rows, config)
    engine.module.zero_grad()
    engine.boundaries, steps = [], engine.steps
    update = Update(engine, config, dummy, micro_batch=micro_batch, temperature=0.8)
    metrics = update(rows, ROWS)
    assert (_gradients(engine) - expected).norm() < 1e-5 * expected.norm()
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-5)
    count = -(-len(ROWS) // micro_batch)
    assert engine.boundaries == [False] * (count - 1) + [True]
    assert engine.steps == steps + 1


@pytest.mark.usefixtures("lone_process")
def test_metrics_are_means_over_all_tokens(engine, made) -> None:
    rows, dummy = made
    config = LOSSES["dapo with KL"]
    parts = [Update(engine, config, dummy, micro_batch=n, temperature=0.8)(rows, ROWS) for n in (1, 6)]
    assert parts[0].keys() == parts[1].keys()
    for name in parts[0]:
        assert parts[0][name] == pytest.approx(parts[1][name], rel=1e-4, abs=1e-7), name
    assert parts[0]["kl"] > 0
    assert 0 < parts[0]["clip_fraction_low"] + parts[0]["clip_fraction_high"] < 0.5


@pytest.mark.usefixtures("lone_process")
def test_factors_of_none_are_ones(engine, made) -> None:
    rows, dummy = made
    update = Update(engine, LOSSES["dapo"], dummy, micro_batch=3, temperature=0.8)

    def gradients(**changes) -> torch.Tensor:
        engine.module.zero_grad()
        update(replace(rows, **changes), ROWS)
        return _gradients(engine)

    ones = gradients(token_weights=torch.ones(7, 9), trajectory_weights=torch.ones(7), ref_logps=None)
    assert torch.equal(ones, gradients(token_weights=None, trajectory_weights=None, ref_logps=None))


@pytest.mark.usefixtures("lone_process")
def test_updates_never_run_the_head(engine, made) -> None:
    rows, dummy = made
    engine.module.zero_grad()
    # Micro-batches of one: a row without a token, and rows of text alone, are among them.
    budget = 10_000_000  # bytes: a chunk of a few tokens
    update = Update(engine, LOSSES["dapo"], dummy, micro_batch=1, temperature=0.8, memory_budget=budget)
    with no_head(engine.module):
        assert update(rows, ROWS)["loss"] != 0
    assert _gradients(engine).any()


@pytest.mark.usefixtures("lone_process")
def test_the_entropy_is_the_mean_over_tokens(engine, made) -> None:
    rows, dummy = made
    own = Completions(rows.completions.ids[ROWS], rows.completions.mask[ROWS])
    with torch.no_grad():
        inputs = model_inputs(rows.prompts.take(ROWS).tensors(), own)
        logits = engine.module(**inputs).logits[:, -own.ids.shape[1] - 1 : -1] / 0.8
    expected = torch.distributions.Categorical(logits=logits).entropy()[own.mask].mean()
    metrics = Update(engine, LOSSES["dapo"], dummy, micro_batch=2, temperature=0.8)(rows, ROWS)
    assert metrics["entropy"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["entropy_proxy"] != pytest.approx(metrics["entropy"], rel=1e-3)


@pytest.mark.usefixtures("lone_process")
def test_an_update_without_a_token_is_none(engine, made) -> None:
    rows, dummy = made
    steps = engine.steps
    update = Update(engine, LOSSES["dapo"], dummy, micro_batch=2, temperature=0.8)
    assert update(rows, []) == {}
    assert update(rows, [3]) == {}, "row 3 has no token"
    assert engine.steps == steps


def test_a_micro_batch_without_rows_holds_the_dummy_alone(made) -> None:
    rows, dummy = made
    batches = [rows.take(own, dummy) for own in ([2, 3], [0], [])]
    assert [len(batch.prompts) for batch in batches] == [2, 1, 1]
    assert [tuple(batch.completions.ids.shape) for batch in batches] == [(2, 9), (1, 5), (1, 1)]
    assert batches[2].prompts.images_per_row == [1]
    assert not batches[2].completions.mask.any()
    assert batches[2].advantages.tolist() == [0.0]
    assert torch.equal(batches[1].old_logps, rows.old_logps[[0], :5])
    assert replace(rows, ref_logps=None).take([2], dummy).ref_logps is None


def test_the_dummy_is_appended_only_to_rows_without_a_picture(made) -> None:
    rows, dummy = made
    text, mixed = rows.prompts.take([3, 4]), rows.prompts.take([3, 0])
    assert mixed.with_picture(dummy) is mixed
    joined = text.with_picture(dummy)
    assert [sample.id for sample in joined.samples] == ["t3", "t4", "dummy"]
    assert "pixel_values" in joined.tensors()
    assert "pixel_values" not in text.tensors()
