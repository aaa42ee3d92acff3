"""Writes the trained policy under the tensor names, shapes and dtypes of the checkpoint that it came from.

transformers renames, merges and splits tensors while it loads a checkpoint, and what its saving reverts is not always
what its loading applied. Here each tensor of the checkpoint is followed into the model, and back.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from deepspeed.runtime.zero import GatheredParameters
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from vgpo_train.config import ConfigError
from vgpo_train.model.loading import MODEL_FILES, checkpoint_folder, copy_processor_files
from vgpo_train.run import distributed
from vgpo_train.run.checkpoint import write_json

logger = logging.getLogger(__name__)

_SHOWN = 5  # names in a message


@dataclass
class Match:
    """Tensors of a checkpoint, and the entries of the model's state dict that they are loaded into.

    Without a conversion it is one tensor and one entry, of equal shape.
    """

    layer: str  # the first entry
    conversion: WeightConverter | None
    sources: dict[str, Tensor] = field(default_factory=dict)  # on the meta device
    patterns: dict[str, str] = field(default_factory=dict)  # of `conversion`: which of them a source is
    targets: list[str] = field(default_factory=list)

    def convert(self, model: Any, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the entries that loading makes of the tensors `sources`."""
        if self.conversion is None:
            (tensor,) = sources.values()
            return {self.layer: tensor}
        conversion = deepcopy(self.conversion)
        for name, tensor in sources.items():
            conversion.add_tensor(self.layer, name, self.patterns[name], tensor)
        made = conversion.convert(self.layer, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def revert(self, model: Any, entries: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors that loading converts to `entries`; values that it drops are those of `sources`."""
        if self.conversion is None:
            (name,) = sources
            return {name: entries[self.layer]}
        # A conversion moves values: converting their indices gives the place of each.
        sizes = [tensor.numel() for tensor in sources.values()]
        numbers = torch.arange(sum(sizes)).split(sizes)
        shapes = [tensor.shape for tensor in sources.values()]
        numbered = {name: own.view(shape) for name, own, shape in zip(sources, numbers, shapes, strict=True)}
        places = self.convert(model, numbered)
        dtype = next(iter(entries.values())).dtype
        values = torch.cat([tensor.to(dtype).flatten() for tensor in sources.values()])
        for name, entry in entries.items():
            values[places[name].flatten()] = entry.flatten()
        parts = values.split(sizes)
        return {name: part.view(shape).clone() for name, part, shape in zip(sources, parts, shapes, strict=True)}


def check_weights(folder: str | Path) -> None:
    """Checks that a checkpoint folder has weights that can be read and trained, without loading them.

    Raises:
        FileNotFoundError: the folder or its weights are missing.
        ConfigError: a weight file or config.json cannot be read, or the weights are quantized.
    """
    path = checkpoint_folder(folder)
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except ValueError as error:  # no UTF-8 or no JSON
        raise ConfigError(f"model.path: cannot read {path / 'config.json'}: {error}") from error
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in ("quantization_config", "compression_config"):
            if part.get(name):
                raise ConfigError(
                    f"model.path: {path}: expected weights that can be trained, got quantized ones ({name} of "
                    f"config.json: {part[name].get('quant_method')}); take the checkpoint that they were made from"
                )
    _read_all(path, "meta")


def check_exportable(model: Any, folder: str | Path) -> None:
    """Checks that a model just loaded can be written back tensor by tensor: no training is lost to its export.

    Args:
        model: as `from_pretrained` returned it, sharded or not; all ranks call this together.
        folder: the checkpoint folder that it came from.

    Raises:
        ConfigError: on every rank, naming the tensors: a parameter is in no tensor of the checkpoint, does not hold
            the checkpoint's values (in its own dtype), or cannot be turned back into the checkpoint's tensors.
    """
    matches, unused = match_tensors(model, folder)
    state = model.state_dict(keep_vars=True)
    found = {id(state[target]) for match in matches for target in match.targets}
    problems = [
        f"parameter {name!r} is in no tensor of the checkpoint"
        for name, parameter in model.named_parameters()
        if id(parameter) not in found
    ]
    originals = _read_all(folder) if distributed.is_main() else {}
    tried = set()
    for match in matches:
        entries = _gathered(state, match.targets)
        if not distributed.is_main():
            continue
        sources = {name: originals[name] for name in match.sources}
        problems += [
            f"{name!r} does not hold the values of {_listed(match.sources)}"
            for name in _different(entries, match.convert(model, sources))
        ]
        kind = (*match.patterns.values(), *(tensor.shape for tensor in sources.values()))
        if match.conversion is not None and kind not in tried:
            tried.add(kind)  # the layers of a model are alike
            problems += [
                f"tensor {name!r} is not what comes out of {_listed(entries)}"
                for name in _different(match.revert(model, entries, sources), sources)
            ]
    _raise_together(
        problems,
        f"model.path: {folder} could not be written back as it is",
        f"; complete the checkpoint, correct its config.json (tie_word_embeddings, for a head of its own), or use "
        f"another version of transformers than {transformers.__version__}",
    )
    if unused and distributed.is_main():
        logger.warning("%s: tensors that the model does not use are exported as they are: %s", folder, _listed(unused))


def export(model: Any, source_folder: str | Path, target_folder: Path) -> None:
    """Writes the policy as the checkpoint folder that it came from, with other values.

    Names, shapes and dtypes of the tensors, their division into files, configurations and processor are the source's;
    weights in another format become safetensors. Rank 0 holds one weight file and the parameters of one match.

    Args:
        model: the trained model, sharded or not; all ranks call this together.
        source_folder: the checkpoint folder that it came from.
        target_folder: it appears once it is whole, in place of what was there.

    Raises:
        ConfigError: on every rank, naming the tensors that would differ from the source's.
    """
    source, partial = checkpoint_folder(source_folder), target_folder.with_name(target_folder.name + ".partial")
    matches, _ = match_tensors(model, source)
    state = model.state_dict(keep_vars=True)
    originals = _read_all(source) if distributed.is_main() else {}
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        copy_processor_files(source, partial)
    problems: list[str] = []
    for file in weight_files(source):
        names = _read(file, "meta").keys()
        tensors: dict[str, Tensor] = {}
        for match in matches:
            if match.sources.keys() & names:
                entries = _gathered(state, match.targets)
                if distributed.is_main():
                    tensors |= match.revert(model, entries, {name: originals[name] for name in match.sources})
        if distributed.is_main():
            problems += _write(partial, file, {name: (originals[name], tensors.get(name)) for name in names})
    _raise_together(problems, f"{target_folder}: the export would differ from {source}")
    if distributed.is_main():
        _write_index(partial, source)
        for name in MODEL_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        shutil.rmtree(target_folder, ignore_errors=True)
        os.replace(partial, target_folder)
    dist.barrier()


def match_tensors(model: Any, folder: str | Path) -> tuple[list[Match], list[str]]:
    """Finds out which tensors of a checkpoint become which entries of a model's state dict.

    Args:
        model: of the checkpoint's family.
        folder: the checkpoint folder.

    Returns:
        The matches, and the names of the tensors that the model does not use.

    Raises:
        ConfigError: transformers cannot convert tensors.
    """
    sources = _read_all(folder, "meta")
    state = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    conversions = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in conversions for pattern in one.source_patterns}
    matches: dict[str, Match] = {}
    unused = []
    for name in sorted(sources, key=dot_natural_key):  # the order of loading: conversions stack in it
        layer, pattern = rename_source_key(name, renamings, conversions, model.base_model_prefix, state)
        if layer not in state:
            unused.append(name)
            continue
        key = name if pattern is None else layer  # two tensors of a tied weight are two matches
        match = matches.setdefault(key, Match(layer, None if pattern is None else by_pattern[pattern]))
        match.sources[name] = sources[name]
        if pattern is not None:
            match.patterns[name] = pattern
    for match in matches.values():
        try:
            match.targets = [name for name in match.convert(model, match.sources) if name in state]
        except Exception as error:
            raise ConfigError(
                f"model.path: {folder}: transformers cannot convert {_listed(match.sources)}: {error}"
            ) from error
    return list(matches.values()), unused


def weight_files(folder: str | Path) -> list[Path]:
    """Returns the files that `from_pretrained` takes a checkpoint folder's weights from.

    Raises:
        FileNotFoundError: the folder has no weights.
    """
    chosen = _chosen(folder)
    if chosen.suffix != ".json":
        return [chosen]
    names = set(json.loads(chosen.read_text("utf-8"))["weight_map"].values())
    return [chosen.with_name(name) for name in sorted(names)]


def _chosen(folder: str | Path) -> Path:
    """Returns the one weight file of a checkpoint folder, or the index of several."""
    path = checkpoint_folder(folder)
    named = json.loads((path / "config.json").read_text("utf-8")).get("transformers_weights")
    names = (named,) if named else (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    for name in names:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"model folder {str(path)!r} has no weights: none of {', '.join(names)}")


def _read(file: Path, device: str = "cpu") -> dict[str, Tensor]:
    # Mapped into memory: a tensor is read when it is used.
    try:
        return load_state_dict(file, map_location=device)
    except Exception as error:  # safetensors and pickle have errors of their own
        raise ConfigError(f"model.path: cannot read the weights {file}: {error}") from error


def _read_all(folder: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in _read(file, device).items()}


def _gathered(state: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Returns whole entries of a state dict on the CPU of rank 0, and nothing on the other ranks."""
    with GatheredParameters([state[name] for name in names if isinstance(state[name], torch.nn.Parameter)]):
        if not distributed.is_main():
            return {}
        return {name: state[name].detach().to("cpu", copy=True) for name in names}


def _different(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in found.items() if not torch.equal(tensor, expected[name].to(tensor.dtype))]


def _write(folder: Path, source: Path, tensors: Mapping[str, tuple[Tensor, Tensor | None]]) -> list[str]:
    """Writes a weight file of (original, trained) tensors; returns what would differ, instead, if anything would."""
    whole, problems = {}, []
    for name, (original, trained) in tensors.items():
        if trained is not None and trained.shape != original.shape:
            problems.append(f"{name!r} has the shape {tuple(trained.shape)} instead of {tuple(original.shape)}")
        whole[name] = original.clone() if trained is None else trained.to(original.dtype).contiguous()
    if not problems:
        metadata = None
        if source.suffix == ".safetensors":
            with safe_open(source, "pt") as opened:
                metadata = opened.metadata()
        save_file(whole, folder / _safetensors_name(source.name), metadata or {"format": "pt"})
        shutil.copymode(source, folder / _safetensors_name(source.name))  # safetensors lets the owner alone read
    return problems


def _write_index(folder: Path, source: Path) -> None:
    chosen = _chosen(source)
    if chosen.suffix == ".json":
        index = json.loads(chosen.read_text("utf-8"))
        index["weight_map"] = {name: _safetensors_name(file) for name, file in index["weight_map"].items()}
        write_json(folder / (SAFE_WEIGHTS_INDEX_NAME if chosen.name == WEIGHTS_INDEX_NAME else chosen.name), index)


def _safetensors_name(name: str) -> str:
    # pytorch_model-00001-of-00002.bin is model-00001-of-00002.safetensors.
    return (
        name if name.endswith(".safetensors") else name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"
    )


def _raise_together(problems: list[str], what: str, remedy: str = "") -> None:
    """Raises ConfigError on every rank if the main one has problems."""
    shared = [problems]
    dist.broadcast_object_list(shared)
    if shared[0]:
        raise ConfigError(f"{what}: {_listed(shared[0], shown=str)}{remedy}")


def _listed(items: Iterable[str], shown: Any = repr) -> str:
    listed = list(items)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(shown(item) for item in listed[:_SHOWN]) + more
