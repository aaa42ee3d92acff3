"""The training configuration: typed, checked once, read from a YAML file and `key=value` arguments."""

import difflib
import functools
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import SchedulerType
from yaml import YAMLError

from vgpo_kernels import PolicyLossConfig, VGPOConfig
from vgpo_train.data.columns import Columns


@dataclass
class ModelConfig:
    """The policy: a checkpoint folder that `from_pretrained` loads."""

    path: str = "???"
    dtype: str = "bfloat16"  # float32 | bfloat16
    attn_implementation: str = "vgpo"  # sdpa whose attention can be recorded; or a name of transformers
    gradient_checkpointing: bool = False
    liger: str = "auto"  # auto: Liger's RMSNorm, SwiGLU and RoPE on a GPU; on; off
    trust_remote_code: bool = False


@dataclass
class DataConfig:
    """Prompts with pictures: rows {problem, answer, images} of JSONL or Parquet files."""

    train: Any = "???"  # a file, a folder, a glob, or a list of these
    test: Any = None
    test_limit: int | None = None
    columns: Any = "auto"  # auto | virl39k | mmk12 | a mapping such as {problem: question, images: figures}
    test_columns: Any = None  # None: as `columns`
    system_prompt: str | None = None
    suffix: str | None = None  # appended to every problem, such as how to format the answer
    max_prompt_length: int = 4096
    invalid: str = "refuse"  # rows that cannot be used, all found before the first step: refuse | drop
    min_pixels: int | None = None  # of a picture after resizing; None: the bound of the checkpoint's processor
    max_pixels: int | None = None


@dataclass
class RolloutConfig:
    """How completions are sampled."""

    engine: str = "transformers"
    prompts: int = 512  # per step, over all ranks
    completions: int = 8  # per prompt: the group
    batch_size: int = 32  # rows generated at once on a rank
    max_new_tokens: int = 2048
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    gather: str = "auto"  # whole parameters on each rank during a rollout: auto (when they fit) | always | never


@dataclass
class RewardConfig:
    """Rewards by their registered names, and which groups are worth an update."""

    weights: dict[str, float] = field(default_factory=dict)
    accuracy: str = "???"  # the reward that counts as being right, also on the held-out split
    timeout: float = 5.0  # seconds that one reward may take for one completion; then it counts as failed
    normalize_std: bool = True  # divide a group's advantages by its standard deviation
    filter_equal: bool = True  # drop groups whose rewards are all equal
    filter_accuracy: tuple[float, float] | None = None  # keep groups with low < mean accuracy < high


@dataclass
class FocusConfig:
    """Where the visual focus of a token is read; both sources are logged, `source` drives the weights."""

    source: str = "similarity"  # similarity | attention
    layers: Any = "last"  # whose attention is averaged: last | all | a list of numbers, negative ones from the end
    per_image: bool = False  # similarity: one prototype an image instead of one for all
    log: bool = True  # score focus for the metrics even if the algorithm does not use it


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    schedule: str = "constant_with_warmup"  # a name of transformers.get_scheduler
    warmup_updates: int = 0
    max_grad_norm: float = 1.0
    update_prompts: int = 128  # prompts per optimizer step, over all ranks
    micro_batch: int = 4  # rows in one forward and backward on a rank
    memory_budget_mb: float | None = None  # of logits and their gradient in an update; None: the library's default

    def memory_budget(self) -> int | None:
        """Returns the budget in bytes."""
        return None if self.memory_budget_mb is None else int(self.memory_budget_mb * 1e6)


@dataclass
class TrainConfig:
    """Everything a run needs; `TrainConfig` is also the schema that the YAML files are checked against."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    focus: FocusConfig = field(default_factory=FocusConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    algorithm: str = "vgpo"
    recipe: str = "paper"  # paper | official | balanced
    vgpo: dict[str, Any] = field(default_factory=dict)  # fields of VGPOConfig that differ from the recipe
    loss: dict[str, Any] = field(default_factory=dict)  # fields of PolicyLossConfig
    deepspeed: str = "zero3.json"  # DeepSpeed's own options; relative to the YAML file
    output_dir: str = "???"
    seed: int = 0
    steps: int | None = None  # None: `epochs` passes over the training data
    epochs: float = 1.0
    eval_every: int = 0  # steps; 0: before the first and after the last
    eval_temperature: float = 0.0  # 0: greedy
    save_every: int = 50
    keep_checkpoints: int = 2
    resume: str = "no"  # no | auto: from the last checkpoint in output_dir, if there is one
    tensorboard: bool = True

    def vgpo_config(self) -> VGPOConfig:
        """Returns the recipe with the fields of `vgpo` replaced."""
        return VGPOConfig.from_recipe(self.recipe, **_tuples(self.vgpo))

    def loss_config(self) -> PolicyLossConfig:
        """Returns the terms of the policy loss; the length that `dr_grpo` divides by is the rollout's."""
        options = {"max_completion_length": self.rollout.max_new_tokens} | dict(self.loss)
        known = [f.name for f in fields(PolicyLossConfig)]
        for key in options:
            if key not in known:
                raise ConfigError(f"loss.{key}: no such option{nearest(key, known)}")
        return PolicyLossConfig(**_tuples(options))


