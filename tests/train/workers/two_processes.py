"""Does what needs two real ZeRO-3 processes, and writes what happened for the tests to judge: `FOLDER/rank_N.pt`."""

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import accumulation
import exports
import heads
import parts  # noqa: F401
import torch
from deepspeed.runtime.zero import GatheredParameters
from scenario import FIRST_RANK, HEAD_ROWS, KINDS, LEARNING_RATE, LENGTHS, LOSSES
from train_tools import collator, end_and_pad, mixed_samples, no_head, random_completions, weighted_batch

from vgpo_train import main as program
from vgpo_train.config import ConfigError, RolloutConfig, TrainConfig, load_config
from vgpo_train.data import DataError, PromptBatch, dummy_prompt
from vgpo_train.model import engine
from vgpo_train.model.engine import build_policy, start_distributed
from vgpo_train.rewards import Rewards
from vgpo_train.rl.rollout import build_rollout_engine, parameters_fit
from vgpo_train.rl.types import Batch, Completions, ScoredRollout, Scores, Weighting
from vgpo_train.rl.update import Update
from vgpo_train.run import distributed
from vgpo_train.trainer import Trainer

FOLDER, CHECKPOINT, LEAKY, PICTURES = (Path(argument) for argument in sys.argv[-4:])


def config_of(name: str, *overrides: str) -> TrainConfig:
    """Returns the tiny run's configuration, writing to `FOLDER/name`."""
    given = [f"model.path={CHECKPOINT}", f"data.train={PICTURES}/train.jsonl", f"output_dir={FOLDER}/{name}"]
    return load_config(Path(__file__).parent / "tiny.yaml", [*given, *overrides])


def parameters(of: Any) -> dict[str, torch.Tensor]:
    """Returns the whole parameters of a sharded engine."""
    found = dict(of.module.named_parameters())
    with GatheredParameters(list(found.values())):
        return {name: value.detach().clone() for name, value in found.items()}


def whole_experience(policy_engine: Any) -> Batch:
    """Returns the rows of both ranks together, sampled by a policy not far from this one."""
    prompts = collator(CHECKPOINT)(mixed_samples(PICTURES, KINDS))
    return weighted_batch(policy_engine, prompts, random_completions(LENGTHS))


def own_experience(whole: Batch) -> Batch:
    """Returns this rank's rows."""
    rows = range(FIRST_RANK) if distributed.rank() == 0 else range(FIRST_RANK, len(KINDS))
    rows = list(rows)
    return Batch(
        whole.prompts.take(rows),
        Completions(whole.completions.ids[rows], whole.completions.mask[rows]),
        *(getattr(whole, name)[rows] for name in ("advantages", "old_logps", "ref_logps")),
        *(getattr(whole, name)[rows] for name in ("token_weights", "trajectory_weights")),
    )


def rollouts_and_updates() -> dict[str, Any]:
    """Samples with and without gathering before an update with each loss, and once more after it."""
    happened: dict[str, Any] = {"completions": [], "updates": {}}
    adam, engine._optimizer = engine._optimizer, _plain_descent
    for loss, loss_config in LOSSES.items():
        given = ("optim.max_grad_norm=1e9", "optim.schedule=constant", "deepspeed=zero3_any_optimizer.json")
        policy_engine = build_policy(config_of("none", f"model.path={LEAKY}", *given), 10)
        dummy = dummy_prompt(collator(CHECKPOINT))
        whole = whole_experience(policy_engine)
        own = own_experience(whole)
        inputs = own.prompts.with_picture(dummy).tensors()
        if loss in ("grpo", "dapo"):
            happened["completions"].append(_sample_both_ways(policy_engine, inputs))
        before = parameters(policy_engine)
        update = Update(policy_engine, loss_config, dummy, micro_batch=2, temperature=0.8)
        metrics = update(own, list(range(len(own.prompts))))
        happened["updates"][loss] = (before, parameters(policy_engine), metrics)
    happened["completions"].append(_sample_both_ways(policy_engine, inputs))
    engine._optimizer = adam
    settings = policy_engine.module.generation_config.to_diff_dict()
    happened |= {"settings": settings, "fits": parameters_fit(policy_engine)}
    return happened | {"training": policy_engine.module.training, "experience": whole}


