"""Models, batches and what the logits of the one give for the other, for tests of the replaced head."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_vlms
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from vgpo_kernels import PolicyLossConfig, policy_loss
from vgpo_kernels.integrations.transformers import fused_logprobs
from vgpo_kernels.testing import assert_error_budget

VOCABULARY = tiny_vlms.VOCABULARY
TEMPERATURE = 0.7
LENGTH = 6
LENGTHS = (6, 1, 4)  # of the completions: all of it, a single token, some
PROMPT = 9  # of text alone


def make_text(kind: type, config: type, **fields: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        return tiny_vlms.with_large_weights(kind(config(**tiny_vlms.TEXT | fields)))

    return make


def _final_soft_cap() -> Any:
    model = tiny_vlms.make("soft_capped")
    model.config.get_text_config().final_logit_softcapping = 1.5  # so low that leaving it out would show
    return model


class Multiplying(GraniteForCausalLM):
    """Multiplies by the number that Granite divides by."""

    power = 2

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.config.logits_scaling**self.power
        return output


class Ignoring(Multiplying):
    """Names the number, and does nothing with it after the head."""

    power = 1


MODELS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: tiny_vlms.make(name) for name in tiny_vlms.FAMILIES if name != "soft_capped"},
    "final_soft_cap": _final_soft_cap,
    "granite": make_text(GraniteForCausalLM, GraniteConfig, logits_scaling=3.0, tie_word_embeddings=True),
    "multiplying": make_text(Multiplying, GraniteConfig, logits_scaling=0.25),
    "ignoring": make_text(Ignoring, GraniteConfig, logits_scaling=3.0),
    "cohere": make_text(CohereForCausalLM, CohereConfig, logit_scale=0.3, tie_word_embeddings=True),
}
SMALL = "internvl"
# Another scale than their configuration says: the model is run once more.
READ_AGAIN = ("multiplying", "ignoring")


class Case:
    """A model with prompts of several lengths, completions of several lengths, and what a loss takes."""

    def __init__(self, name: str, model: Any = None) -> None:
        self.model = MODELS[name]() if model is None else model
        torch.manual_seed(2)
        completion = torch.randint(1, 90, (3, LENGTH))
        self.mask = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
        family = "soft_capped" if name == "final_soft_cap" else name
        if family in tiny_vlms.FAMILIES:
            prompts = tiny_vlms.make_batch(family)
            self.batch = tiny_vlms.continued(family, prompts, completion, self.mask.long())
        else:
            ids = torch.randint(1, 90, (3, PROMPT))
            ids[1, :4] = 0
            prompts = {"input_ids": ids}
            whole = torch.cat([ids, completion], 1)
            attention = torch.cat([(ids != 0).long(), self.mask.long()], 1)
            self.batch = {"input_ids": whole, "attention_mask": attention}
        self.prompt = prompts["input_ids"].shape[1]
        self.targets = completion
        # Ratios of e^-0.5 to e^0.5: some are clipped, most are not.
        self.noise = torch.rand(3, LENGTH) - 0.5
        self.advantages = torch.tensor([1.0, -0.5, 2.0])
        self.token_weights = 0.5 + torch.rand(3, LENGTH)

    def to(self, device: str) -> "Case":
        """Moves everything to a device."""
        self.model.to(device)
        self.batch = {name: value.to(device) for name, value in self.batch.items()}
        for name in ("mask", "targets", "noise", "advantages", "token_weights"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def dense(self, dtype: torch.dtype, config: PolicyLossConfig) -> dict[str, Tensor]:
        """Returns what the model's own logits give, in `dtype`."""
        model = copy.deepcopy(self.model).to(dtype)
        batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.batch.items()}
        logits = model(**batch, use_cache=False).logits[:, self.prompt - 1 : -1] / TEMPERATURE
        log_p = logits.log_softmax(-1)
        logps = log_p.gather(-1, self.targets[..., None])[..., 0].masked_fill(~self.mask, 0.0)
        entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(~self.mask, 0.0)
        output = policy_loss(logps, self.old(), self.advantages, self.mask, **self.options(config))
        output.loss.backward()
        found = {"logps": logps.detach(), "entropy": entropy.detach(), "loss": output.loss.detach()}
        return found | gradients_of(model)

    def old(self) -> Tensor:
        return self.noise - math.log(VOCABULARY)

    def options(self, config: PolicyLossConfig) -> dict[str, Any]:
        return {"token_weights": self.token_weights, "ref_logps": self.old() - 0.1, "config": config}

    def fused(self, config: PolicyLossConfig, model: Any = None, **options: Any) -> dict[str, Tensor]:
        """Returns the same without logits."""
        model = self.model if model is None else model
        model.zero_grad()
        given = {"prompt_length": self.prompt, "temperature": TEMPERATURE, **options}
        with fused_logprobs(model) as fused:
            output = fused.policy_loss(
                self.batch, self.old(), self.advantages, self.mask, **given, **self.options(config)
            )
        output.loss.backward()
        found = {"logps": output.logps, "entropy": output.entropy, "loss": output.loss.detach()}
        return found | gradients_of(model)


def assert_all_equal(found: dict[str, Tensor], dense: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Holds each result to the budget that the dense computation in fp32 leaves, and all gradients together to one.

    Each gradient counts relative to its largest element. By itself, one of a norm of 16 elements would be held to how
    lucky the rounding of those few was. One that is nothing but rounding, as that of a bias on keys, which a softmax
    does not see, counts relative to the largest of all.
    """
    assert found.keys() == exact.keys()
    gradients = [name for name in found if name.startswith("gradient of ")]
    for name in found.keys() - {*gradients, "loss"}:
        assert_error_budget(name, found[name], dense[name], exact[name])
    if "loss" in found:
        # One number is as good as the log-probabilities it is made of; its own rounding may be lucky, too.
        made = (torch.cat([x["logps"].flatten(), x["loss"].flatten()]) for x in (found, dense, exact))
        assert_error_budget("log-probabilities and loss", *made)
    scales = {name: exact[name].abs().max() for name in gradients}
    largest = max(scales.values())
    scales = {name: scale if scale > 1e-9 * largest else largest for name, scale in scales.items()}
    together = (
        torch.cat([x[name].double().flatten() / scales[name] for name in gradients]) for x in (found, dense, exact)
    )
    ours, same_dtype, wanted = together
    assert_error_budget("gradients", ours.float(), same_dtype.float(), wanted)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class NoLogits(TorchDispatchMode):
    """Fails if a tensor as wide as the vocabulary has more rows than the probe."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else (made,):
            wide = isinstance(value, Tensor) and value.dim() > 1 and value.shape[-1] == VOCABULARY
            if wide and value.numel() > VOCABULARY:
                raise AssertionError(f"{func} made logits of shape {tuple(value.shape)}")
        return made


@contextmanager
def forbidden_head(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails if the product of the head runs."""
    real = nn.functional.linear
    weight = model.get_output_embeddings().weight

    def linear(states: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        assert matrix is not weight, "the head's forward has run"
        return real(states, matrix, bias)

    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "linear", linear)
        yield


class Wrapper(nn.Module):
    """Calls what is inside, as PEFT and DDP do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Adapted(nn.Module):
    """A linear layer with an addition of low rank, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.base(states) + self.b(self.a(states))


CONFIG = PolicyLossConfig(loss_type="dapo", beta=0.04, epsilon_high=0.28, clip_ratio_dual=3.0)
