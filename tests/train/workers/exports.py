"""Loads published checkpoints under ZeRO-3, changes every parameter, and exports them."""

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from published import PUBLISHED, published_tensors, write_checkpoint
from torch import Tensor

from vgpo_train.config import ConfigError, TrainConfig
from vgpo_train.model.engine import deepspeed_options, load_sharded
from vgpo_train.model.export import check_exportable, export
from vgpo_train.run import distributed

ADDED = 1.0  # to every parameter


def export_families(config: TrainConfig, folder: Path) -> dict[str, str]:
    """Writes, loads, changes and exports checkpoints below `folder`; returns by their names what was refused."""
    if distributed.is_main():
        for name, (model, tensors, options) in _sources().items():
            write_checkpoint(folder / name / "source", model, tensors, **options)
    torch.distributed.barrier()
    said = {}
    for name in sorted(path.name for path in folder.iterdir()):
        source = folder / name / "source"
        config.model.path = str(source)
        try:
            loaded = load_sharded(config.model, deepspeed_options(config))
            check_exportable(loaded, source)
        except ConfigError as error:
            said[name] = str(error)
            continue
        for parameter in loaded.parameters():
            with GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
                parameter += ADDED
        export(loaded, source, folder / name / "final")
    return said


def _sources() -> dict[str, tuple[Any, dict[str, Tensor], dict[str, Any]]]:
    """Returns model, tensors and form of the checkpoints, by their names."""
    sources: dict[str, tuple[Any, dict[str, Tensor], dict[str, Any]]] = {}
    for family in PUBLISHED:
        sources[family] = (*published_tensors(family), {})
    model, tensors, _ = sources["qwen2_5_vl"]
    norm = "model.norm.weight"
    two_files = {"files": 2}
    sources["two files, two dtypes"] = (model, tensors | {norm: tensors[norm].float() + 2**-20}, two_files)
    sources["without a norm"] = (model, {name: tensor for name, tensor in tensors.items() if name != norm}, {})
    model, tensors, _ = sources["llava"]
    unused = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    unused |= {"mtp.0.weight": torch.rand(3, 2), "mtp.1.weight": torch.tensor(7)}
    sources["pickled, with tensors of no use"] = (model, tensors | unused, {"files": 2, "safe": False})
    model, tensors, _ = sources["gemma3"]
    head, embedding = "language_model.lm_head.weight", tensors["language_model.model.embed_tokens.weight"]
    sources["tied, head and all"] = (model, tensors | {head: embedding.clone()}, {})
    sources["tied, with another head"] = (model, tensors | {head: embedding + 1}, {})
    return sources
