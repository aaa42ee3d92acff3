"""One training step on a given rollout: VGPO with our kernels, GRPO without scores, and VGPO as it is scored elsewhere.

A step scores the rollout in micro-batches without gradient (old log-probabilities, entropy, and for VGPO where the
policy looks), weighs tokens and trajectories, makes the policy's gradient in micro-batches and steps AdamW. All
methods have the same fused output head and the same update; they differ in how they score and weigh. The tokens are
given: generating them is the same for all, takes most of a real step, and would hide the difference. GRPO, too, makes
its old log-probabilities in a forward of its own, as it must where a rollout serves several updates.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness.cases import OURS
from benchmarks.peers.focus import dense_focus, token_loop_focus, token_loop_weights
from benchmarks.peers.rollout import TINY, MicroBatch, Rollout, build
from vgpo_kernels import PolicyLossConfig, VGPOConfig, vgpo_weights, visual_focus_score
from vgpo_kernels.integrations.transformers import (
    focus_from_attention,
    fused_logprobs,
    model_logprobs,
    record_visual_attention,
)

PHASES = ("score", "weigh", "update", "optimizer")
LOSS = PolicyLossConfig("dapo", epsilon_low=0.2, epsilon_high=0.28, clip_ratio_dual=3.0)
WEIGHTS = VGPOConfig.paper()
MAX_GRAD_NORM = 1.0


class Scores(NamedTuple):
    """What a method finds in one forward: (b, T) fp32 each, None what it does not look for."""

    logps: Tensor
    focus: Tensor | None = None  # cosine to the mean visual state; the weights are made of it
    attention: Tensor | None = None  # mean mass on visual tokens in the last layer, over heads


class Outcome(NamedTuple):
    """What a step comes to: equal between all methods of VGPO."""

    token_weights: Tensor  # (B, R)
    trajectory_weights: Tensor  # (B,)
    losses: Tensor  # of each micro-batch
    grad_norm: Tensor  # of all parameters


Watch = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Method:
    """How a step scores and weighs.

    Args:
        score: scores a micro-batch, in a forward without gradient.
        weigh: makes (B, R) and (B,) weights of focus, completion mask and group ids; None: all are 1.
        attention: of the text half in the forward that scores.
        update_attention: of the text half in the update.
    """

    score: Callable[[Rollout, MicroBatch], Scores]
    weigh: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    attention: str = "sdpa"
    update_attention: str = "sdpa"


def run(rollout: Rollout, name: str) -> Outcome:
    """Takes one step by the method of that name, and notes the seconds of its phases."""
    lap: dict[str, float] = {}
    outcome = step(rollout, METHODS[name], functools.partial(_timed, lap, rollout.advantages.device))
    rollout.laps.setdefault(name, []).append(lap)
    return outcome


def step(rollout: Rollout, method: Method, watch: Watch) -> Outcome:
    """Takes one step, each phase of it inside `watch(phase)`."""
    with watch("score"), torch.no_grad():
        rollout.model.set_attn_implementation({"text_config": method.attention})
        old_logps, focus = _score(rollout, method)
    token_weights = trajectory_weights = None
    with watch("weigh"):
        if method.weigh is not None:
            token_weights, trajectory_weights = method.weigh(focus, rollout.completion_mask, rollout.group_ids)
    with watch("update"):
        rollout.model.set_attn_implementation({"text_config": method.update_attention})
        losses = _make_gradients(rollout, old_logps, token_weights, trajectory_weights)
    with watch("optimizer"):
        grad_norm = torch.nn.utils.clip_grad_norm_(rollout.model.parameters(), MAX_GRAD_NORM)
        rollout.optimizer.step()
        rollout.optimizer.zero_grad(set_to_none=True)
    return Outcome(token_weights, trajectory_weights, losses, grad_norm)


def warm_up(device: torch.device) -> None:
    """Takes a tiny step by every method: what first steps load and compile is no step's time or memory."""
    rollout = build(TINY, device)
    for name in METHODS:
        run(rollout, name)


def phases(rollout: Rollout, name: str) -> dict[str, Any]:
    """Returns seconds and peak bytes of each phase, and the bytes of parameters and moments, which live throughout.

    Seconds are medians over all steps taken but the first. Bytes are those of torch's tensors in one more step, beyond
    what was live before it: by the allocator's count on a GPU, elsewhere by what the profiler saw allocated and freed,
    which is exact where the resident set of a process is not.
    """
    first, *others = rollout.laps[name]
    peaks = (_cuda_peaks if rollout.advantages.is_cuda else _cpu_peaks)(rollout, METHODS[name])
    return {
        "phases": {
            phase: {
                "seconds": statistics.median(lap[phase] for lap in others or [first]),
                "peak_extra_bytes": peaks[phase],
            }
            for phase in first
        },
        "allocated_bytes": max(peaks.values()),
        "live_bytes": _live_bytes(rollout),
    }


def score_nothing(rollout: Rollout, batch: MicroBatch) -> Scores:
    """Finds the log-probabilities alone."""
    return Scores(_logprobs(rollout, batch).logps)


def score_by_kernels(rollout: Rollout, batch: MicroBatch) -> Scores:
    """Scores the similarity and records the attention of the last layer, in the same forward."""
    length = rollout.prompt_length
    with record_visual_attention(rollout.model, segments="image/query/generated", prompt_length=length) as record:
        found = _logprobs(rollout, batch, hidden_states=True)
    focus = visual_focus_score(found.hidden_states, batch.visual, _completion(rollout, batch))
    return Scores(found.logps, focus[:, length:], focus_from_attention(record, batch.mask))


