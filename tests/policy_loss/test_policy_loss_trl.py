"""The policy loss against the trainer code of TRL 1.16, called as it is on the same tensors."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from policy_loss_cases import (
    Inputs,
    assert_mean_within_budget,
    loss_and_gradient,
    mean_magnitude,
    random_inputs,
)
from torch import Tensor

from vgpo_kernels.policy_loss import PolicyLossConfig
from vgpo_kernels.testing import assert_error_budget

pytest.importorskip("trl", minversion="1.16")
from trl import GRPOTrainer

# A full row, an odd one, a single token, a row of padding.
LENGTHS = [11, 7, 1, 0]
MAX_COMPLETION_LENGTH = 16


def configs() -> list[PolicyLossConfig]:
    """Every loss type x importance-sampling level x delta x KL; "cispo" knows no delta."""
    shared = {"epsilon_low": 0.2, "max_completion_length": MAX_COMPLETION_LENGTH}
    made = []
    for loss_type, level, kl in itertools.product(
        ("grpo", "bnpo", "dr_grpo", "dapo", "cispo"),
        ("token", "sequence"),
        ({}, {"beta": 0.04}, {"beta": 0.04, "kl_importance_weighted": True}),
    ):
        if loss_type == "cispo":
            made.append(PolicyLossConfig(loss_type, level, epsilon_high=1.3, **kl, **shared))
            continue
        for delta in (None, 1.5):
            made.append(PolicyLossConfig(loss_type, level, epsilon_high=0.28, delta=delta, **kl, **shared))
    return made


def config_id(config: PolicyLossConfig) -> str:
    weighted = "-weighted" if config.kl_importance_weighted else ""
    return f"{config.loss_type}-{config.importance_sampling_level}-delta{config.delta}-beta{config.beta}{weighted}"


every_config = pytest.mark.parametrize("config", configs(), ids=config_id)


class SingleProcess:
    """The part of an accelerator that the loss uses, for one process that stands for `num_processes`."""

    def __init__(self, num_processes: int):
        self.num_processes = num_processes

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor


def trainer_for(
    config: PolicyLossConfig,
    logps: Tensor,
    *,
    accumulation_steps: int = 1,
    steps_per_generation: int = 1,
    num_processes: int = 1,
) -> SimpleNamespace:
    """What TRL's method reads of its trainer; the model's pass gives `logps`, its entropy is -logps."""
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, -logps.detach(), None),
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SingleProcess(num_processes),
        args=SimpleNamespace(
            delta=config.delta,
            use_bias_correction_kl=config.kl_importance_weighted,
            steps_per_generation=steps_per_generation,
        ),
        aux_loss_enabled=False,
        beta=config.beta,
        current_gradient_accumulation_steps=accumulation_steps,
        epsilon_high=config.epsilon_high,
        epsilon_low=config.epsilon_low,
        importance_sampling_level=config.importance_sampling_level,
        loss_type=config.loss_type,
        max_completion_length=config.max_completion_length,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )


def trl_loss(inputs: Inputs, config: PolicyLossConfig, num_items: int, **options):
    """TRL's loss, its gradient, and the metrics it logged."""
    logps = inputs.logps.detach().clone().requires_grad_()
    trainer = trainer_for(config, logps, **options)
    mask = inputs.completion_mask.long()
    batch = {
        "prompt_ids": torch.zeros(len(mask), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 2, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": inputs.advantages,
        "num_items_in_batch": torch.tensor(num_items),
    }
    optional = {"old_per_token_logps": inputs.old_logps, "ref_per_token_logps": inputs.ref_logps}
    batch |= {name: value for name, value in optional.items() if value is not None}
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    loss.backward()
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), logps.grad, logged


def num_items_for(config: PolicyLossConfig, tokens: float) -> float | None:
    return tokens if config.divides_by_num_items else None


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-11, atol=1e-13)


@every_config
@pytest.mark.parametrize("shape", ["advantages-BT", "advantages-B"])
def test_loss_and_gradient(config, shape):
    inputs = random_inputs(LENGTHS, 11, weights=False).map(lambda x: x.double())
    if shape == "advantages-B":
        inputs = inputs.replace(advantages=inputs.advantages[:, 0].contiguous())
    num_items = 31
    loss, gradient, _ = trl_loss(inputs, config, num_items)
    output, ours = loss_and_gradient(inputs, config, num_items_in_batch=num_items_for(config, num_items))
    assert_close(output.loss, loss)
    assert_close(ours, gradient)


