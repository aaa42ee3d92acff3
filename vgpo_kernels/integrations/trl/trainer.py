"""`VGPOTrainer`: TRL's GRPO trainer with advantages weighted by focus on the images, and without logits."""

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
import trl
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.models.utils import disable_gradient_checkpointing

from vgpo_kernels._validate import check_choice
from vgpo_kernels.integrations.transformers import fused_logprobs, record_visual_attention, visual_token_mask
from vgpo_kernels.integrations.transformers.model_parts import find_parts
from vgpo_kernels.integrations.trl.model_proxies import LossProxy, ScoringProxy
from vgpo_kernels.integrations.trl.options import check_arguments, check_options, loss_config
from vgpo_kernels.integrations.trl.vllm import (
    UnexpandedEngine,
    expands_twice,
    samples_placeholders,
    unexpanded_prompts,
    without_placeholders,
)
from vgpo_kernels.weights import VGPOConfig, VGPOWeights, vgpo_weights
from vgpo_kernels.weights.checks import SOURCES

logger = logging.getLogger(__name__)

if not trl.__version__.startswith("1.16."):
    raise ImportError(f"trl: expected version 1.16, whose trainer VGPOTrainer extends, got {trl.__version__}")

# What a prepared batch may hold beside its tokens, as TRL's forward takes it.
_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class VGPOTrainer(GRPOTrainer):
    """TRL's GRPO trainer with advantages weighted by the focus of tokens and trajectories on the images.

    One forward without gradient scores each generated batch: its last hidden states (or its attention) give the focus
    of every completion token, and the focus of whole groups, gathered over all processes, gives the weights. If TRL
    needs log-probabilities of the sampling policy, they come from the same forward. Losses and their gradients are
    those of `linear_policy_loss`: neither scoring nor updates make logits. With weights of 1 the loss is TRL's own.
    TRL's metrics keep their names; "vgpo/..." are added.

    Args:
        *arguments, **options: of GRPOTrainer, except what `Raises` names.
        vgpo_config: the recipe; None: `VGPOConfig.balanced()`. Its warm-up counts optimizer steps. With neither
            `intra` nor `inter` nothing is scored, and the loss is unweighted.
        focus_source: "similarity" of hidden states, or "attention", for models set to "vgpo".
        focus_layers: layers of the attention, as `record_visual_attention` takes them.

    Raises:
        ValueError: an option of TRL under which weights would be dropped or the loss would be another; a model whose
            pictures are not tokens of its input; attention as the source with a model that is not set to "vgpo".
        TypeError: `vgpo_config` is no VGPOConfig; a head that is no plain linear layer.
        RuntimeError: in training, with vLLM in this process: it completed another prompt than the one trained on.

    Example:
        See `docs/trl.md`: a checkpoint, pictures, rewards and a generation loop are needed.

    Source: VGPO (arXiv 2604.09349); everything else as in TRL 1.16.
    """

    # Typed loosely: TRL's annotations allow None.
    model: Any
    args: Any
    chat_template_kwargs: Any
    vllm_generation: Any
    num_generations: int
    num_generations_eval: int

    _tag_names = ["trl", "grpo", "vgpo"]  # noqa: RUF012
    _name = "VGPO"
    _paper = {  # noqa: RUF012
        "title": "Visually-Guided Policy Optimization for Multimodal Reasoning",
        "id": "2604.09349",
        "citation": """\
@inproceedings{wang2026vgpo,
    title        = {{Visually-Guided Policy Optimization for Multimodal Reasoning}},
    author       = {Zengbin Wang and Feng Xiong and Liang Lin and Xuecai Hu and Yong Wang and Yanlin Wang and
                    Man Zhang and Xiangxiang Chu},
    year         = 2026,
    booktitle    = {Annual Meeting of the Association for Computational Linguistics},
    eprint       = {arXiv:2604.09349},
}""",
    }

    def __init__(
        self,
        *arguments: Any,
        vgpo_config: VGPOConfig | None = None,
        focus_source: str = "similarity",
        focus_layers: str | Sequence[int] = "last",
        **options: Any,
    ) -> None:
        self.vgpo_config = VGPOConfig.balanced() if vgpo_config is None else vgpo_config
        if not isinstance(self.vgpo_config, VGPOConfig):
            raise TypeError(f"vgpo_config: expected a VGPOConfig or None, got {type(vgpo_config).__name__}")
        check_choice("focus_source", focus_source, SOURCES)
        named = inspect.signature(GRPOTrainer.__init__).bind(self, *arguments, **options).arguments
        check_arguments(named)
        if named.get("args") is not None:
            check_options(named["args"])
            loss_config(named["args"])
        super().__init__(*arguments, **options)
        self.focus_source = focus_source
        self.focus_layers = focus_layers
        check_options(self.args)  # once more, now that TRL has filled in what was not given
        self._loss_config = loss_config(self.args)
        self._check_model()
        self._focus: Tensor | None = None  # (rows, T) fp32, of the policy's first scoring of a batch
        self._wants_focus = False
        self._warned = False
        self._unexpanded: list[list[int]] | None = None  # the prompts of the batch that vLLM is to complete
        if self.use_vllm and samples_placeholders():
            engine, vocabulary = self.vllm_generation, self.model.config.get_text_config().vocab_size
            banned = sorted(token for token in self._visual_ids if token < vocabulary)
            engine.generation_kwargs = without_placeholders(engine.generation_kwargs, banned)

    def _check_model(self) -> None:
        self._visual_ids = find_parts(self.model).visual.all
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef: expected 0.0, got {self.router_aux_loss_coef} (the model's own where it is not "
                "set): the load-balancing loss of a mixture of experts is not computed here"
            )
        attention = self.model.config.get_text_config()._attn_implementation
        if self.focus_source == "attention" and attention != "vgpo":
            raise ValueError(
                "focus_source: expected 'similarity' for this model, got 'attention': it records a text half set to "
                f"'vgpo', not to {attention!r}; load it with attn_implementation={{'text_config': 'vgpo'}}"
            )
        if self.focus_source == "attention":  # what cannot be recorded raises now, not after the first rollout
            with record_visual_attention(self.model, layers=self.focus_layers):
                pass
        with fused_logprobs(self.model):  # and so does an unknown head
            pass

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], list[Any] | None, dict[str, Any]]:
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        self._unexpanded = None
        if images is not None and self._generates_inside() and expands_twice():
            prompts = [prepare_multimodal_messages(prompt) for prompt in prompts]
            self._unexpanded = unexpanded_prompts(
                self.processing_class, prompts, chat_template=self.chat_template, **self.chat_template_kwargs
            )
        return prompt_ids, images, fields

    def _generates_inside(self) -> bool:
        """Returns whether vLLM runs in this process: a server is sent pictures that are processed already."""
        return bool(self.use_vllm) and self.vllm_mode == "colocate"

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, *arguments: Any, **options: Any) -> Any:
        if images is None or not self._generates_inside():
            return super()._generate_single_turn(prompt_ids, images, *arguments, **options)
        engine = self.vllm_generation
        self.vllm_generation = UnexpandedEngine(engine, self._unexpanded)
        try:
            return super()._generate_single_turn(prompt_ids, images, *arguments, **options)
        finally:
            self.vllm_generation, self._unexpanded = engine, None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._wants_focus = self.vgpo_config.intra or self.vgpo_config.inter
        self._focus = None
        try:
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
            if not self._wants_focus:
                return batch
            # TRL scores the policy only if the update is off-policy, and then before the reference model.
            if "old_per_token_logps" not in batch:
                self._focus = None
                self._score(batch)
            focus = self._focus
        finally:
            self._wants_focus, self._focus = False, None
        if focus is None:
            raise RuntimeError("expected a forward of the policy over prompts and completions, got none from TRL")
        return batch | self._weigh(batch, focus)

    def _score(self, batch: dict[str, Any]) -> None:
        """Runs the policy over a generated batch, for its focus alone."""
        training = self.model.training
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size,
                **{name: batch[name] for name in _MODEL_INPUTS if name in batch},
            )

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *arguments: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Runs TRL's loop over the batch with a proxy of the model, whose output has log-probabilities."""
        if isinstance(model, LossProxy):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *arguments, **options
            )
        source = self.focus_source if self._wants_focus and self._focus is None and model is self.model else None
        with fused_logprobs(model) as fused:
            scoring = ScoringProxy(
                self, model, fused, input_ids.shape[1] - logits_to_keep, source, options.get("compute_entropy", False)
            )
            results = super()._get_per_token_logps_and_entropies(
                scoring, input_ids, attention_mask, logits_to_keep, *arguments, **options
            )
        if source is not None:
            self._focus = torch.cat(scoring.focus)
        return results

    def _weigh(self, batch: dict[str, Any], focus: Tensor) -> dict[str, Tensor]:
        """Returns this process's weights, computed over the groups of all processes."""
        mask, advantages = batch["completion_mask"], batch["advantages"]
        rows, length = mask.shape
        all_focus, all_masks = (
            self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1)) for x in (focus, mask)
        )
        seen = self._visual_mask(batch["prompt_ids"], batch["prompt_mask"]).any(1)
        has_visual, advantages = self.accelerator.gather(seen), self.accelerator.gather(advantages)
        self._warn_without_pictures(has_visual)
        completions = self.num_generations if self.model.training else self.num_generations_eval
        weights = vgpo_weights(
            all_focus,
            all_masks,
            torch.arange(len(has_visual), device=has_visual.device) // completions,  # TRL keeps groups side by side
            self.vgpo_config,
            source=self.focus_source,
            has_visual=has_visual,
            step=self.state.global_step,
            advantages=advantages,
        )
        self._log_weights(all_focus, all_masks != 0, has_visual, weights)
        own = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        return {
            "token_weights": weights.token_weights[own, :length],
            "trajectory_weights": weights.trajectory_weights[own],
        }

    def _warn_without_pictures(self, has_visual: Tensor) -> None:
        if self._warned or has_visual.any():
            return
        self._warned = True
        if self.accelerator.is_main_process:
            logger.warning(
                "no row has a picture in a generation batch of %d rows: there is no focus to weigh them by. TRL takes "
                "pictures from the column 'image' or 'images' of the data set or from the messages of 'prompt', and "
                "drops other columns",
                len(has_visual),
            )

    def _log_weights(self, focus: Tensor, mask: Tensor, has_visual: Tensor, weights: VGPOWeights) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        weighted = mask & has_visual[:, None]
        values, by_token = focus[weighted], weights.token_weights[weighted]
        by_row = weights.trajectory_weights[weighted.any(1)]
        metrics["vgpo/focus_mean"].append(values.mean().item())
        metrics["vgpo/focus_std"].append(_spread(values))
        metrics["vgpo/token_weight_mean"].append(by_token.mean().item())
        metrics["vgpo/token_weight_std"].append(_spread(by_token))
        metrics["vgpo/trajectory_weight_std"].append(_spread(by_row))
        metrics["vgpo/visual_rows"].append(has_visual.float().mean().item())

    def _visual_mask(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return visual_token_mask(self.model.config, input_ids) & (attention_mask != 0)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        with fused_logprobs(model) as fused:
            proxy = LossProxy(self, fused, inputs)
            super()._compute_loss(proxy, inputs)  # for TRL's metrics: its own code on our log-probabilities
        return proxy.output.loss * self._loss_scale()

    def _loss_scale(self) -> float:
        """Returns what TRL multiplies a micro-batch's loss by, beyond its own average over rows or tokens."""
        training = self.model.training
        accumulated = self.current_gradient_accumulation_steps if training else 1
        if not self._loss_config.divides_by_num_items:
            return 1.0 / accumulated
        # `num_items_in_batch` counts the tokens of all processes, and of all steps that share a generation.
        generations = self.args.steps_per_generation / accumulated if training else 1.0
        return float(self.accelerator.num_processes * generations)


def _spread(values: Tensor) -> float:
    """Returns the standard deviation, NaN without any value."""
    return (values - values.mean()).square().mean().sqrt().item()