_POSITIVE = (
    "data.max_prompt_length",
    "data.min_pixels",
    "data.max_pixels",
    "data.test_limit",
    "rollout.prompts",
    "rollout.batch_size",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "optim.lr",
    "optim.update_prompts",
    "optim.micro_batch",
    "optim.memory_budget_mb",
    "rewards.timeout",
    "steps",
    "epochs",
    "save_every",
    "keep_checkpoints",
)
_AT_LEAST = {
    "rollout.completions": 2,  # an advantage compares the completions of a prompt
    "rollout.top_k": 0,
    "optim.eps": 0,
    "optim.weight_decay": 0,
    "optim.warmup_updates": 0,
    "optim.max_grad_norm": 0,  # 0: no clipping
    "eval_every": 0,
    "eval_temperature": 0,
    "seed": 0,
}


_REPLACED = {"data.overlong": "data.invalid (refuse | drop), for all rows that cannot be used"}
RECORDABLE = "vgpo"  # the model.attn_implementation whose attention the scoring pass records


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key."""


def load_config(file: str | Path, overrides: list[str]) -> TrainConfig:
    """Reads `file`, applies `key=value` overrides and checks the result.

    Args:
        file: YAML; its keys are the fields of `TrainConfig`.
        overrides: such as "optim.lr=1e-4" or "algorithm=grpo".

    Raises:
        ConfigError: a missing file, an unknown key (with the nearest known one) or a value that cannot be.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"--config: no such file: {path}")
    merged = OmegaConf.structured(TrainConfig)
    try:
        from_file = OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(from_file, DictConfig):
        raise ConfigError(f"{path}: expected keys and values, got {type(from_file).__name__}")
    for origin, layer in [(str(path), from_file), ("command line", _overrides(overrides))]:
        _check_keys(layer, merged, origin)
        for mapping in _replaced_mappings(overrides) if origin == "command line" else ():
            OmegaConf.update(merged, mapping, {}, merge=False)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}: {error}") from error
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(f"{path}: no value for {', '.join(missing)}")
    config: TrainConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    _restore_words(config)
    config.deepspeed = str((path.parent / config.deepspeed).resolve())
    _check(config)
    return config


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes `config` as YAML that `load_config` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.structured(config), path)


def _overrides(arguments: list[str]) -> DictConfig:
    for argument in arguments:
        if "=" not in argument:
            raise ConfigError(f"expected key=value, got {argument!r}")
        try:
            OmegaConf.from_dotlist([argument])
        except YAMLError as error:
            key, _, value = argument.partition("=")
            raise ConfigError(
                f"{key}: expected a value that YAML reads, got {value}; in quotes it is text: '{key}=\"{value}\"'"
            ) from error
    return OmegaConf.from_dotlist(arguments)


def _replaced_mappings(arguments: list[str]) -> list[str]:
    """Returns the mappings that are given whole, such as `rewards.weights={...}`: nothing of the file's stays."""
    keys = {argument.partition("=")[0] for argument in arguments}
    mappings = ("rewards.weights", "vgpo", "loss", "data.columns", "data.test_columns")
    return [mapping for mapping in mappings if mapping in keys]


def _check_keys(layer: DictConfig, schema: DictConfig, origin: str, prefix: str = "") -> None:
    free = {"vgpo", "loss", "weights", "columns", "test_columns"}  # mappings whose keys are checked later
    for key in layer:
        known = [str(k) for k in schema]
        if f"{prefix}{key}" in _REPLACED:
            raise ConfigError(f"{origin}: {prefix}{key} is now {_REPLACED[f'{prefix}{key}']}")
        if key not in known:
            raise ConfigError(f"{origin}: {prefix}{key}: no such option{nearest(str(key), known)}")
        child, expected = layer._get_node(key), schema._get_node(key)
        if key in free or not isinstance(expected, DictConfig):
            continue
        if not isinstance(child, DictConfig):
            raise ConfigError(f"{origin}: {prefix}{key}: expected keys and values, got {layer[key]!r}")
        _check_keys(child, expected, origin, f"{prefix}{key}.")


