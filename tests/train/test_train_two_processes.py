"""What needs two real ZeRO-3 processes: `ranks` is what they left behind (conftest.py), the tests judge it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from train_launch import WORKERS
from train_tools import PlainEngine, dense_logps, eager_attention
from transformers import AutoModelForImageTextToText, GenerationConfig

from vgpo_kernels import VGPOConfig, policy_loss, vgpo_weights
from vgpo_train.model import load_model, load_processor
from vgpo_train.rl.advantages import group_advantages
from vgpo_train.rl.scoring import model_inputs
from vgpo_train.rl.types import SEGMENTS, Completions
from vgpo_train.run.metrics import read_metrics

sys.path.insert(0, str(WORKERS))
import scenario

pytestmark = pytest.mark.deepspeed

LOSSES = tuple(scenario.LOSSES)


def _metrics(folder: Path, run: str) -> list[dict[str, Any]]:
    return read_metrics(folder / run / "metrics.jsonl")


def _summary(folder: Path, run: str) -> dict[str, Any]:
    return json.loads((folder / run / "summary.json").read_text())


def test_processes_share_the_cores(ranks) -> None:
    import os

    assert [rank["threads"] for rank in ranks] == [max(1, len(os.sched_getaffinity(0)) // 2)] * 2


def test_the_policy_trains_in_training_mode(ranks) -> None:
    # In eval mode transformers leaves gradient checkpointing out without a word.
    assert ranks[0]["exact"]["training"]


def test_gathering_changes_no_completion(ranks, tiny_checkpoint) -> None:
    for rank in ranks:
        samples = rank["exact"]["completions"]
        assert len(samples) == 3
        for both in samples:
            whole, sharded = both["always"], both["never"]
            # Under sharded parameters a rank runs on until all have ended: what follows the end is padding.
            width = whole.ids.shape[1]
            assert torch.equal(whole.ids, sharded.ids[:, :width])
            assert torch.equal(whole.mask, sharded.mask[:, :width])
            assert (sharded.ids[:, width:] == load_processor(tiny_checkpoint).tokenizer.pad_token_id).all()
        assert not torch.equal(samples[-2]["always"].ids, samples[-1]["always"].ids), "updates reach the rollouts"


@pytest.mark.parametrize("number", range(len(LOSSES)), ids=LOSSES)
def test_ranks_and_micro_batches_add_up_to_one_batch(ranks, tiny_checkpoint, number: int) -> None:
    # Before each update, parameters were gathered for a rollout and let go again: the hooks must be back.
    before, after, metrics = ranks[0]["exact"]["updates"][LOSSES[number]]
    engine = PlainEngine(load_model(tiny_checkpoint, dtype=torch.float32))
    engine.module.load_state_dict(before, strict=False)
    whole = ranks[0]["exact"]["experience"]
    logps = dense_logps(engine, whole.prompts.tensors(), whole.completions, 0.8)
    output = policy_loss(
        logps,
        whole.old_logps,
        whole.advantages,
        whole.completions.mask,
        token_weights=whole.token_weights,
        trajectory_weights=whole.trajectory_weights,
        config=scenario.LOSSES[LOSSES[number]],
    )
    output.loss.backward()
    gradients = {name: p.grad for name, p in engine.module.named_parameters()}
    steps = {name: (before[name] - after[name]) / scenario.LEARNING_RATE for name in gradients}
    expected = torch.cat([gradient.flatten() for gradient in gradients.values()])
    found = torch.cat([step.flatten() for step in steps.values()])
    # Rounding of the new parameters: about 3e-8 each, 3e-5 in the norm of a million.
    assert (found - expected).norm() < 1e-4 * expected.norm() + 3e-5
    assert expected.norm() > 0.1
    assert metrics["loss"] == pytest.approx(float(output.loss.detach()), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)
    assert metrics == ranks[1]["exact"]["updates"][LOSSES[number]][2], "ranks report the same"


def test_any_number_of_micro_batches_adds_up_in_bfloat16(ranks) -> None:
    for rank in ranks:
        norms = rank["accumulation"]
        assert norms.keys() == {1, 64}
        # Each gradient is the first one's 64th, to the bit: what is left is the rounding of a sum in float32.
        assert norms[64] == pytest.approx(norms[1], rel=1e-5)


def test_log_probabilities_and_entropies_have_the_gradients_of_one_process(ranks, tiny_checkpoint) -> None:
    record = ranks[0]["head"]
    engine = PlainEngine(load_model(tiny_checkpoint, dtype=torch.float32))
    engine.module.load_state_dict(record["before"], strict=False)
    rows = [row for rank in scenario.HEAD_ROWS for row in rank]
    whole = record["experience"]
    mask, ids = whole.completions.mask[rows], whole.completions.ids[rows]
    logits = engine(**model_inputs(whole.prompts.take(rows).tensors(), Completions(ids, mask))).logits
    log_p = (logits[:, -ids.shape[1] - 1 : -1] / 0.8).log_softmax(-1)
    logps, entropy = log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    (whole.advantages[rows][:, None] / 10 * (logps + entropy / 2))[mask].sum().backward()
    named = dict(engine.module.named_parameters())
    expected = torch.cat([parameter.grad.flatten() for parameter in named.values()])
    steps = [(record["before"][name] - record["after"][name]).flatten() for name in named]
    found = torch.cat(steps) / scenario.LEARNING_RATE
    assert (found - expected).norm() < 1e-4 * expected.norm() + 3e-5
    assert expected.norm() > 0.1


def test_a_sharded_head_is_gathered_once_and_not_for_every_chunk(ranks) -> None:
    for rank in ranks:
        gathers = rank["head"]["gathers"]
        dense, _ = gathers["dense"]
        assert dense == 2, "for the forward and for the backward; the embedding is the same weight"
        assert gathers["one chunk"] == (dense, 1)
        assert gathers["many chunks"][0] == dense
        assert gathers["many chunks"][1] > 1


def test_a_rank_without_a_picture_runs_the_vision_tower_too(ranks, folder) -> None:
    # Rollout with sharded parameters, scoring and update: rank 0 runs the tower in each, so rank 1 must, too.
    (line,) = _metrics(folder, "one-sided")
    assert line["updates"] == 1
    assert line["focus_mean"] is not None
    for rank in ranks:
        ((before, after),) = rank["one-sided"]["digests"]
        assert before != after
        assert rank["one-sided"]["finite"]


def test_a_checkpoints_sampling_settings_do_not_reach_rollouts(ranks) -> None:
    # That they would change completions is tested in rl/test_train_rollout.py.
    for rank in ranks:
        assert rank["exact"]["settings"] == GenerationConfig().to_diff_dict()
        assert rank["exact"]["fits"], "a million parameters do"


@pytest.mark.parametrize("run", ["nan", "nan in bfloat16"])
def test_an_update_without_finite_gradients_is_skipped_counted_and_said(ranks, folder, finished, run: str) -> None:
    lines = _metrics(folder, run)
    changed = [before != after for before, after in ranks[0][run]["digests"]]
    assert changed == [True, False, True][: len(lines)]
    assert ranks[0][run]["digests"] == ranks[1][run]["digests"]
    assert ranks[0][run]["finite"]
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1][: len(lines)]
    assert lines[1]["loss"] is None
    assert lines[1]["grad_norm"] is None
    assert _summary(folder, run)["skipped_updates"] == 1
    assert finished.output.count("gradients are not finite: this update was skipped") == 2, "once a run, by one rank"


def test_a_skipped_update_does_not_move_the_schedule(ranks, folder) -> None:  # noqa: ARG001
    rates = [line["learning_rate"] for line in _metrics(folder, "nan")]
    assert rates[0] == rates[1] != rates[2]


def test_a_rollout_of_equal_rewards_changes_nothing_and_is_warned_of(ranks, folder, finished) -> None:
    lines = _metrics(folder, "equal")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert (line["reward"], line["reward_std"], line["kept_fraction"]) == (1.0, 0.0, 0.0)
        assert (line["updates"], line["loss"], line["kl"], line["clip_fraction"]) == (0, 0.0, 0.0, 0.0)
    assert finished.output.count("no update changed the policy in 2 steps: ") == 1, "by one rank"
    # Weight decay alone would move them.
    digests = {digest for step in ranks[0]["equal"]["digests"] for digest in step}
    assert len(digests) == 1


def test_a_rollout_engine_can_be_added_by_name(ranks, folder) -> None:  # noqa: ARG001
    # The run of equal rewards rolled dice: half of its rows end at the middle, the others never.
    for line in _metrics(folder, "equal"):
        assert line["full_length_fraction"] == pytest.approx(0.5, abs=0.2)


def test_the_kl_to_the_reference_starts_at_zero(ranks, folder) -> None:
    lines = _metrics(folder, "kl")
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[1]["kl"] > 1e-4
    assert all(before != after for before, after in ranks[0]["kl"]["digests"])
    assert _summary(folder, "kl")["algorithm"] == "grpo"


def test_later_updates_of_a_rollout_have_other_ratios(ranks, folder) -> None:  # noqa: ARG001
    (line,) = _metrics(folder, "two updates")
    assert line["updates"] == 2
    assert line["ratio_max"] > 1.001
    (single, *_) = _metrics(folder, "kl")
    assert single["updates"] == 1
    assert single["ratio_max"] == pytest.approx(1.0, abs=1e-4)


def test_every_rank_updates_with_the_weights_of_its_own_rows(ranks) -> None:
    for step in (0, 1):
        for rank in ranks:
            record = rank["weighted"][step]
            rows, updates = record["rows"], record["updates"]
            token, trajectory = scenario.factors(rows, step)
            assert len(updates) == 2
            for update in updates:
                assert torch.equal(update["mask"], rows["completion_mask"])
                assert torch.equal(update["old_logps"], rows["old_logps"])
                torch.testing.assert_close(update["token_weights"], token)
                torch.testing.assert_close(update["trajectory_weights"], trajectory)
        first, second = (rank["weighted"][step]["updates"][0] for rank in ranks)
        assert not torch.allclose(first["token_weights"], second["token_weights"])
        assert not torch.allclose(first["trajectory_weights"], second["trajectory_weights"])


def test_every_rank_updates_with_the_advantages_of_its_own_rows(ranks) -> None:
    for step in (0, 1):
        parts = [rank["weighted"][step]["rows"] for rank in ranks]
        rewards, group_ids = (torch.cat([part[name] for part in parts]) for name in ("rewards", "group_ids"))
        expected = group_advantages(rewards, group_ids, normalize_std=True).chunk(2)
        assert not torch.allclose(*expected)
        for rank, own in zip(ranks, expected, strict=True):
            for update in rank["weighted"][step]["updates"]:
                torch.testing.assert_close(update["advantages"], own)


def test_an_update_takes_the_kept_rows_of_its_own_groups(ranks) -> None:
    for step in (0, 1):
        records = [rank["weighted"][step] for rank in ranks]
        for record in records:
            for number, update in enumerate(record["updates"]):
                assert update["rows"] == _kept_rows(record, records, number)
        given = [len(update["rows"]) for record in records for update in record["updates"]]
        assert 0 < sum(given) < 12, "some of the rows are kept"


def _kept_rows(own: dict[str, Any], records: list[dict[str, Any]], number: int) -> list[int]:
    """Returns a rank's rows of an update: three groups each; those without a picture or of equal rewards are left."""
    rewards, group_ids = (torch.cat([one["rows"][name] for one in records]) for name in ("rewards", "group_ids"))
    kept = []
    for row, group in enumerate(own["rows"]["group_ids"].tolist()):
        differ = rewards[group_ids == group].unique().numel() > 1
        if group // 3 == number and own["rows"]["accuracies"][row] and differ:
            kept.append(row)
    return kept