def head_of_both_ranks() -> dict[str, Any]:
    """Steps on log-probabilities and entropies, and counts how often the head's weight is gathered."""
    adam, engine._optimizer = engine._optimizer, _plain_descent
    given = ("optim.max_grad_norm=1e9", "optim.schedule=constant", "deepspeed=zero3_any_optimizer.json")
    policy_engine = build_policy(config_of("none", *given), 10)
    whole = whole_experience(policy_engine)
    rows = HEAD_ROWS[distributed.rank()]
    prompts, completions = whole.prompts.take(rows), Completions(*(x[rows] for x in whole.completions))
    before = parameters(policy_engine)
    heads.step_on_logprobs(policy_engine, prompts, completions, whole.advantages[rows][:, None] / 10)
    happened = {"experience": whole, "before": before, "after": parameters(policy_engine)}
    engine._optimizer = adam
    return happened | {"gathers": heads.gathers(policy_engine, prompts, completions)}


def _sample_both_ways(policy_engine: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Completions]:
    completions = {}
    for mode in ("never", "always"):
        sampler = _sampler(policy_engine, mode)
        with sampler.session():
            completions[mode] = sampler.generate(inputs, temperature=0.0)
    return completions


def _plain_descent(_config: TrainConfig, model: Any, _options: dict[str, Any]) -> torch.optim.Optimizer:
    # Its step is the gradient itself.
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def _sampler(policy_engine: Any, mode: str) -> Any:
    settings = RolloutConfig(gather=mode, max_new_tokens=8)
    end, pad = end_and_pad(CHECKPOINT)
    return build_rollout_engine(settings, policy_engine, suppressed=[], pad_token_id=pad, eos_token_ids=[end])


class WatchedTrainer(Trainer):
    """Notes the parameters before and after each step."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.digests: list[tuple[str, str]] = []
        self.finite = True

    def step(self, step: int) -> dict[str, Any]:
        before = self._digest()
        metrics = super().step(step)
        self.digests.append((before, self._digest()))
        return metrics

    def _digest(self) -> str:
        values = parameters(self.engine)
        self.finite &= all(bool(value.isfinite().all()) for value in values.values())
        raw = b"".join(value.float().numpy().tobytes() for value in values.values())
        return hashlib.sha256(raw).hexdigest()


def run(name: str, *overrides: str) -> dict[str, Any]:
    """Trains; returns what the steps did to the parameters, and the policy at the end."""
    trainer = WatchedTrainer(config_of(name, *overrides))
    trainer.run()
    return {"digests": trainer.digests, "finite": trainer.finite, "parameters": parameters(trainer.engine)}


class RecordingTrainer(Trainer):
    """Notes what each step scored on this rank, and what its updates were given."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.records: list[dict[str, Any]] = []
        self._score, self.scorer = self.scorer, self._record_scores
        self._apply, self.update = self.update, self._record_update

    def _record_scores(self, prompts: PromptBatch, completions: Completions) -> Scores:
        with no_head(self.engine.module):
            scores = self._score(prompts, completions)
        self.records.append({"prompts": prompts, "completions": completions, "scores": scores, "updates": []})
        return scores

    def _weigh(
        self, completions: Completions, rewards: Rewards, scores: Scores, step: int
    ) -> tuple[ScoredRollout, Weighting, torch.Tensor]:
        weighed = super()._weigh(completions, rewards, scores, step)
        whole, weighting, _ = weighed
        rows = {
            "group_ids": self.groups.own_ids,
            "completion_mask": completions.mask,
            "old_logps": scores.old_logps,
            "focus": scores.focus_similarity,
            "has_visual": scores.has_visual,
            "rewards": rewards.total,
            "accuracies": rewards.accuracy,
        }
        self.records[-1] |= {"rows": rows, "whole": whole, "weighting": weighting}
        return weighed

    def _record_update(self, given: Batch, rows: list[int]) -> dict[str, float]:
        names = ("advantages", "old_logps", "token_weights", "trajectory_weights")
        tensors = {name: getattr(given, name) for name in names}
        self.records[-1]["updates"].append(tensors | {"mask": given.completions.mask, "rows": rows})
        with no_head(self.engine.module):
            return self._apply(given, rows)


def weighted_updates() -> list[dict[str, Any]]:
    """Trains with two updates a step of three groups each, so that the middle group is on both ranks."""
    overrides = (
        "algorithm=every_row_its_own",
        f"data.train={FOLDER}/half.jsonl",
        "rollout.prompts=6",
        "rollout.completions=2",
        "optim.update_prompts=3",
        "rewards.weights={fingerprint: 1.0, has_picture: 0.0}",
        "rewards.accuracy=has_picture",
        "rewards.filter_accuracy=[0.5,1.5]",
        "steps=2",
    )
    trainer = RecordingTrainer(config_of("weighted", *overrides))
    trainer.run()
    return trainer.records


