"""What TRL calls in place of the model: proxies whose output has log-probabilities, and never logits.

with fused_logprobs(model) as fused:
    proxy = ScoringProxy(trainer, model, fused, prompt_length=7, source=None, entropy=False)
    log_probs = proxy(labels=labels, fused_lm_head=True, **batch).log_probs
"""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from vgpo_kernels.integrations.transformers import completion_focus, focus_from_attention, record_visual_attention
from vgpo_kernels.policy_loss import PolicyLossOutput


class ScoringProxy:
    """In place of a model whose log-probabilities TRL asks for; keeps the focus of the rows that it is called with.

    Args:
        trainer: the VGPOTrainer.
        model: whose log-probabilities they are.
        fused: the FusedHead of the model.
        prompt_length: tokens before the completions, padding included.
        source: of the focus; None computes none.
        entropy: compute the entropies, too.
    """

    def __init__(
        self,
        trainer: Any,
        model: nn.Module,
        fused: Any,
        prompt_length: int,
        source: str | None,
        entropy: bool,
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.fused = fused
        self.prompt_length = prompt_length
        self.source = source
        self.entropy = entropy
        self.focus: list[Tensor] = []

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **batch: Any) -> SimpleNamespace:  # noqa: ARG002
        mask = labels[:, self.prompt_length :] != -100  # (rows, T)
        with self._recording() as record:
            scored = self.fused.logprobs(
                batch,
                prompt_length=self.prompt_length,
                completion_mask=mask,
                temperature=self.trainer.temperature,
                entropy=self.entropy,
                hidden_states=self.source == "similarity",
            )
        if self.source == "attention":
            self.focus.append(focus_from_attention(record, mask))
        elif self.source == "similarity":
            self.focus.append(self._similarity(scored.hidden_states, batch, mask))
        return SimpleNamespace(log_probs=scored.logps, entropy=scored.entropy)

    def _recording(self) -> Any:
        if self.source != "attention":
            return nullcontext()
        return record_visual_attention(self.model, layers=self.trainer.focus_layers, prompt_length=self.prompt_length)

    def _similarity(self, states: Tensor, batch: dict[str, Any], mask: Tensor) -> Tensor:
        ids, real = (batch[name][:, : self.prompt_length] for name in ("input_ids", "attention_mask"))
        return completion_focus(states, self.trainer._visual_mask(ids, real), mask)


class LossProxy:
    """In place of the model of an update: computes the weighted loss, and returns its log-probabilities.

    Args:
        trainer: the VGPOTrainer.
        fused: the FusedHead of the model.
        inputs: the micro-batch, as TRL prepares it.
    """

    output: PolicyLossOutput

    def __init__(self, trainer: Any, fused: Any, inputs: dict[str, Any]) -> None:
        self.trainer = trainer
        self.fused = fused
        self.inputs = inputs

    def __call__(self, *, labels: Tensor, fused_lm_head: bool, **batch: Any) -> SimpleNamespace:  # noqa: ARG002
        inputs, config = self.inputs, self.trainer._loss_config
        items = inputs["num_items_in_batch"].clamp(min=1) if config.divides_by_num_items else None
        self.output = self.fused.policy_loss(
            batch,
            inputs.get("old_per_token_logps"),
            self._advantages(),
            inputs["completion_mask"],
            prompt_length=inputs["prompt_ids"].shape[1],
            ref_logps=inputs.get("ref_per_token_logps"),
            token_weights=inputs.get("token_weights"),
            trajectory_weights=inputs.get("trajectory_weights"),
            temperature=self.trainer.temperature,
            config=config,
            num_items_in_batch=items,
        )
        return SimpleNamespace(log_probs=self.output.logps, entropy=self.output.entropy)

    def _advantages(self) -> Tensor:
        """Returns (B,) or (B, T) advantages, times the ratio that corrects for vLLM's own log-probabilities."""
        advantages: Tensor = self.inputs["advantages"]
        correction = self.inputs.get("importance_sampling_ratio")  # (B, 1) or (B, T), never negative
        if correction is None:
            return advantages
        by_token = advantages[:, None] if advantages.dim() == 1 else advantages
        return (by_token * correction).expand_as(self.inputs["completion_mask"])