def test_a_group_on_two_ranks_is_weighed_side_by_side(ranks) -> None:
    first, second = (set(rank["weighted"][0]["rows"]["group_ids"].tolist()) for rank in ranks)
    assert first & second == {1, 4}
    for rank in ranks:
        assert rank["weighted"][0]["whole"].group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_both_ranks_record_what_an_eager_forward_attends_to(ranks, tiny_checkpoint) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    for rank, looks in zip(ranks, (True, False), strict=True):
        record = rank["attention"]
        found = record["scores"].attention
        expected = eager_attention(model, record["prompts"].tensors(), record["completions"], [0, 1])
        torch.testing.assert_close(found, expected.float(), atol=5e-6, rtol=0)
        assert record["scores"].has_visual.tolist() == [looks] * 6
        assert bool(found[..., 0].any()) == looks
        assert record["scores"].focus_similarity.any() == looks, "both sources are scored"
        assert record["scores"].ref_logps is not None


def test_attention_as_source_drives_the_weights(ranks) -> None:
    for rank in ranks:
        whole, weighting = rank["attention"]["whole"], rank["attention"]["weighting"]
        parts = [one["attention"]["scores"] for one in ranks]
        # Group by group: rank 0 has the first two, rank 1 the others.
        assert torch.equal(whole.attention, torch.cat([part.attention for part in parts]))
        assert torch.equal(whole.focus_similarity, torch.cat([part.focus_similarity for part in parts]))
        assert torch.equal(whole.focus, whole.attention[..., 0])
        given = (whole.completion_mask, whole.group_ids, VGPOConfig.from_recipe("balanced"))
        options = {"has_visual": whole.has_visual, "step": 0, "advantages": whole.advantages}
        expected = vgpo_weights(whole.focus.clone(), *given, source="attention", **options)
        assert torch.equal(weighting.token_weights, expected.token_weights)
        assert torch.equal(weighting.trajectory_weights, expected.trajectory_weights)
        other = vgpo_weights(whole.focus_similarity, *given, source="similarity", **options)
        assert not torch.allclose(weighting.token_weights, other.token_weights)