def attention_as_source() -> dict[str, Any]:
    """Trains a step by attention, beside a reference model, rank 1 on rows without a picture."""
    overrides = (
        "focus.source=attention",
        "focus.layers=[0,-1]",
        f"data.train={FOLDER}/one_sided.jsonl",
        "loss.beta=0.01",
        "rollout.gather=never",
        "steps=1",
    )
    trainer = RecordingTrainer(config_of("attention", *overrides))
    trainer.run()
    return trainer.records[0]


def unknown_layer() -> str:
    """Starts a run by a layer that the checkpoint does not have."""
    try:
        Trainer(config_of("none", "focus.source=attention", "focus.layers=[7]"))
    except ConfigError as error:
        return str(error)
    return "nothing"


def refusals() -> dict[str, str]:
    """Starts runs over the folder of another, each of which must be refused."""
    said = {}
    for name, overrides in {
        "occupied": (),
        "learning rate": ("resume=auto", "optim.lr=0.5"),
        "update": ("resume=auto", "optim.update_prompts=4"),
    }.items():
        try:
            Trainer(config_of("two updates", "algorithm=grpo", "optim.update_prompts=2", *overrides)).run()
        except ConfigError as error:
            said[name] = str(error)
    return said


def bad_data() -> dict[str, str]:
    """Starts runs over data that cannot be used; returns the error of each on this rank."""
    said = {}
    for name, source in {
        "rows": f"data.train={FOLDER}/bad_rows.jsonl",
        "one machine": f"data.train={FOLDER}/only_rank_{distributed.rank()}.jsonl",
    }.items():
        try:
            Trainer(config_of("none", source))
        except (ConfigError, DataError) as error:
            said[name] = str(error)
    return said


SCENARIOS = {
    "exact": rollouts_and_updates,
    "head": head_of_both_ranks,
    "nan": lambda: run("nan", "algorithm=nan_at_second_step"),
    "nan in bfloat16": lambda: run(
        "nan in bfloat16",
        "algorithm=nan_at_second_step",
        "model.dtype=bfloat16",
        "model.gradient_checkpointing=true",
        "rollout.gather=never",
        "steps=2",
    ),
    "equal": lambda: run(
        "equal",
        "rewards.weights={even_length: 0.0, always_one: 1.0}",
        "rollout.engine=dice",
        "optim.weight_decay=0.1",
        "steps=2",
    ),
    "one-sided": lambda: run("one-sided", f"data.train={FOLDER}/one_sided.jsonl", "rollout.gather=never", "steps=1"),
    "kl": lambda: run("kl", "algorithm=grpo", "loss.beta=0.01", "optim.schedule=constant", "steps=2"),
    "two updates": lambda: run("two updates", "algorithm=grpo", "optim.update_prompts=2", "steps=1"),
    "weighted": weighted_updates,
    "attention": attention_as_source,
    "unknown layer": unknown_layer,
    "refusals": refusals,
    "bad data": bad_data,
    "exports": lambda: exports.export_families(config_of("none", "model.attn_implementation=sdpa"), FOLDER / "exports"),
    "accumulation": lambda: accumulation.gradient_norms(config_of("none", "model.dtype=bfloat16")),
}


def main() -> None:
    """Runs all scenarios, in the same order on both ranks."""
    start_distributed()
    happened: dict[str, Any] = {"threads": torch.get_num_threads()}
    for name, scenario in SCENARIOS.items():
        start = time.perf_counter()
        happened[name] = scenario()
        if distributed.is_main():
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    torch.save(happened, FOLDER / f"rank_{distributed.rank()}.pt")


def whole_program_on_bad_data() -> int:
    """Runs the driver's program over data that cannot be used, in this process group; returns its exit status."""
    given = [f"model.path={CHECKPOINT}", f"data.train={FOLDER}/bad_rows.jsonl", f"output_dir={FOLDER}/none"]
    return program.main(["--config", str(Path(__file__).parent / "tiny.yaml"), *given])


if __name__ == "__main__":
    main()
    status = whole_program_on_bad_data()
    print(f"the program has ended with {status}", flush=True)
