"""Builds the DeepSpeed engines: ZeRO-3 options, the sharded policy, its optimizer, the frozen reference."""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import GenerationConfig, get_scheduler
from transformers.integrations import HfDeepSpeedConfig

from vgpo_train.config import ConfigError, ModelConfig, TrainConfig
from vgpo_train.model.export import check_exportable
from vgpo_train.model.loading import load_model
from vgpo_train.run import distributed

_OWNED = {  # DeepSpeed keys that follow from the YAML file, with the option that sets them
    "train_batch_size": "optim.update_prompts",
    "train_micro_batch_size_per_gpu": "optim.micro_batch",
    "gradient_accumulation_steps": "optim.update_prompts and optim.micro_batch",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype (float32 or bfloat16)",
}
# Micro-batches are summed in float32: in bfloat16, a sum of 512 equal gradients is a quarter short.
_ACCUMULATION = "grad_accum_dtype"


def start_distributed() -> None:
    """Starts DeepSpeed's process group: NCCL on GPUs, gloo on CPUs."""
    if not torch.cuda.is_available():
        # An extra all-reduce for inference, which DeepSpeed would compile here: that needs a compiler and a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # The launcher's processes share the cores; more threads than cores only wait for each other.
        local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"  # DeepSpeed's, torchrun's
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(local)))
    else:
        torch.cuda.set_device(distributed.device())
    deepspeed.init_distributed()


def deepspeed_options(config: TrainConfig) -> dict[str, Any]:
    """Returns the options of the DeepSpeed JSON, with those that follow from the YAML file.

    Raises:
        ConfigError: the file is missing or no JSON, is not for ZeRO-3, or sets what the YAML file owns.
    """
    path = Path(config.deepspeed)
    try:
        options = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"deepspeed: cannot read {path}: {error.strerror}; copy vgpo_train/configs/zero3.json there, or name "
            "another file of DeepSpeed's options"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"deepspeed: {path} is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"deepspeed: {path}: expected an object, got {type(options).__name__}")
    for key, owner in _OWNED.items():
        if key in options:
            raise ConfigError(f"deepspeed: {path}: {key!r} is set by {owner} of the YAML file; remove it")
    data_types = options.get("data_types", {})
    if data_types.get(_ACCUMULATION, "fp32") != "fp32":
        raise ConfigError(
            f"deepspeed: {path}: data_types.{_ACCUMULATION}: expected 'fp32', got {data_types[_ACCUMULATION]!r}, in "
            "which gradients of many micro-batches do not add up; remove it"
        )
    stage = options.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise ConfigError(f"deepspeed: {path}: expected zero_optimization.stage 3, got {stage!r}")
    return options | {
        "train_micro_batch_size_per_gpu": config.optim.micro_batch,
        # Updates differ in their number of micro-batches, so the trainer itself marks the boundaries.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.max_grad_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "data_types": data_types | {_ACCUMULATION: "fp32"},
    }


def build_policy(config: TrainConfig, total_updates: int) -> Any:
    """Returns the DeepSpeed engine around the trainable policy.

    Args:
        config: the run's configuration.
        total_updates: optimizer steps of the whole run, for the learning-rate schedule.
    """
    options = deepspeed_options(config)
    model = load_sharded(config.model, options)
    check_exportable(model, config.model.path)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = _optimizer(config, model, options)
    scheduler = get_scheduler(
        config.optim.schedule,
        optimizer,
        num_warmup_steps=config.optim.warmup_updates,
        num_training_steps=total_updates,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=options)
    engine.train()  # from_pretrained leaves eval mode, in which gradient checkpointing is silently off
    return engine


def build_reference(config: TrainConfig) -> Any:
    """Returns the DeepSpeed engine around the frozen starting model, sharded like the policy."""
    options = deepspeed_options(config)
    model = load_sharded(config.model, options)
    model.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=options)
    engine.eval()
    return engine


def load_sharded(config: ModelConfig, options: dict[str, Any]) -> Any:
    keep_alive = HfDeepSpeedConfig(options)  # from_pretrained shards while it loads as long as this lives
    model = load_model(
        config.path,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    del keep_alive
    # A checkpoint's own sampling defaults (such as a repetition penalty) would be merged into every rollout.
    model.generation_config = GenerationConfig()
    _apply_liger(config, model)
    return model


def _apply_liger(config: ModelConfig, model: Any) -> None:
    on_gpu = torch.cuda.is_available()
    if config.liger == "off" or (config.liger == "auto" and not on_gpu):
        return
    if not on_gpu:
        raise ConfigError("model.liger: Liger's kernels need a GPU; set it to auto or off")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is None:
        if config.liger == "on":
            raise ConfigError(f"model.liger: Liger knows no model type {model.config.model_type!r}; set it to off")
        return
    # Only norms, MLPs and rotary embeddings: the loss is ours. Families differ in which of these they have.
    wanted = dict.fromkeys(("rope", "rms_norm", "swiglu", "geglu"), True)
    wanted |= dict.fromkeys(("cross_entropy", "fused_linear_cross_entropy"), False)
    known = inspect.signature(apply).parameters
    apply(model=model, **{name: value for name, value in wanted.items() if name in known})


def _optimizer(config: TrainConfig, model: Any, options: dict[str, Any]) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.requires_grad and _dimensions(p) > 1]
    plain = [p for p in model.parameters() if p.requires_grad and _dimensions(p) <= 1]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, config.optim.weight_decay), (plain, 0.0))
        if params
    ]
    settings = {"lr": config.optim.lr, "betas": tuple(config.optim.betas), "eps": config.optim.eps}
    offload = options["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if offload == "none":
        return torch.optim.AdamW(groups, **settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)


def _dimensions(parameter: torch.nn.Parameter) -> int:
    # A sharded parameter is a flat stub; DeepSpeed keeps its true shape beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape))
