"""Runs a model over prompts and completions to log-probabilities or the policy loss, without logits.

with FusedHead(model) as fused:
    fused.logprobs(batch, prompt_length=7).logps  # (B, T)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from vgpo_kernels import PolicyLossConfig, PolicyLossOutput, linear_logprobs, linear_policy_loss
from vgpo_kernels._validate import INTEGER, MASK, check_tensor
from vgpo_kernels.integrations.transformers.head_patch import HeadPatch, find_head


class ModelLogprobs(NamedTuple):
    """What a model gives for the T tokens of each completion, 0 where masked.

    Args:
        logps: (B, T) fp32, log-probabilities.
        entropy: (B, T) fp32, of the distribution that the token was drawn from; None unless asked for.
        lse: (B, T) fp32, natural logarithm of the sum of exp(scaled logits).
        hidden_states: (B, L, D), after the final norm; None unless asked for.
    """

    logps: Tensor
    entropy: Tensor | None
    lse: Tensor
    hidden_states: Tensor | None


class FusedHead:
    """What `fused_logprobs` yields: forwards of a model whose output head gives results instead of logits."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._head = find_head(model)
        self._patch = HeadPatch(self._head)
        self._hidden_states: Tensor | None = None

    def __enter__(self) -> "FusedHead":
        self._patch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.__exit__()
        self._hidden_states = None

    @property
    def hidden_states(self) -> Tensor | None:
        """(B, L, D) after the final norm, of the last forward; None unless called with hidden_states=True."""
        return self._hidden_states

    def logprobs(
        self,
        batch: Mapping[str, Any],
        *,
        prompt_length: int,
        completion_mask: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        hidden_states: bool = False,
        impl: str | None = None,
    ) -> ModelLogprobs:
        """Returns log-probabilities of the completions; see `model_logprobs`."""
        targets = _targets(batch, prompt_length)
        mask = _mask_of(batch, prompt_length) if completion_mask is None else completion_mask
        if mask is not None:
            check_tensor("completion_mask", mask, shape=tuple(targets.shape), dtypes=MASK)

        def score(states: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> dict[str, Tensor]:
            kept = None if mask is None else mask.to(states.device)
            found = linear_logprobs(states, weight, targets, mask=kept, entropy=entropy, impl=impl, **head)
            return {name: value for name, value in found._asdict().items() if value is not None}

        found = self._run(batch, targets, temperature, hidden_states, score)
        return ModelLogprobs(found["logps"], found.get("entropy"), found["lse"], self._hidden_states)

    def policy_loss(
        self,
        batch: Mapping[str, Any],
        old_logps: Tensor | None,
        advantages: Tensor,
        completion_mask: Tensor,
        *,
        prompt_length: int,
        ref_logps: Tensor | None = None,
        token_weights: Tensor | None = None,
        trajectory_weights: Tensor | None = None,
        temperature: float = 1.0,
        config: PolicyLossConfig | None = None,
        num_items_in_batch: Tensor | float | None = None,
        memory_budget: int | None = None,
        hidden_states: bool = False,
        impl: str | None = None,
    ) -> PolicyLossOutput:
        """Returns the policy loss of the completions, whose backward gives the model's gradients.

        The gradients of head and hidden states are computed in the forward, chunk by chunk; the backward scales them.

        Args:
            batch, prompt_length, temperature, impl: as of `model_logprobs`.
            old_logps, advantages, completion_mask, ref_logps, token_weights, trajectory_weights, config,
                num_items_in_batch, memory_budget: as of `vgpo_kernels.linear_policy_loss`.
            hidden_states: keep the last hidden states, in `hidden_states` of this object.
        """
        targets = _targets(batch, prompt_length)
        check_tensor("completion_mask", completion_mask, shape=tuple(targets.shape), dtypes=MASK)
        made: list[PolicyLossOutput] = []

        def loss(states: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> dict[str, Tensor]:
            output = linear_policy_loss(
                states,
                weight,
                targets,
                old_logps,
                advantages,
                completion_mask,
                ref_logps=ref_logps,
                token_weights=token_weights,
                trajectory_weights=trajectory_weights,
                config=PolicyLossConfig() if config is None else config,
                num_items_in_batch=num_items_in_batch,
                memory_budget=memory_budget,
                impl=impl,
                **head,
            )
            made[:] = [output._replace(loss=output.loss.detach())]
            return {"loss": output.loss}

        found = self._run(batch, targets, temperature, hidden_states, loss)
        return made[0]._replace(loss=found["loss"])

    def _states(self, head: nn.Linear, hidden: Tensor, length: int) -> Tensor:
        """Returns the states (B, T, D) that predict the completions."""
        name, weight = self._head.name, type(head.weight)
        if weight not in (Tensor, nn.Parameter):
            raise TypeError(f"{name}: expected an output head with a plain weight, got {weight.__name__}")
        if hidden.dim() != 3 or hidden.shape[1] <= length:
            raise ValueError(
                f"{name}: expected its head to get the states (B, n, D) of {length + 1} tokens or more, got "
                f"{tuple(hidden.shape)}"
            )
        # The state before a token predicts it; the last one predicts nothing that was sampled.
        return hidden[:, -length - 1 : -1]

    def _run(
        self, batch: Mapping[str, Any], targets: Tensor, temperature: float, hidden_states: bool, function: Any
    ) -> dict[str, Tensor]:
        """Runs the model, with `function(states, weight, targets, bias=, temperature=, softcap=)` as its head."""
        length = targets.shape[1]

        def compute(head: nn.Linear, hidden: Tensor) -> dict[str, Tensor]:
            states = self._states(head, hidden, length)
            scaled, softcap = self._patch.transform.fold(temperature)
            options = {"bias": head.bias, "temperature": scaled, "softcap": softcap}
            return function(states, head.weight, targets.to(states.device), **options)

        options: dict[str, Any] = {"use_cache": False}
        if not hidden_states:
            # Gemma 4 with shared keys runs its upper layers on these tokens only.
            options["logits_to_keep"] = length + 1
        inputs = {name: value for name, value in options.items() if name in self._head.accepts} | dict(batch)
        caught: list[Tensor] = []
        hook = self._head.decoder.register_forward_hook(lambda _module, _args, output: caught.append(_last(output)))
        try:
            found = self._patch.run(lambda: self._model(**inputs), compute)
        finally:
            hook.remove()
        self._hidden_states = self._checked(caught, batch["input_ids"]) if hidden_states else None
        return found

    def _checked(self, caught: list[Any], ids: Tensor) -> Tensor:
        """Returns the states (B, L, D) of the last forward."""
        states = caught[-1] if caught else None
        if not isinstance(states, Tensor):
            raise TypeError(f"{self._head.name}: its decoder gives no last_hidden_state")
        if states.dim() != 3 or states.shape[:2] != ids.shape:
            raise ValueError(
                f"{self._head.name}: expected a last_hidden_state of all {tuple(ids.shape)} tokens of input_ids, got "
                f"{tuple(states.shape)}"
            )
        return states


def _last(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)


def _targets(batch: Any, prompt_length: Any) -> Tensor:
    """Returns the tokens (B, T) of the completions."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: expected a mapping of the model's arguments, got {type(batch).__name__}")
    for name in ("labels", "logits_to_keep"):
        if batch.get(name) is not None:
            raise ValueError(f"batch: expected no {name}, which have no effect without logits; leave them out")
    if batch.get("decoder_input_ids") is not None:
        raise ValueError("batch: expected prompt and completion together in input_ids, got decoder_input_ids")
    ids = batch.get("input_ids")
    check_tensor("batch['input_ids']", ids, shape=("B", "L"), dtypes=INTEGER)
    length = ids.shape[1]  # type: ignore[union-attr]
    if isinstance(prompt_length, bool) or not isinstance(prompt_length, int):
        raise TypeError(f"prompt_length: expected an int, got {prompt_length!r}")
    if not 1 <= prompt_length < length:
        raise ValueError(f"prompt_length: expected an int from 1 to {length - 1}, got {prompt_length}")
    return ids[:, prompt_length:].long()  # type: ignore[index]


def _mask_of(batch: Mapping[str, Any], prompt_length: int) -> Tensor | None:
    mask = batch.get("attention_mask")
    return mask[:, prompt_length:] if isinstance(mask, Tensor) and mask.dim() == 2 else None
