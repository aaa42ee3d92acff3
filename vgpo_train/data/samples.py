"""Samples: a question about pictures with its answer, read from the rows of data files."""

from __future__ import annotations

import bisect
import copy
import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from vgpo_train.data.columns import Columns, shown
from vgpo_train.data.errors import DataError, FieldError, PictureError
from vgpo_train.data.files import data_files, open_rows
from vgpo_train.data.pictures import open_picture

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: a single one is a drive
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{256,}=*\s*$")


@dataclass(frozen=True)
class Sample:
    """A question about pictures, with its answer.

    Args:
        id: name of the row in error messages and logs.
        problem: text of the question; `<image>` in it marks the place of a picture.
        answer: what a reward compares with.
        images: pictures as paths or encoded bytes; read by `open_images`.
        extra: the row's other fields.
        source: file and row, for error messages.
    """

    id: str
    problem: str
    answer: str
    images: tuple[Path | bytes, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def name(self) -> str:
        """The row and its id, as messages begin."""
        return f"{self.source}: id {self.id!r}"

    def open_images(self) -> list[Image.Image]:
        """Read the pictures as RGB, as a viewer shows them: upright, in sRGB, on white.

        Raises:
            PictureError: a picture that cannot be read, naming the row and its id.
        """
        return [self._open(image) for image in self.images]

    def _open(self, image: Path | bytes) -> Image.Image:
        try:
            return open_picture(image)
        except ValueError as error:
            what = f"of {len(image)} bytes" if isinstance(image, bytes) else str(image)
            raise PictureError(f"{self.name}: cannot read image {what}: {error}") from error


class PictureDataset(Dataset):
    """Rows `{id, problem, answer, images}` of JSONL or Parquet files, each read when it is indexed.

    The problem and the answer are text or numbers; images is a picture, a list of them, or null for none. A picture is
    a path (relative ones start at the folder of its data file), encoded bytes, or `{bytes, path}`.

    Args:
        source: a `.jsonl` or `.parquet` file, a folder of such files, a glob, or a list of these.
        limit: take only this many rows; None takes all.
        columns: which columns hold the fields, see `Columns`.

    Raises:
        FileNotFoundError: a file does not exist.
        DataError: an unknown extension, a file that cannot be read, no rows. Where a row is taken: it is no JSON
            object, a field is missing, null, empty or of another kind, or a picture's file is missing; the message
            names file, row and id.
        ValueError: a limit below 1, unknown columns.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str],
        limit: int | None = None,
        columns: str | Mapping[str, str] = "auto",
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 row or None, got {limit}")
        self._columns = Columns(columns)
        self._files = [open_rows(path) for path in data_files(source)]
        self._ends = list(itertools.accumulate(map(len, self._files)))
        self.name = str(source) if isinstance(source, (str, os.PathLike)) else ", ".join(map(str, source))
        if not self._ends[-1]:
            raise DataError(f"{self.name}: no rows")
        self._rows: Sequence[int] = range(min(self._ends[-1], limit or self._ends[-1]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        number = self._rows[index]
        file, place = self._place(number)
        where = file.where(place)
        try:
            row = file.read(place)
            given = self._columns.id(row)
        except DataError as error:
            error.args = (f"{where}: {error}",)
            raise
        name = str(number) if given is None else given
        try:
            return Sample(
                id=name,
                problem=self._columns.text(row, "problem"),
                answer=self._columns.text(row, "answer"),
                images=tuple(_image(image, file.path.parent) for image in self._columns.images(row)),
                extra=self._columns.extra(row),
                source=where,
            )
        except DataError as error:
            error.args = (f"{where}: id {name!r}: {error}",)
            raise

    def without(self, places: Collection[int]) -> PictureDataset:
        """Return the data set less the samples at these places, in the same order.

        Raises:
            DataError: no sample is left.
        """
        rest = copy.copy(self)
        rest._rows = [row for place, row in enumerate(self._rows) if place not in places]
        if not rest._rows:
            raise DataError(f"{self.name}: no rows are left of {len(self)}")
        return rest

    def _place(self, number: int) -> tuple[Any, int]:
        file = bisect.bisect_right(self._ends, number)
        return self._files[file], number - (self._ends[file - 1] if file else 0)


def epoch_order(n: int, epoch: int, seed: int) -> list[int]:
    """Return the order of `n` samples in an epoch: the same on every rank and after a resume."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator).tolist()


def step_order(n: int, step: int, count: int, seed: int) -> list[int]:
    """Return which of `n` samples the `count` prompts of a step are: epoch after epoch, each in its own order."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, n)
        if epoch not in orders:
            orders[epoch] = epoch_order(n, epoch, seed)
        chosen.append(orders[epoch][place])
    return chosen


def _image(image: Any, folder: Path) -> Path | bytes:
    given = image
    if isinstance(image, Mapping):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if not isinstance(image, str) or not image.strip():
        raise FieldError(f"an image must be a path, bytes or {{bytes, path}}, got {shown(given)}")
    path = folder / image
    if os.path.isfile(path):  # unlike Path.is_file, False for a name too long to be one, such as base64
        return path
    if _URL.match(image):
        raise PictureError(f"image {shown(image)} is an address; only paths of files and encoded bytes are read")
    if _BASE64.match(image):
        raise PictureError(f"image {shown(image)} looks like base64; decode it: paths and encoded bytes are read")
    raise PictureError(f"image file {shown(str(path))} {'is a folder' if os.path.isdir(path) else 'does not exist'}")
