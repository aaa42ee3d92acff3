"""Loads the conformance vectors: what the code published with the paper returned for random inputs.

They are not part of the repository. The environment variable VGPO_CONFORMANCE names their folder;
without it they are looked for in `../shared/conformance` beside the checkout.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAMES = ("paper_defaults", "no_gate", "no_compensation", "exponential", "step", "one_row_without_image")


@dataclass(frozen=True)
class Vectors:
    """One file of vectors: `vectors["logps"]` is a CPU tensor, `vectors.meta` the settings."""

    name: str
    meta: dict[str, Any]
    arrays: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]


def folder() -> Path:
    """Where the vectors should be."""
    named = os.environ.get("VGPO_CONFORMANCE")
    return Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "conformance"


def load(name: str) -> Vectors:
    """Reads the file `name`.npz; FileNotFoundError where it is missing."""
    path = folder() / f"{name}.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"no conformance vectors at {path}: the environment variable VGPO_CONFORMANCE names their folder"
        )
    with np.load(path) as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "meta"}
        return Vectors(name=name, meta=json.loads(str(archive["meta"])), arrays=arrays)