def _restore_words(config: TrainConfig) -> None:
    # YAML reads the bare words on, off and no as booleans.
    config.model.liger = {"True": "on", "False": "off"}.get(config.model.liger, config.model.liger)
    config.resume = {"False": "no"}.get(config.resume, config.resume)


def nearest(key: str, known: list[str]) -> str:
    """Returns "; did you mean ...?" with the known name that is most like `key`; nothing if none is known."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"; did you mean {close[0]!r}?" if close else ""


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def _check(config: TrainConfig) -> None:
    _check_choices(config)
    _check_ranges(config)
    _check_focus(config)
    _check_data(config)
    for build in (config.vgpo_config, config.loss_config):
        try:
            build()
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error
    if config.optim.update_prompts > config.rollout.prompts or config.rollout.prompts % config.optim.update_prompts:
        raise ConfigError(
            f"optim.update_prompts: expected a divisor of rollout.prompts ({config.rollout.prompts}), "
            f"got {config.optim.update_prompts}"
        )
    if config.rewards.accuracy not in config.rewards.weights:
        raise ConfigError(
            f"rewards.accuracy: expected one of rewards.weights ({', '.join(config.rewards.weights)}), "
            f"got {config.rewards.accuracy!r}"
        )


def _check_choices(config: TrainConfig) -> None:
    choices = {
        "model.dtype": (config.model.dtype, ("float32", "bfloat16")),
        "model.liger": (config.model.liger, ("auto", "on", "off")),
        "rollout.gather": (config.rollout.gather, ("auto", "always", "never")),
        "data.invalid": (config.data.invalid, ("refuse", "drop")),
        "focus.source": (config.focus.source, ("similarity", "attention")),
        "optim.schedule": (config.optim.schedule, tuple(kind.value for kind in SchedulerType)),
        "resume": (config.resume, ("no", "auto")),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise ConfigError(f"{key}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_ranges(config: TrainConfig) -> None:
    for key in _POSITIVE:
        value = _value(config, key)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{key}: expected a positive number, got {value}")
    for key, least in _AT_LEAST.items():
        if not least <= _value(config, key) < math.inf:
            raise ConfigError(f"{key}: expected a number of at least {least}, got {_value(config, key)}")
    if not 0 < config.rollout.top_p <= 1:
        raise ConfigError(f"rollout.top_p: expected a number in (0, 1], got {config.rollout.top_p}")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ConfigError(f"optim.betas: expected two numbers in [0, 1), got {tuple(config.optim.betas)}")
    for name, weight in config.rewards.weights.items():
        if not math.isfinite(weight):
            raise ConfigError(f"rewards.weights.{name}: expected a finite number, got {weight}")
    limits = config.rewards.filter_accuracy
    if limits is not None and not limits[0] < limits[1]:
        raise ConfigError(f"rewards.filter_accuracy: expected low < high, got {tuple(limits)}")


def _check_focus(config: TrainConfig) -> None:
    layers = config.focus.layers
    if isinstance(layers, list):
        known = bool(layers) and all(type(layer) is int for layer in layers)
    else:
        known = layers in ("last", "all")
    if not known:
        raise ConfigError(f"focus.layers: expected 'last', 'all' or a list of layer numbers, got {layers!r}")
    if config.focus.source == "attention" and config.model.attn_implementation != RECORDABLE:
        raise ConfigError(
            f"model.attn_implementation: expected {RECORDABLE!r} with focus.source=attention, "
            f"got {config.model.attn_implementation!r}, whose attention cannot be recorded"
        )


def _check_data(config: TrainConfig) -> None:
    for key, source in (("data.train", config.data.train), ("data.test", config.data.test)):
        parts = source if isinstance(source, list) else [source]
        if not (key == "data.test" and source is None) and not (parts and all(isinstance(p, str) and p for p in parts)):
            raise ConfigError(f"{key}: expected a file, a folder, a glob or a list of these, got {source!r}")
    for key, columns in (("data.columns", config.data.columns), ("data.test_columns", config.data.test_columns)):
        if columns is not None or key == "data.columns":
            try:
                Columns(columns)
            except ValueError as error:
                raise ConfigError(f"{key}: {error}") from error


def _value(config: TrainConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)
