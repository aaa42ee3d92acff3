"""Updates: micro-batches of weighted experience through the policy loss, accumulated exactly over ranks."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import PolicyLossConfig, PolicyLossOutput
from vgpo_kernels.integrations.transformers import FusedHead, fused_logprobs
from vgpo_train.data import PromptBatch
from vgpo_train.rl import policy
from vgpo_train.rl.micro_batches import MicroBatch, micro_batches
from vgpo_train.rl.rollout import Completions
from vgpo_train.run import distributed

logger = logging.getLogger(__name__)


@dataclass
class Experience:
    """A rank's B rows, ready for updates; factors of None are 1."""

    prompts: PromptBatch
    completions: Completions
    advantages: Tensor  # (B,) fp32
    old_logps: Tensor  # (B, T) fp32
    ref_logps: Tensor | None  # (B, T) fp32
    token_weights: Tensor | None  # (B, T) fp32
    trajectory_weights: Tensor | None  # (B,) fp32


class Update:
    """One optimizer step over given rows of the experience.

    Every rank runs the same number of micro-batches, so that the collectives of ZeRO-3 meet; a rank without rows left
    runs the companion, whose tokens are all masked.
    """

    def __init__(
        self,
        engine: Any,
        loss_config: PolicyLossConfig,
        companion: PromptBatch,
        *,
        micro_batch: int,
        temperature: float,
        memory_budget: int | None = None,
    ) -> None:
        self.engine = engine
        self.loss_config = loss_config
        self.companion = companion
        self.micro_batch = micro_batch
        self.temperature = temperature
        self.memory_budget = memory_budget
        self.device = engine.device

    def __call__(self, experience: Experience, rows: list[int]) -> dict[str, float]:
        """Steps the optimizer once; returns metrics over all ranks' rows, empty where no rank has a row.

        Args:
            experience: this rank's.
            rows: this rank's rows of the update.
        """
        mask = experience.completions.mask
        total_rows = distributed.sum_over_ranks(len(rows), self.device)
        total_tokens = distributed.sum_over_ranks(int(mask[rows].sum()), self.device)
        if not total_tokens:
            return {}
        own_count = -(-len(rows) // self.micro_batch)
        count = int(distributed.max_over_ranks(own_count, self.device))
        batches = micro_batches(
            experience.prompts,
            experience.completions,
            rows,
            self.companion,
            size=self.micro_batch,
            count=count,
        )
        totals = _Totals()
        with fused_logprobs(self.engine) as fused:
            for index, batch in enumerate(batches):
                self.engine.set_gradient_accumulation_boundary(index == count - 1)
                output, scale = self._loss(fused, experience, batch, total_rows, total_tokens)
                self.engine.backward(output.loss * scale)
                totals.add(output, float(scale), int(batch.completions.mask.sum()))
        self.engine.step()
        applied = bool(self.engine.was_step_applied())
        if not applied and distributed.is_main():
            logger.warning("gradients are not finite: this update was skipped")
        return totals.reduce(total_tokens, self.device) | {
            "grad_norm": _grad_norm(self.engine) if applied else float("nan"),
            "skipped_updates": float(not applied),
        }

    def _loss(
        self, fused: FusedHead, experience: Experience, batch: MicroBatch, total_rows: float, total_tokens: float
    ) -> tuple[PolicyLossOutput, float]:
        world = distributed.world_size()  # DeepSpeed averages gradients over ranks
        rows, tokens = batch.completions.mask.shape[0], float(batch.completions.mask.sum())
        per_token_count = self.loss_config.loss_type in ("dapo", "cispo")
        output = policy.loss(
            fused,
            batch.prompts.tensors(device=self.device),
            batch.completions,
            batch.take(experience.old_logps),
            batch.take(experience.advantages),
            ref_logps=batch.take(experience.ref_logps),
            token_weights=batch.take(experience.token_weights),
            trajectory_weights=batch.take(experience.trajectory_weights),
            temperature=self.temperature,
            config=self.loss_config,
            memory_budget=self.memory_budget,
            num_items_in_batch=total_tokens / world if per_token_count else None,
        )
        if per_token_count:
            return output, 1.0
        if self.loss_config.loss_type == "bnpo":
            return output, tokens * world / total_tokens
        return output, rows * world / total_rows


class _Totals:
    """Metrics of an update, token-weighted over its micro-batches."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.sums: dict[str, float] = {}
        self.ratio_max = 0.0

    def add(self, output: PolicyLossOutput, scale: float, tokens: int) -> None:
        self.loss += float(output.loss.detach()) * scale
        for name, value in output.metrics.items():
            if name != "ratio_max":
                self.sums[name] = self.sums.get(name, 0.0) + (float(value) * tokens if tokens else 0.0)
        if tokens:
            self.ratio_max = max(self.ratio_max, float(output.metrics["ratio_max"]))

    def reduce(self, total_tokens: float, device: torch.device) -> dict[str, float]:
        means = {
            name: distributed.sum_over_ranks(value, device) / total_tokens for name, value in sorted(self.sums.items())
        }
        return means | {
            "loss": distributed.sum_over_ranks(self.loss, device) / distributed.world_size(),
            "ratio_max": distributed.max_over_ranks(self.ratio_max, device),
        }


def _grad_norm(engine: Any) -> float:
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else float("nan")