def test_a_run_by_attention_reports_it(ranks, folder) -> None:
    (line,) = _metrics(folder, "attention")
    assert _summary(folder, "attention")["focus_source"] == "attention"
    whole = ranks[0]["attention"]["whole"]
    looked_at = whole.attention[..., 0][whole.completion_mask & whole.has_visual[:, None]]
    assert line["focus_mean"] == pytest.approx(float(looked_at.double().mean()))
    assert line["focus_late_early_ratio"] == line["visual_late_early_ratio"]
    known = [sum(curves) for curves in zip(*(line[f"attention_{name}"] for name in SEGMENTS), strict=True) if curves[0]]
    assert known
    assert known == pytest.approx([1.0] * len(known), abs=1e-5)
    assert line["kl"] == pytest.approx(0.0, abs=1e-6)
    with Image.open(folder / "attention" / "attention.png") as picture:
        assert picture.format == "PNG"


def test_another_program_loads_the_final_checkpoint(ranks, folder) -> None:  # noqa: ARG001
    for name in ("config.json", "generation_config.json"):
        assert "vgpo" not in (folder / "attention" / "final" / name).read_text()


def test_a_layer_that_is_not_there_is_refused_by_every_rank(ranks) -> None:
    for rank in ranks:
        assert rank["unknown layer"] == "focus.layers: expected numbers from -2 to 1, got 7"