def score_from_maps(rollout: Rollout, batch: MicroBatch) -> Scores:
    """Takes the attention from the last of the maps that `output_attentions` keeps, and the similarity in torch."""
    with _outputs(rollout.model) as outputs:
        found = _logprobs(rollout, batch, hidden_states=True, output_attentions=True)
    probabilities = outputs[-1].attentions[-1][:, :, rollout.prompt_length :]  # [b, H, T, L]
    mass = (probabilities.float() * batch.visual[:, None, None]).sum(-1).mean(1)
    focus = dense_focus(found.hidden_states, batch.visual, _completion(rollout, batch))
    return Scores(found.logps, focus[:, rollout.prompt_length :], mass * batch.mask)


def score_from_states(rollout: Rollout, batch: MicroBatch) -> Scores:
    """Keeps every layer's states, as `output_hidden_states` does, and loops over the tokens of the last."""
    with _outputs(rollout.model) as outputs:
        found = _logprobs(rollout, batch, output_hidden_states=True)
    states = outputs[-1].hidden_states[-1].float()
    focus = token_loop_focus(states, batch.visual, _completion(rollout, batch))
    return Scores(found.logps, focus[:, rollout.prompt_length :])


def weigh(focus: Tensor, mask: Tensor, group_ids: Tensor, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Weighs by our kernels, or by another implementation of ours."""
    weights = vgpo_weights(focus, mask, group_ids, WEIGHTS, impl=impl)
    return weights.token_weights, weights.trajectory_weights


GRPO, MAPS, STATES = "GRPO, plain", "VGPO with output_attentions", "VGPO with output_hidden_states"
METHODS = {
    OURS: Method(score_by_kernels, weigh, "vgpo", "vgpo"),
    GRPO: Method(score_nothing),
    # Updates need no maps, so that they have the faster attention there.
    MAPS: Method(score_from_maps, functools.partial(weigh, impl="reference"), "eager"),
    STATES: Method(score_from_states, token_loop_weights),
}


def _score(rollout: Rollout, method: Method) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities and focus (B, R) of the whole rollout, 0 where there is none."""
    logps, focus, attention = torch.zeros(3, *rollout.completion_mask.shape, device=rollout.advantages.device)
    for batch in rollout.batches:
        scores = method.score(rollout, batch)
        for whole, found in zip((logps, focus, attention), scores, strict=True):
            if found is not None:
                whole[batch.rows, : found.shape[1]] = found
    return logps, focus


def _make_gradients(
    rollout: Rollout, old_logps: Tensor, token_weights: Tensor | None, trajectory_weights: Tensor | None
) -> Tensor:
    """Adds up the gradients of the loss over all micro-batches; returns each one's share of it."""
    tokens, losses = rollout.completion_mask.sum(), []
    with fused_logprobs(rollout.model) as fused:
        for batch in rollout.batches:
            length = batch.mask.shape[1]
            output = fused.policy_loss(
                batch.arguments,
                old_logps[batch.rows, :length],
                rollout.advantages[batch.rows],
                batch.mask,
                prompt_length=rollout.prompt_length,
                token_weights=None if token_weights is None else token_weights[batch.rows, :length],
                trajectory_weights=None if trajectory_weights is None else trajectory_weights[batch.rows],
                config=LOSS,
                num_items_in_batch=tokens,
            )
            output.loss.backward()
            losses.append(output.loss.detach())
    return torch.stack(losses)


def _logprobs(rollout: Rollout, batch: MicroBatch, *, hidden_states: bool = False, **wanted: bool) -> Any:
    return model_logprobs(
        rollout.model,
        batch.arguments | wanted,
        prompt_length=rollout.prompt_length,
        completion_mask=batch.mask,
        entropy=True,
        hidden_states=hidden_states,
    )


def _completion(rollout: Rollout, batch: MicroBatch) -> Tensor:
    """Returns (b, L) bool: tokens of the completions in the whole sequence."""
    return torch.nn.functional.pad(batch.mask, (rollout.prompt_length, 0))


@contextmanager
def _outputs(model: torch.nn.Module) -> Iterator[list[Any]]:
    """Yields a list to which each forward of the model inside the `with` appends its output."""
    caught: list[Any] = []
    hook = model.register_forward_hook(lambda _module, _arguments, output: caught.append(output))
    try:
        yield caught
    finally:
        hook.remove()


@contextmanager
def _timed(lap: dict[str, float], device: torch.device, phase: str) -> Iterator[None]:
    """Notes the seconds of the block; on a GPU to the end of its kernels, a wait of microseconds beside seconds."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    lap[phase] = time.perf_counter() - start


def _cuda_peaks(rollout: Rollout, method: Method) -> dict[str, int]:
    device, peaks = rollout.advantages.device, {}
    before = torch.cuda.memory_allocated(device)

    @contextmanager
    def watch(phase: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(device)
        yield
        peaks[phase] = torch.cuda.max_memory_allocated(device) - before

    step(rollout, method, watch)
    return peaks


def _cpu_peaks(rollout: Rollout, method: Method) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(rollout, method, record_function)
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    spans = [(event.start_ns(), event.end_ns(), event.name()) for event in events if event.name() in PHASES]
    held, peaks = 0, dict.fromkeys(PHASES, 0)
    for moment, change in changes:
        held += change
        for start, end, phase in spans:
            if start <= moment <= end:
                peaks[phase] = max(peaks[phase], held)
    return peaks


def _live_bytes(rollout: Rollout) -> int:
    """Returns the bytes of the parameters and of what the optimizer keeps of them."""
    kept = [value for state in rollout.optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*rollout.model.parameters(), *kept))
