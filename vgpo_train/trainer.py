"""The training loop: rollouts, rewards, scores, weights, updates, metrics, checkpoints."""

import logging
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import set_seed

from vgpo_train.config import ConfigError, TrainConfig, save_config
from vgpo_train.data import PictureDataset, PromptBatch, PromptCollator, Sample, dummy_prompt, step_order
from vgpo_train.model import end_tokens, limit_pixels, load_processor, visual_token_ids
from vgpo_train.model.engine import build_policy, build_reference, deepspeed_options
from vgpo_train.model.export import check_weights, export
from vgpo_train.preflight import check_layers, check_sizes, open_datasets, total_steps, usable
from vgpo_train.rewards import RewardMixer, Rewards
from vgpo_train.rl.advantages import group_advantages, kept_rows
from vgpo_train.rl.algorithms import build_algorithm
from vgpo_train.rl.groups import Groups
from vgpo_train.rl.rollout import build_rollout_engine
from vgpo_train.rl.scoring import Scorer, focus_of
from vgpo_train.rl.types import Batch, Completions, ScoredRollout, Scores, Weighting
from vgpo_train.rl.update import Update
from vgpo_train.run import distributed
from vgpo_train.run.checkpoint import CheckpointStore, RunState, check_resumable
from vgpo_train.run.metrics import (
    MetricsLog,
    PhaseTimer,
    merge_updates,
    progress,
    read_metrics,
    rollout_metrics,
    weight_metrics,
)
from vgpo_train.run.report import write_report

logger = logging.getLogger(__name__)

_SEED_STRIDE = 1_000_003  # keeps the random streams of neighbouring seeds, steps and ranks apart


