"""Reads picture-and-question rows from disk and turns them into model inputs."""

from __future__ import annotations

import copy
import io
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

IMAGE_PLACEHOLDER = "<image>"
IMAGE_FIELDS = ("images", "image")
_SHOWN = 200  # characters of a row's value in an error message


class DataError(ValueError):
    """A file, a row or a prompt that cannot be used; the message says which and why."""


class PromptTooLong(DataError):
    """A prompt is longer than the limit, and cutting it would cut the tokens of its pictures."""


@dataclass(frozen=True)
class Sample:
    """A question about pictures, with its answer.

    Args:
        id: name of the row in error messages and logs.
        problem: text of the question, which may say `<image>` where a picture belongs.
        answer: what a reward compares with.
        images: pictures as paths or encoded bytes; read when they are needed.
        extra: the row's other fields.
        source: file and row, for error messages.
    """

    id: str
    problem: str
    answer: str
    images: tuple[Path | bytes, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def open_images(self) -> list[Image.Image]:
        """Read the pictures as RGB.

        Raises:
            DataError: a picture that Pillow cannot read, naming the row and its id.
        """
        return [self._open(image) for image in self.images]

    def _open(self, image: Path | bytes) -> Image.Image:
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return opened.convert("RGB")
        except Exception as error:  # each of Pillow's decoders has its own errors for broken files
            what = f"{len(image)} bytes" if isinstance(image, bytes) else str(image)
            raise DataError(f"{self.source}: id {self.id!r}: cannot read image {what}: {error}") from error


class PictureDataset(Dataset):
    """Rows `{problem, answer, images}` of a JSONL or Parquet file (the ViRL39K layout).

    `problem` and `answer` are text or numbers; `images`, or `image`, is a picture, a list of them, or null for none.

    Args:
        path: a `.jsonl` or `.parquet` file; relative image paths start at its folder.
        limit: take only this many rows; None takes all.

    Raises:
        FileNotFoundError: the file or a picture it names does not exist.
        DataError: an unknown extension, a file that cannot be read, a line that is no JSON object, a field that is
            missing, empty or of another kind, an id that appears twice, no rows; the message names file, row and id.
        ValueError: a limit below 1.
    """

    def __init__(self, path: str | Path, limit: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"data file {str(self.path)!r} does not exist")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 row or None, got {limit}")
        rows = _read_rows(self.path, limit)
        if not rows:
            raise DataError(f"{self.path}: no rows")
        self.samples = [self._sample(number, row) for number, row in enumerate(rows)]
        self._check_ids()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def without(self, ids: Collection[str]) -> PictureDataset:
        """Return the data set less the samples of these ids, in the same order; ids it does not have change nothing.

        Raises:
            DataError: no sample is left.
        """
        rest = copy.copy(self)
        rest.samples = [sample for sample in self.samples if sample.id not in ids]
        if not rest.samples:
            raise DataError(f"{self.path}: no rows are left of {len(self)}")
        return rest

    def _sample(self, number: int, row: dict[str, Any]) -> Sample:
        name = str(row["id"]) if row.get("id") is not None else str(row.get("qid") or number)
        source = f"{self.path}, row {number}"
        where = f"{source}: id {name!r}"
        return Sample(
            id=name,
            problem=_text(row, "problem", where),
            answer=_text(row, "answer", where),
            images=tuple(self._image(image, where) for image in _images(row, where)),
            extra={k: v for k, v in row.items() if k not in ("id", "problem", "answer", *IMAGE_FIELDS)},
            source=source,
        )

    def _image(self, image: Any, where: str) -> Path | bytes:
        if isinstance(image, Mapping):
            image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if isinstance(image, (bytes, bytearray)):
            return bytes(image)
        if not isinstance(image, str):
            raise DataError(f"{where}: an image must be a path, bytes or {{bytes, path}}, got {type(image).__name__}")
        path = self.path.parent / image
        if not os.path.isfile(path):  # unlike Path.is_file, False for a name too long to be one, such as base64
            raise FileNotFoundError(f"{where}: image file {str(path)[:_SHOWN]!r} does not exist")
        return path

    def _check_ids(self) -> None:
        seen: dict[str, str] = {}
        for sample in self.samples:
            if sample.id in seen:
                raise DataError(f"{sample.source}: id {sample.id!r} is already that of {seen[sample.id]}")
            seen[sample.id] = sample.source


def epoch_order(n: int, epoch: int, seed: int) -> list[int]:
    """Return the order of `n` samples in an epoch: the same on every rank and after a resume."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator).tolist()


@dataclass
class PromptBatch:
    """Processed prompts, kept apart by row so that any rows can be taken, repeated and joined again.

    Args:
        samples: what each row was made from.
        rows: processed inputs of each row, batch dimension of 1 kept, without padding.
        pad_values: what fills the left of a row, by the name of an input that runs along the tokens.
    """

    samples: list[Sample]
    rows: list[dict[str, torch.Tensor]]
    pad_values: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images_per_row(self) -> list[int]:
        """Number of pictures of each row."""
        return [len(sample.images) for sample in self.samples]

    @property
    def prompt_lengths(self) -> list[int]:
        """Number of tokens of each row, padding left out."""
        return [row["input_ids"].shape[1] for row in self.rows]

    def take(self, indices: Sequence[int]) -> PromptBatch:
        """Return the rows at `indices`, in their order, repeated where an index repeats."""
        return PromptBatch([self.samples[i] for i in indices], [self.rows[i] for i in indices], self.pad_values)

    def repeat(self, times: int) -> PromptBatch:
        """Return each row `times` times, copies side by side."""
        return self.take([i for i in range(len(self)) for _ in range(times)])

    def tensors(
        self, *, length: int | None = None, device: torch.device | str | None = None
    ) -> dict[str, torch.Tensor]:
        """Join the rows into the arguments of a model's forward.

        Args:
            length: tokens that each row is padded to, on the left; None takes the longest row.
            device: where the tensors go; None leaves them on the CPU.

        Returns:
            Inputs along the tokens as (B, length); vision inputs joined over the pictures of all rows.

        Raises:
            ValueError: a row is longer than `length`.
        """
        length = max(self.prompt_lengths) if length is None else length
        if max(self.prompt_lengths) > length:
            raise ValueError(f"length {length} is shorter than the longest prompt, {max(self.prompt_lengths)} tokens")
        joined = {}
        for name in dict.fromkeys(name for row in self.rows for name in row):
            parts = [row[name] for row in self.rows if name in row]
            if name in self.pad_values:
                parts = [_pad_left(part, length, self.pad_values[name]) for part in parts]
            joined[name] = torch.cat(parts).to(device)
        return joined


class PromptCollator:
    """Turns samples into prompts for a model, pictures included.

    Args:
        processor: what `load_processor` returned.
        system_prompt: text of a system message before the question; None sends none.
        suffix: text put behind the question; None puts none.
        max_prompt_length: most tokens a prompt may have, pictures included.

    Returns, when called with samples: a `PromptBatch`.

    Raises:
        PromptTooLong: a prompt has more tokens than allowed; names its id, its length and the limit.
        DataError: `<image>` placeholders that do not fit the number of pictures, an unreadable picture, a prompt that
            the processor refuses; names the id.
    """

    def __init__(
        self,
        processor: Any,
        *,
        system_prompt: str | None = None,
        suffix: str | None = None,
        max_prompt_length: int,
    ) -> None:
        self.processor = processor
        self.system_prompt = system_prompt
        self.suffix = suffix
        self.max_prompt_length = max_prompt_length

    def __call__(self, samples: Sequence[Sample]) -> PromptBatch:
        if not samples:
            raise ValueError("samples must hold at least one sample")
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        pad_values = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0}
        pad_values |= {"mm_token_type_ids": 0, "token_type_ids": 0}
        return PromptBatch(list(samples), [self._process(sample) for sample in samples], pad_values)

    def messages(self, sample: Sample) -> list[dict[str, Any]]:
        """Return a sample as chat messages, its pictures where `<image>` stands or else before the text."""
        messages: list[dict[str, Any]] = []
        if self.system_prompt:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        return [*messages, {"role": "user", "content": self._content(sample)}]

    def _content(self, sample: Sample) -> list[dict[str, Any]]:
        pieces = sample.problem.split(IMAGE_PLACEHOLDER)
        if len(pieces) == 1:
            pieces = [""] * len(sample.images) + pieces
        elif len(pieces) - 1 != len(sample.images):
            raise DataError(
                f"{sample.source}: id {sample.id!r}: the problem has {len(pieces) - 1} {IMAGE_PLACEHOLDER} "
                f"placeholders for {len(sample.images)} images"
            )
        content: list[dict[str, Any]] = []
        for number, piece in enumerate(pieces):
            if number:
                content.append({"type": "image"})
            if piece:
                content.append({"type": "text", "text": piece})
        if self.suffix:
            content.append({"type": "text", "text": self.suffix})
        return content

    def prompt_length(self, sample: Sample) -> int:
        """Return the number of tokens of a sample's prompt, pictures included, whatever the limit is."""
        return self._inputs(sample)["input_ids"].shape[1]

    def _process(self, sample: Sample) -> dict[str, torch.Tensor]:
        inputs = self._inputs(sample)
        length = inputs["input_ids"].shape[1]
        if length > self.max_prompt_length:
            raise PromptTooLong(
                f"{sample.source}: id {sample.id!r}: the prompt has {length} tokens, max_prompt_length is "
                f"{self.max_prompt_length}; cutting it would cut image tokens: raise the limit, shrink the picture or "
                "drop the row"
            )
        return inputs

    def _inputs(self, sample: Sample) -> dict[str, torch.Tensor]:
        messages = self.messages(sample)
        images = sample.open_images() or None
        try:
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return dict(self.processor(images=images, text=[text], return_tensors="pt"))
        except Exception as error:
            raise DataError(f"{sample.source}: id {sample.id!r}: the processor refuses it: {error}") from error


def overlong(collator: PromptCollator, samples: Sequence[Sample]) -> list[tuple[Sample, int]]:
    """Find the samples whose prompts are longer than the collator allows, before a run meets them.

    Args:
        collator: what makes the prompts, and the limit.
        samples: each is processed once; nothing but its length is kept.

    Returns:
        Each sample over `collator.max_prompt_length` with its number of tokens, in the order given.

    Raises:
        DataError: a prompt that cannot be made, such as one with an unreadable picture; names the id.
    """
    lengths = ((sample, collator.prompt_length(sample)) for sample in samples)
    return [(sample, length) for sample, length in lengths if length > collator.max_prompt_length]


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if value is None:
        raise DataError(f"{where}: field {key!r} is missing; the row has {sorted(row)}")
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        raise DataError(
            f"{where}: field {key!r} must be text or a number, got {type(value).__name__}: {value!r:.{_SHOWN}}"
        )
    if isinstance(value, (float, Decimal)) and not math.isfinite(value):
        raise DataError(f"{where}: field {key!r} must be text or a finite number, got {value}")
    text = str(value)
    if not text.strip():
        raise DataError(f"{where}: field {key!r} is empty, got {value!r:.{_SHOWN}}")
    return text


def _images(row: Mapping[str, Any], where: str) -> Sequence[Any]:
    if not any(key in row for key in IMAGE_FIELDS):
        raise DataError(
            f"{where}: field 'images' (or 'image') is missing; the row has {sorted(row)}; "
            "a row of text alone says null or []"
        )
    given = [row[key] for key in IMAGE_FIELDS if row.get(key) is not None]
    if len(given) > 1:
        raise DataError(f"{where}: the pictures must be in 'images' or in 'image', got both")
    images = given[0] if given else []
    return images if isinstance(images, (list, tuple)) else [images]


def _pad_left(part: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(part, (length - part.shape[1], 0), value=value)


def _read_rows(path: Path, limit: int | None) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path, limit)
    if path.suffix == ".parquet":
        return _read_parquet(path, limit)
    raise DataError(f"{path}: unknown extension {path.suffix!r}; expected .jsonl or .parquet")


def _read_jsonl(path: Path, limit: int | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with path.open("rb") as lines:
        for line in lines:
            if limit is not None and len(rows) == limit:
                break
            if line.strip():
                rows.append(_json_row(line, f"{path}, row {len(rows)}"))
    return rows


def _json_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _read_parquet(path: Path, limit: int | None) -> list[dict[str, Any]]:
    import pyarrow.parquet

    rows: list[dict[str, Any]] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                rows.extend(batch.to_pylist())
                if limit is not None and len(rows) >= limit:
                    return rows[:limit]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    return rows
