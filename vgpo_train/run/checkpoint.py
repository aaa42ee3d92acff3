"""Saving and resuming a run."""

import json
import os
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vgpo_train.config import ConfigError, TrainConfig
from vgpo_train.run import distributed

# Keys that may differ between a run and its continuation; all others decide what is learnt.
_FREE_KEYS = {
    "steps",
    "epochs",
    "resume",
    "rewards.timeout",
    "save_every",
    "keep_checkpoints",
    "eval_every",
    "tensorboard",
    "output_dir",
}


@dataclass
class RunState:
    """What a resumed run needs beside DeepSpeed's own files."""

    step: int  # steps done
    world_size: int
    config: dict[str, Any]
    seconds: float = 0.0  # spent so far: steps, evaluations, checkpoints
    accuracy_before: float | None = None
    skipped_updates: int = 0

    @property
    def tag(self) -> str:
        """Name of the checkpoint's folder."""
        return f"step_{self.step:06d}"


class CheckpointStore:
    """The checkpoints of a run: `checkpoints/step_N/`, and `checkpoints/latest.json` naming the last whole one."""

    def __init__(self, output_dir: Path, keep: int) -> None:
        self.folder = output_dir / "checkpoints"
        self.keep = keep

    def save(self, engine: Any, state: RunState) -> None:
        """Writes a checkpoint; a kill at any moment leaves the previous one whole and named as the latest."""
        engine.save_checkpoint(str(self.folder), tag=state.tag, save_latest=False)
        dist.barrier()
        if distributed.is_main():
            write_json(self.folder / "latest.json", asdict(state))
            self._prune(state.tag)
        dist.barrier()

    def _prune(self, newest: str) -> None:
        # A folder later than the newest is what a killed run left half-written: it must not count among those kept.
        whole = sorted(path.name for path in self.folder.glob("step_*") if path.name <= newest)
        for path in self.folder.glob("step_*"):
            if path.name not in whole[-self.keep :]:
                shutil.rmtree(path)

    def latest(self) -> RunState | None:
        """Returns the state of the last whole checkpoint, or None; ConfigError names a file that cannot be read."""
        path = self.folder / "latest.json"
        if not path.is_file():
            return None
        try:
            return RunState(**json.loads(path.read_text("utf-8")))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"resume: cannot read {path}: {error}; choose another output_dir") from error

    def check_whole(self, state: RunState) -> None:
        """Raises ConfigError with its path if a file of the checkpoint of `state` is cut."""
        for file in sorted((self.folder / state.tag).rglob("*.pt")):
            if not zipfile.is_zipfile(file):  # torch saves zip files, whose directory is at their end
                raise ConfigError(
                    f"resume: {file} is cut or damaged: expected a file that torch saved, got {file.stat().st_size} "
                    "bytes that are none; restore it, or choose another output_dir"
                )

    def load(self, engine: Any, state: RunState) -> None:
        """Loads the checkpoint of `state` into `engine`.

        Raises:
            ConfigError: DeepSpeed finds no such checkpoint.
        """
        path, _ = engine.load_checkpoint(str(self.folder), tag=state.tag)
        if path is None:
            raise ConfigError(f"resume: DeepSpeed could not load {self.folder / state.tag}")


def check_resumable(state: RunState, config: TrainConfig) -> None:
    """Raises ConfigError if `config` or the number of processes is not that of the saved run."""
    if state.world_size != distributed.world_size():
        raise ConfigError(
            f"resume: the checkpoint is of {state.world_size} processes, this run has {distributed.world_size()}"
        )
    before, now = _flat(state.config), _flat(json.loads(json.dumps(asdict(config))))
    differ = sorted(key for key in before | now if before.get(key) != now.get(key))
    changed = [key for key in differ if key not in _FREE_KEYS]
    if changed:
        raise ConfigError(
            f"resume: the saved run was configured otherwise in {', '.join(changed)}; choose another output_dir "
            "(make train RUN=FOLDER)"
        )


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as `write_text` writes text."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file in one step: at any moment the old file or the new one is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in options.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
