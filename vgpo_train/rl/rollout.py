"""Rollout engines: prompts in, sampled completions out."""

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import psutil
import torch
from deepspeed.runtime.zero import unwrap_model_for_generation
from torch import Tensor
from transformers import GenerationConfig

from vgpo_train.config import RolloutConfig
from vgpo_train.registry import Registry
from vgpo_train.rl.types import Completions
from vgpo_train.run import distributed

# Of free memory; the rest is for the KV cache and activations.
_PARAMETER_SHARE = 0.5


class RolloutEngine(Protocol):
    """What the trainer needs of a rollout engine."""

    def session(self) -> AbstractContextManager[None]:
        """Surrounds the `generate` calls of one rollout, during which parameters do not change."""
        ...

    def generate(self, prompts: Mapping[str, Tensor], *, temperature: float) -> Completions:
        """Completes left-padded prompts; temperature 0 is greedy. T is at most `max_new_tokens`."""
        ...


_ENGINES: Registry[type[RolloutEngine]] = Registry("rollout.engine")
register = _ENGINES.register


def build_rollout_engine(
    config: RolloutConfig, engine: Any, *, suppressed: list[int], pad_token_id: int, eos_token_ids: list[int]
) -> RolloutEngine:
    """Returns the engine that `config.engine` names.

    Args:
        config: the rollout's settings.
        engine: the DeepSpeed engine that holds the policy.
        suppressed: token ids that are never sampled, such as the image token.
        pad_token_id: fills completions after their end.
        eos_token_ids: end a completion.
    """
    return _ENGINES.get(config.engine)(config, engine, suppressed, pad_token_id, eos_token_ids)


@register("transformers")
class TransformersEngine:
    """`generate` on the policy itself, its ZeRO-3 parameters gathered once a rollout when they fit."""

    def __init__(
        self,
        config: RolloutConfig,
        engine: Any,
        suppressed: list[int],
        pad_token_id: int,
        eos_token_ids: list[int],
    ) -> None:
        self.config = config
        self.engine = engine
        self.suppressed = suppressed
        self.pad_token_id = pad_token_id
        self.eos_token_ids = eos_token_ids
        self.gathers = config.gather == "always" or (config.gather == "auto" and parameters_fit(engine))

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Gathers the parameters for as long as completions are sampled."""
        training = self.engine.module.training
        self.engine.eval()
        try:
            with unwrap_model_for_generation(self.engine) if self.gathers else contextlib.nullcontext():
                yield
        finally:
            self.engine.train(training)

    @torch.no_grad()
    def generate(self, prompts: Mapping[str, Tensor], *, temperature: float) -> Completions:
        """Completes left-padded prompts; temperature 0 is greedy."""
        sequences = self.engine.module.generate(
            **prompts,
            generation_config=self._generation_config(temperature),
            # Without whole parameters each token's forward gathers them, so ranks must run equally many.
            synced_gpus=not self.gathers and distributed.world_size() > 1,
        )
        ids = sequences[:, prompts["input_ids"].shape[1] :]
        return Completions(ids, completion_mask(ids, self.eos_token_ids))

    def _generation_config(self, temperature: float) -> GenerationConfig:
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": temperature,
                "top_p": self.config.top_p,
                "top_k": self.config.top_k,
            }
        return GenerationConfig(
            max_new_tokens=self.config.max_new_tokens,
            suppress_tokens=self.suppressed or None,
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_ids,
            use_cache=True,
            **sampling,
        )


def completion_mask(ids: Tensor, eos_token_ids: list[int]) -> Tensor:
    """Returns a (B, T) bool mask of the tokens up to and including the first end-of-sequence token.

    Padding is recognised by its place, not by its id, because many models pad with the end-of-sequence token.
    """
    ends = torch.isin(ids, torch.tensor(eos_token_ids, device=ids.device))
    return (ends.long().cumsum(1) - ends.long()) == 0


def parameters_fit(engine: Any) -> bool:
    """Whether every rank can hold the whole parameters for a rollout; all ranks get the same answer."""
    needed = sum(p.ds_numel * p.element_size() for p in engine.module.parameters())
    if engine.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(engine.device)
    else:
        free = psutil.virtual_memory().available // distributed.world_size()
    lacking = distributed.max_over_ranks(float(needed > free * _PARAMETER_SHARE), engine.device)
    return lacking == 0