@every_config
def test_without_old_logps(config):
    inputs = random_inputs(LENGTHS, 11, weights=False).map(lambda x: x.double()).replace(old_logps=None)
    loss, gradient, _ = trl_loss(inputs, config, sum(LENGTHS))
    output, ours = loss_and_gradient(inputs, config)
    assert_close(output.loss, loss)
    assert_close(ours, gradient)


@every_config
def test_kernels_are_as_exact_as_trl_in_float32(config, device):
    inputs = random_inputs(LENGTHS, 11, weights=False)
    exact = trl_loss(inputs.map(lambda x: x.double()), config, 31)
    same_dtype = trl_loss(inputs, config, 31)
    moved = inputs.map(lambda x: x.to(device)).replace(completion_mask=inputs.completion_mask.to(device))
    output, gradient = loss_and_gradient(moved, config, num_items_in_batch=num_items_for(config, 31), impl="triton")
    magnitude = mean_magnitude(
        output.per_token_loss.cpu().double(), inputs.completion_mask, config, num_items_for(config, 31)
    )
    assert_mean_within_budget("loss", output.loss.detach().cpu(), same_dtype[0], exact[0], magnitude)
    assert_error_budget("gradient", gradient.cpu(), same_dtype[1], exact[1])


@every_config
def test_accumulated_micro_batches(config):
    """A generation batch of two optimizer steps of three micro-batches, on two processes of like size."""
    accumulation_steps, num_processes, generation_steps = 3, 2, 6
    window = [
        random_inputs(lengths, 11, weights=False).map(lambda x: x.double()) for lengths in ([11, 7], [1, 0], [4, 10])
    ]
    generation_tokens = 131
    # TRL counts the tokens of all processes and of the whole generation batch; the caller brings them to one
    # process and one accumulation window.
    tokens = generation_tokens / num_processes * accumulation_steps / generation_steps
    divisor = 1 if config.divides_by_num_items else accumulation_steps
    theirs, ours = [], []
    for inputs in window:
        loss, gradient, _ = trl_loss(
            inputs,
            config,
            generation_tokens,
            accumulation_steps=accumulation_steps,
            steps_per_generation=generation_steps,
            num_processes=num_processes,
        )
        theirs.append((loss, gradient))
        output, gradient = loss_and_gradient(inputs, config, num_items_in_batch=num_items_for(config, tokens))
        ours.append((output.loss / divisor, gradient / divisor))
    assert_close(sum(loss for loss, _ in ours), sum(loss for loss, _ in theirs))
    for (_, actual), (_, expected) in zip(ours, theirs, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_accumulation_with_the_windows_tokens_is_the_whole_batch(loss_type):
    """However the rows are split, the sum of the losses and the gradients are those of one batch."""
    config = PolicyLossConfig(loss_type, epsilon_high=1.3)
    whole = random_inputs([11, 7, 1, 0, 4, 10], 11).map(lambda x: x.double())
    output, gradient = loss_and_gradient(whole, config)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    split = [
        loss_and_gradient(
            Inputs(**{name: value[part] for name, value in whole.__dict__.items()}),
            config,
            num_items_in_batch=33,
        )
        for part in parts
    ]
    assert_close(sum(part.loss for part, _ in split), output.loss.detach())
    assert_close(torch.cat([part for _, part in split]), gradient)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss_type", ["bnpo", "cispo"])
def test_metrics(loss_type, weighted):
    """Means over tokens, as TRL logs them at token level."""
    high = 1.3 if loss_type == "cispo" else 0.28
    config = PolicyLossConfig(loss_type, epsilon_high=high, beta=0.04, kl_importance_weighted=weighted)
    inputs = random_inputs(LENGTHS, 11, weights=False).map(lambda x: x.double())
    _, _, logged = trl_loss(inputs, config, 31)
    metrics = inputs.call(config).metrics
    names = {"kl": "kl", "entropy": "entropy_proxy"}
    if loss_type == "cispo":
        names |= {"cispo_clip_ratio": "clip_fraction_high"}
    else:
        names |= {"clip_ratio/low_mean": "clip_fraction_low", "clip_ratio/high_mean": "clip_fraction_high"}
    for theirs, ours in names.items():
        assert metrics[ours].item() == pytest.approx(logged[theirs], rel=1e-6), ours
        assert logged[theirs] > 0