def test_grpo_logs_focus_too(ranks, folder) -> None:  # noqa: ARG001
    (line,) = _metrics(folder, "two updates")
    assert -1 <= line["focus_mean"] <= 1
    assert 0 < line["attention_image"][0] < 1
    assert line["corr_trajectory_weight_length"] == 0.0


@pytest.mark.parametrize(("run", "dtype"), [("two updates", torch.float32), ("nan in bfloat16", torch.bfloat16)])
def test_the_final_checkpoint_keeps_every_bit(ranks, folder, tiny_checkpoint, run: str, dtype: torch.dtype) -> None:
    found = dict(AutoModelForImageTextToText.from_pretrained(folder / run / "final").named_parameters())
    expected = ranks[0][run]["parameters"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype == dtype
        assert torch.equal(found[name], value)
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (folder / run / "final" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


def test_a_folder_with_another_run_is_refused(ranks) -> None:
    for rank in ranks:
        said = rank["refusals"]
        assert "holds a run already; go on with resume=auto or choose another folder" in said["occupied"]
        assert said["learning rate"].startswith("resume: the saved run was configured otherwise in optim.lr; choose")
        assert said["update"].startswith(
            "resume: the saved run was configured otherwise in optim.update_prompts; choose"
        )


def test_all_ranks_stop_with_what_any_of_them_found(ranks) -> None:
    said = [rank["bad data"] for rank in ranks]
    assert said[0] == said[1]
    assert "bad_rows.jsonl: 2 of 6 rows cannot be used" in said[0]["rows"]
    assert "line 3: id 'train-00002': image file" in said[0]["rows"]
    assert "line 6: id 'train-00005': field 'answer' is null" in said[0]["rows"]
    assert said[0]["one machine"].startswith("rank 1 on ")
    assert "only_rank_1.jsonl' does not exist" in said[0]["one machine"]


def test_the_main_rank_alone_says_why_and_no_traceback_follows(ranks, finished) -> None:  # noqa: ARG001
    assert finished.output.count("error: data.train=") == 1
    assert finished.output.count("the program has ended with 2") == 2
    assert "Traceback" not in finished.output
    assert finished.output.rindex("leave them out with data.invalid=drop") < finished.output.rindex("has ended with 2")