class Trainer:
    """One run, from its configuration to its report."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.world, self.rank, self.device = distributed.world_size(), distributed.rank(), distributed.device()
        # First, since it forks, and this process is still small.
        self.rewards = RewardMixer(
            dict(config.rewards.weights), accuracy=config.rewards.accuracy, timeout=config.rewards.timeout
        )
        # Checks come before minutes of loading.
        self.store = CheckpointStore(self.output_dir, config.keep_checkpoints)
        self.saved = self._saved_state()
        distributed.together(lambda: deepspeed_options(config))
        self.algorithm = build_algorithm(config)
        self.collator, self.dummy, opened = distributed.together(self._open_data)
        self.processor = self.collator.processor
        datasets = usable(opened, self.collator, config.data.invalid)
        self.train_data, self.test_data = datasets["data.train"], datasets.get("data.test")
        check_sizes(config, len(self.train_data), self.world)
        self.steps = total_steps(config, len(self.train_data))
        self.updates_per_step = config.rollout.prompts // config.optim.update_prompts
        self.groups = Groups(
            config.rollout.prompts,
            config.rollout.completions,
            self.updates_per_step,
            rank=self.rank,
            world=self.world,
            device=self.device,
        )
        self.engine = build_policy(config, self.steps * self.updates_per_step)
        self.loss_config = config.loss_config()
        self.reference = build_reference(config) if self.loss_config.beta else None
        tokenizer = self.processor.tokenizer
        self.rollout_engine = build_rollout_engine(
            config.rollout,
            self.engine,
            suppressed=visual_token_ids(self.engine.module.config, self.processor),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_ids=end_tokens(config.model.path, tokenizer),
        )
        wants_focus = "focus" in self.algorithm.wants or config.focus.log
        self.scorer = Scorer(config, self.engine, self.reference, self.dummy, wants_focus=wants_focus)
        self.update = Update(
            self.engine,
            self.loss_config,
            self.dummy,
            micro_batch=config.optim.micro_batch,
            temperature=config.rollout.temperature,
            memory_budget=config.optim.memory_budget(),
        )
        self.state = self.saved or RunState(0, self.world, asdict(config))

    def run(self) -> dict[str, Any]:
        """Trains, saves and reports; returns what `summary.json` holds."""
        started, seconds_before = time.perf_counter(), self.state.seconds
        if self.saved is not None:
            self.store.load(self.engine, self.saved)
        if distributed.is_main():
            save_config(self.config, self.output_dir / "config.yaml")
        log = MetricsLog(self.output_dir, self.state.step, tensorboard=self.config.tensorboard)
        if self.state.accuracy_before is None:
            self.state.accuracy_before = self.evaluate()
        bar = tqdm(
            initial=self.state.step,
            total=self.steps,
            disable=not distributed.is_main(),
            desc="step",
            dynamic_ncols=True,
        )
        for step in range(self.state.step, self.steps):
            metrics = self.step(step)
            self.state.step = step + 1
            if self._is_due(self.config.eval_every) and self.state.step < self.steps:
                metrics["accuracy_test"] = self.evaluate()
            log.write(metrics)
            bar.set_postfix(progress(metrics), refresh=False)
            bar.update()
            if self._is_due(self.config.save_every) or self.state.step == self.steps:
                self.state.seconds = seconds_before + time.perf_counter() - started
                self.store.save(self.engine, self.state)
        bar.close()
        log.close()
        accuracy_after = self.evaluate()
        self.rewards.close()
        return self._finish(accuracy_after, seconds_before + time.perf_counter() - started)

    def _saved_state(self) -> RunState | None:
        """Returns the state to go on from, if any; refuses what must not be resumed or overwritten."""
        saved = distributed.together(self.store.latest) if self.config.resume == "auto" else None
        if saved is not None:
            check_resumable(saved, self.config)
            distributed.together(lambda: self.store.check_whole(saved))
        # Every rank looks before the main one begins to write, and all take the same answer.
        found = distributed.max_over_ranks(float((self.output_dir / "metrics.jsonl").exists()), self.device) > 0
        if found and self.config.resume == "no":
            raise ConfigError(
                f"output_dir: {self.output_dir} holds a run already; go on with resume=auto or choose another folder"
            )
        return saved

    def _open_data(self) -> tuple[PromptCollator, PromptBatch, dict[str, PictureDataset]]:
        """Returns the collator, the dummy for prompts without a picture, and the data sets by key."""
        model, data = self.config.model, self.config.data
        check_weights(model.path)
        check_layers(self.config)
        processor = load_processor(model.path, trust_remote_code=model.trust_remote_code)
        limit_pixels(processor, data.min_pixels, data.max_pixels)
        collator = PromptCollator(
            processor,
            system_prompt=data.system_prompt,
            suffix=data.suffix,
            max_prompt_length=data.max_prompt_length,
        )
        dummy = dummy_prompt(collator)  # refuses a family whose prompts cannot be joined
        return collator, dummy, open_datasets(data)

    def _finish(self, accuracy_after: float | None, seconds: float) -> dict[str, Any]:
        export(self.engine.module, self.config.model.path, self.output_dir / "final")
        summary: dict[str, Any] = {
            "algorithm": self.config.algorithm,
            "focus_source": self.config.focus.source,
            "seed": self.config.seed,
            "steps": self.steps,
            "seconds": round(seconds, 3),
            "accuracy_before": self.state.accuracy_before,
            "accuracy_after": accuracy_after,
            "skipped_updates": self.state.skipped_updates,
        }
        if distributed.is_main():
            summary = write_report(self.output_dir, summary)
            updates = sum(line["updates"] for line in read_metrics(self.output_dir / "metrics.jsonl"))
            if updates == self.state.skipped_updates:
                logger.warning(
                    "no update changed the policy in %d steps: either the gradients were not finite "
                    "(skipped_updates: %d), or no group passed rewards.filter_equal and rewards.filter_accuracy",
                    self.steps,
                    updates,
                )
        return summary

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    # One step

    def step(self, step: int) -> dict[str, Any]:
        """Runs one step and returns its metrics, the same on every rank."""
        timer = PhaseTimer()
        # A function of seed, step and rank alone: a resumed run draws what the killed one would have drawn.
        set_seed((self.config.seed * _SEED_STRIDE + step) * _SEED_STRIDE % 2**31 + self.rank)
        places = step_order(len(self.train_data), step, self.config.rollout.prompts, self.config.seed)
        own_places = [places[group] for group in self.groups.own_ids.tolist()]
        samples = distributed.together(lambda: self._samples(own_places))
        with timer("rollout"):
            prompts, completions = self.sample(samples, temperature=self.config.rollout.temperature)
        with timer("reward"):
            rewards = self.rewards(self.decode(completions), samples)
        with timer("score"):
            scores = self.scorer(prompts, completions)
        with timer("weight"):
            rollout, weighting, kept = self._weigh(completions, rewards, scores, step)
        with timer("update"):
            own = self.groups.own
            batch = Batch(
                prompts,
                completions,
                own(rollout.advantages),
                scores.old_logps,
                scores.ref_logps,
                own(weighting.token_weights),
                own(weighting.trajectory_weights),
            )
            update_metrics = self._update(batch, own(kept).tolist())
        return {
            "step": step + 1,
            **rollout_metrics(rollout, kept, self.config.rollout.max_new_tokens),
            **self._reward_metrics(rewards),
            **weight_metrics(weighting, rollout.completion_mask),
            **update_metrics,
            "learning_rate": self.engine.get_lr()[0],
            "skipped_updates": self.state.skipped_updates,
            **timer.metrics(tokens=int(rollout.completion_mask.sum())),
        }

    def _samples(self, places: list[int]) -> list[Sample]:
        """Reads the training samples at these places, each once."""
        read = {place: self.train_data[place] for place in dict.fromkeys(places)}
        return [read[place] for place in places]

    def sample(self, samples: list[Sample], *, temperature: float) -> tuple[PromptBatch, Completions]:
        """Completes one prompt a sample; returns the prompts with the completions."""
        prompts = self._collate(samples)
        return prompts, self._complete((prompts.take(rows) for rows in self._batches(len(samples))), temperature)

    def _batches(self, count: int) -> list[range]:
        size = self.config.rollout.batch_size
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    @torch.no_grad()
    def _complete(self, batches: Iterable[PromptBatch], temperature: float) -> Completions:
        """Completes the prompts batch by batch; completions are padded to the longest on any rank."""
        parts = []
        with self.rollout_engine.session():
            for batch in batches:
                inputs = batch.with_picture(self.dummy).tensors(device=self.device)
                part = self.rollout_engine.generate(inputs, temperature=temperature)
                parts.append(Completions(part.ids[: len(batch)], part.mask[: len(batch)]))
        longest = max(part.ids.shape[1] for part in parts)
        longest = int(distributed.max_over_ranks(longest, self.device))
        pad = self.processor.tokenizer.pad_token_id
        return Completions(
            torch.cat([_pad(part.ids, longest, pad) for part in parts]),
            torch.cat([_pad(part.mask, longest, False) for part in parts]),
        )

    def _collate(self, samples: list[Sample]) -> PromptBatch:
        # The completions of a prompt share its processed pictures.
        unique = list({sample.id: sample for sample in samples}.values())
        places = {sample.id: place for place, sample in enumerate(unique)}
        prompts = distributed.together(lambda: self.collator(unique))  # a file may be gone since the start
        return prompts.take([places[sample.id] for sample in samples])

    def decode(self, completions: Completions) -> list[str]:
        """Returns the completions' texts without special tokens."""
        rows = [ids[mask].tolist() for ids, mask in zip(completions.ids, completions.mask, strict=True)]
        return self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _weigh(
        self, completions: Completions, rewards: Rewards, scores: Scores, step: int
    ) -> tuple[ScoredRollout, Weighting, Tensor]:
        """Gathers the rollout over the ranks and weighs whole groups; every rank gets the same result.

        Returns:
            The rollout, its factors, and (N,) bool: the rows that updates learn from.
        """
        gather, group_ids = self.groups.gather, self.groups.ids
        totals, accuracies = gather(rewards.total.to(self.device)), gather(rewards.accuracy.to(self.device))
        similarity, attention = gather(scores.focus_similarity), gather(scores.attention)
        rollout = ScoredRollout(
            group_ids=group_ids,
            completion_mask=gather(completions.mask),
            advantages=group_advantages(totals, group_ids, normalize_std=self.config.rewards.normalize_std),
            old_logps=gather(scores.old_logps),
            focus=focus_of(self.config.focus.source, similarity, attention),
            focus_similarity=similarity,
            attention=attention,
            has_visual=gather(scores.has_visual),
            entropy=gather(scores.entropy),
            rewards=totals,
            accuracies=accuracies,
        )
        kept = kept_rows(
            totals,
            accuracies,
            group_ids,
            filter_equal=self.config.rewards.filter_equal,
            filter_accuracy=self.config.rewards.filter_accuracy,
        )
        return rollout, self.algorithm.weigh(rollout, step), kept

    def _update(self, batch: Batch, kept: list[bool]) -> dict[str, float]:
        """Runs the step's optimizer steps over the kept rows of this rank; returns the mean of their metrics."""
        per_update = len(kept) // self.updates_per_step
        results = []
        for start in range(0, len(kept), per_update):
            rows = [row for row in range(start, start + per_update) if kept[row]]
            result = self.update(batch, rows)
            if result:
                results.append(result)
                self.state.skipped_updates += int(result["skipped_updates"])
        return merge_updates(results)

    # Between steps

    def evaluate(self) -> float | None:
        """Returns the accuracy on the held-out split, or None without one."""
        if self.test_data is None:
            return None
        set_seed(self.config.seed * _SEED_STRIDE % 2**31 + self.rank)
        total = len(self.test_data)
        per_rank = -(-total // self.world)
        # The last ranks repeat samples, uncounted, so that all run the same number of batches.
        places = range(self.rank * per_rank, (self.rank + 1) * per_rank)
        samples = distributed.together(lambda: [self.test_data[min(place, total - 1)] for place in places])
        # Batch by batch: the pictures of a whole split need not fit into memory.
        batches = (self._collate([samples[row] for row in rows]) for rows in self._batches(len(samples)))
        completions = self._complete(batches, self.config.eval_temperature)
        accuracy = self.rewards(self.decode(completions), samples).accuracy
        counted = torch.tensor([place < total for place in places])
        return distributed.sum_over_ranks(float(accuracy[counted].sum()), self.device) / total

    def _reward_metrics(self, rewards: Rewards) -> dict[str, float]:
        rows = self.config.rollout.prompts * self.config.rollout.completions
        named = {
            f"reward_{name}": distributed.sum_over_ranks(float(values.sum()), self.device) / rows
            for name, values in sorted(rewards.named.items())
        }
        return named | {"failed_rewards": distributed.sum_over_ranks(rewards.failures, self.device)}


def _pad(rows: Tensor, length: int, value: int | bool) -> Tensor:
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=value)
