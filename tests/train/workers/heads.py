"""What replaces a head that ZeRO-3 has sharded: its gradients, and how often the weight is gathered."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from train_tools import dense_logps, logprobs, no_head

from vgpo_kernels import PolicyLossConfig
from vgpo_kernels.integrations.transformers import fused_logprobs
from vgpo_kernels.vocabulary import native
from vgpo_train.data import PromptBatch
from vgpo_train.rl.scoring import model_inputs
from vgpo_train.rl.types import Completions
from vgpo_train.run import distributed

# Bytes for the logits of a few tokens; the default holds all of them.
BUDGETS = {"one chunk": None, "many chunks": 4_210_000}


@contextmanager
def counted(owner: Any, name: str, counts: Callable[..., int]) -> Iterator[list[int]]:
    """Yields a list of one number, to which each call of the function adds what `counts` makes of its arguments."""
    total, real = [0], getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        total[0] += counts(*args, **kwargs)
        return real(*args, **kwargs)

    setattr(owner, name, counting)
    try:
        yield total
    finally:
        setattr(owner, name, real)


def step_on_logprobs(engine: Any, prompts: PromptBatch, completions: Completions, weights: torch.Tensor) -> None:
    """Descends the sum of weights * (logps + entropy / 2) of this rank's rows, added up over the ranks."""
    with no_head(engine.module):
        found = logprobs(engine, prompts.tensors(), completions, 0.8, entropy=True)
    loss = (weights * (found.logps + found.entropy / 2)).sum()
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss * distributed.world_size())
    engine.step()


def gathers(engine: Any, prompts: PromptBatch, completions: Completions) -> dict[str, tuple[int, int]]:
    """Returns, for a dense loss and each budget, how often a forward with its backward gathers the head's weight, and
    how many products of the head it took."""
    weight = engine.module.get_output_embeddings().weight
    coordinator = PartitionedParameterCoordinator
    gather = "_PartitionedParameterCoordinator__all_gather_params"

    def holds_head(_: Any, params: Any, forward: bool) -> int:  # noqa: ARG001
        return sum(param.ds_id == weight.ds_id for param in params)

    def dense() -> torch.Tensor:
        return dense_logps(engine, prompts.tensors(), completions, 0.8).mul(completions.mask).sum()

    def fused(budget: int | None) -> torch.Tensor:
        ones = torch.ones(len(completions.mask))
        given = {"temperature": 0.8, "config": PolicyLossConfig(), "memory_budget": budget}
        inputs = prompts.tensors()
        length = inputs["input_ids"].shape[1]
        with fused_logprobs(engine) as head:
            inputs = model_inputs(inputs, completions)
            return head.policy_loss(inputs, None, ones, completions.mask, prompt_length=length, **given).loss

    losses = {"dense": dense} | {name: lambda budget=budget: fused(budget) for name, budget in BUDGETS.items()}
    found = {}
    for name, loss in losses.items():
        for _ in range(2):  # the first one may come upon a trace of another order of modules
            with (
                counted(coordinator, gather, holds_head) as gathered,
                counted(native, "logits_of", lambda *_: 1) as made,
            ):
                engine.set_gradient_accumulation_boundary(False)
                engine.backward(0.0 * loss())
        found[name] = (gathered[0], made[0])
    return found
