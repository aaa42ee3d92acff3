"""Reads picture-and-question rows from disk and turns them into model inputs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

IMAGE_PLACEHOLDER = "<image>"
REQUIRED_FIELDS = ("problem", "answer")


class PromptTooLong(ValueError):
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
            ValueError: a picture that Pillow cannot read, naming the row and its id.
        """
        return [self._open(image) for image in self.images]

    def _open(self, image: Path | bytes) -> Image.Image:
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return opened.convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            what = f"{len(image)} bytes" if isinstance(image, bytes) else str(image)
            raise ValueError(f"{self.source}: id {self.id!r}: cannot read image {what}: {error}") from error


class PictureDataset(Dataset):
    """Rows `{problem, answer, images}` of a JSONL or Parquet file (the ViRL39K layout).

    Args:
        path: a `.jsonl` or `.parquet` file; relative image paths start at its folder.
        limit: take only this many rows; None takes all.

    Raises:
        FileNotFoundError: the file or a picture it names does not exist.
        ValueError: an unknown extension, a line that is no JSON object, a missing field, an id that appears twice,
            no rows; the message names file, row and id.
    """

    def __init__(self, path: str | Path, limit: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"data file {str(self.path)!r} does not exist")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 row or None, got {limit}")
        rows = _read_rows(self.path, limit)
        if not rows:
            raise ValueError(f"{self.path}: no rows")
        self.samples = [self._sample(number, row) for number, row in enumerate(rows)]
        self._check_ids()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def _sample(self, number: int, row: dict[str, Any]) -> Sample:
        name = str(row["id"]) if row.get("id") is not None else str(row.get("qid") or number)
        where = f"{self.path}, row {number}"
        for key in REQUIRED_FIELDS:
            if row.get(key) is None:
                raise ValueError(f"{where}: id {name!r}: field {key!r} is missing; the row has {sorted(row)}")
        images = row.get("images", row.get("image"))
        images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        return Sample(
            id=name,
            problem=str(row["problem"]),
            answer=str(row["answer"]),
            images=tuple(self._image(image, f"{where}: id {name!r}") for image in images),
            extra={k: v for k, v in row.items() if k not in ("id", "problem", "answer", "images", "image")},
            source=where,
        )

    def _image(self, image: Any, where: str) -> Path | bytes:
        if isinstance(image, Mapping):
            image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if isinstance(image, (bytes, bytearray)):
            return bytes(image)
        if not isinstance(image, str):
            raise ValueError(f"{where}: an image must be a path, bytes or {{bytes, path}}, got {type(image).__name__}")
        path = self.path.parent / image
        if not path.is_file():
            raise FileNotFoundError(f"{where}: image file {str(path)!r} does not exist")
        return path

    def _check_ids(self) -> None:
        seen: dict[str, str] = {}
        for sample in self.samples:
            if sample.id in seen:
                raise ValueError(f"{sample.source}: id {sample.id!r} is already that of {seen[sample.id]}")
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
        ValueError: `<image>` placeholders that do not fit the number of pictures, an unreadable picture; names the id.
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
            raise ValueError(
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

    def _process(self, sample: Sample) -> dict[str, torch.Tensor]:
        text = self.processor.apply_chat_template(self.messages(sample), add_generation_prompt=True, tokenize=False)
        images = sample.open_images() or None
        try:
            inputs = self.processor(images=images, text=[text], return_tensors="pt")
        except Exception as error:
            raise ValueError(f"{sample.source}: id {sample.id!r}: the processor refuses it: {error}") from error
        length = inputs["input_ids"].shape[1]
        if length > self.max_prompt_length:
            raise PromptTooLong(
                f"{sample.source}: id {sample.id!r}: the prompt has {length} tokens, max_prompt_length is "
                f"{self.max_prompt_length}; cutting it would cut image tokens: raise the limit, shrink the picture or "
                "drop the row"
            )
        return dict(inputs)


def _pad_left(part: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.nn.functional.pad(part, (length - part.shape[1], 0), value=value)


def _read_rows(path: Path, limit: int | None) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path, limit)
    if path.suffix == ".parquet":
        return _read_parquet(path, limit)
    raise ValueError(f"{path}: unknown extension {path.suffix!r}; expected .jsonl or .parquet")


def _read_jsonl(path: Path, limit: int | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if limit is not None and len(rows) == limit:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, row {len(rows)}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, row {len(rows)}: expected a JSON object, got {type(row).__name__}")
            rows.append(row)
    return rows


def _read_parquet(path: Path, limit: int | None) -> list[dict[str, Any]]:
    import pyarrow.parquet

    rows: list[dict[str, Any]] = []
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            rows.extend(batch.to_pylist())
            if limit is not None and len(rows) >= limit:
                return rows[:limit]
    return rows
