"""Optimizer steps: micro-batches through the policy loss, accumulated exactly over ranks."""

import logging
from typing import Any

import torch

from vgpo_kernels import PolicyLossConfig, PolicyLossOutput
from vgpo_kernels.integrations.transformers import FusedHead, fused_logprobs
from vgpo_train.data import PromptBatch
from vgpo_train.rl.scoring import model_inputs
from vgpo_train.rl.types import Batch
from vgpo_train.run import distributed

logger = logging.getLogger(__name__)


class Update:
    """One optimizer step over given rows of a rank's batch.

    Every rank runs the same number of micro-batches, as the collectives of ZeRO-3 need; one without rows left is
    the dummy alone, whose tokens are all masked.

    Args:
        engine: the policy.
        loss_config: terms of the loss.
        dummy: a prompt with a picture, for micro-batches without any.
        micro_batch: rows of one forward.
        temperature: of the rollout; divides the logits.
        memory_budget: bytes for logits and their gradient; None takes the library's default.
    """

    def __init__(
        self,
        engine: Any,
        loss_config: PolicyLossConfig,
        dummy: PromptBatch,
        *,
        micro_batch: int,
        temperature: float,
        memory_budget: int | None = None,
    ) -> None:
        self.engine = engine
        self.loss_config = loss_config
        self.dummy = dummy
        self.micro_batch = micro_batch
        self.temperature = temperature
        self.memory_budget = memory_budget
        self.device = engine.device

    def __call__(self, batch: Batch, rows: list[int]) -> dict[str, float]:
        """Steps the optimizer once; returns metrics over all ranks' rows, empty if no rank has a token.

        Args:
            batch: this rank's rows of the step.
            rows: those of the update.
        """
        mask = batch.completions.mask
        total_rows = distributed.sum_over_ranks(len(rows), self.device)
        total_tokens = distributed.sum_over_ranks(int(mask[rows].sum()), self.device)
        if not total_tokens:
            return {}
        count = int(distributed.max_over_ranks(-(-len(rows) // self.micro_batch), self.device))
        totals = _Totals()
        with fused_logprobs(self.engine) as fused:
            for index in range(count):
                own = rows[index * self.micro_batch : (index + 1) * self.micro_batch]
                part = batch.take(own, self.dummy)
                self.engine.set_gradient_accumulation_boundary(index == count - 1)
                output, scale = self._loss(fused, part, total_rows, total_tokens)
                self.engine.backward(output.loss * scale)
                totals.add(output, float(scale), int(part.completions.mask.sum()))
        self.engine.step()
        applied = bool(self.engine.was_step_applied())
        if not applied and distributed.is_main():
            logger.warning("gradients are not finite: this update was skipped")
        return totals.reduce(total_tokens, self.device) | {
            "grad_norm": _grad_norm(self.engine) if applied else float("nan"),
            "skipped_updates": float(not applied),
        }

    def _loss(
        self, fused: FusedHead, batch: Batch, total_rows: float, total_tokens: float
    ) -> tuple[PolicyLossOutput, float]:
        """Returns the loss of a micro-batch, and what it is multiplied by to add up to that of one large batch."""
        world = distributed.world_size()  # DeepSpeed averages gradients over ranks
        prompts, mask = batch.prompts.tensors(device=self.device), batch.completions.mask
        by_items = self.loss_config.divides_by_num_items
        output = fused.policy_loss(
            model_inputs(prompts, batch.completions),
            batch.old_logps,
            batch.advantages,
            mask,
            prompt_length=prompts["input_ids"].shape[1],
            ref_logps=batch.ref_logps,
            token_weights=batch.token_weights,
            trajectory_weights=batch.trajectory_weights,
            temperature=self.temperature,
            config=self.loss_config,
            memory_budget=self.memory_budget,
            num_items_in_batch=total_tokens / world if by_items else None,
        )
        if by_items:
            return output, 1.0
        if self.loss_config.loss_type == "bnpo":
            return output, float(mask.sum()) * world / total_tokens
        return output, mask.shape[0] * world / total_rows


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
