"""Turns samples into prompts: chat messages, processed by the checkpoint's own processor."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from vgpo_train.data.batches import Join, PromptBatch, learn_joins
from vgpo_train.data.errors import DataError, MarkError, PromptError, PromptTooLong
from vgpo_train.data.samples import Sample

IMAGE_PLACEHOLDER = "<image>"
_MARKS = ("image_token", "boi_token", "video_token")  # what processors call the text that they put pictures in place of
# Width and height of pictures that show how a processor joins them; the first has several tiles, if any has.
_UNLIKE = {"red": (1200, 400), "green": (84, 112), "blue": (56, 168)}
_DUMMY_SIZE = (56, 56)  # enough for one token of every patch size in use


class PromptCollator:
    """Turns samples into prompts for a model, pictures included.

    Token ids are those of the processor's own `apply_chat_template(..., tokenize=True)`.

    Args:
        processor: what `load_processor` returned.
        system_prompt: text of a system message before the question; None sends none.
        suffix: text put behind the question; None puts none.
        max_prompt_length: most tokens a prompt may have, pictures included.

    Returns, when called with samples: a `PromptBatch`.

    Raises:
        PromptTooLong: a prompt has more tokens than allowed; names its id, its length and the limit.
        MarkError: `<image>` placeholders that do not fit the number of pictures, or the processor's own; names the id.
        PictureError: a picture that cannot be read; names the id.
        PromptError: a prompt that the processor refuses; names the id.
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
        return PromptBatch(list(samples), [self._process(sample) for sample in samples], *self.joining)

    @functools.cached_property
    def joining(self) -> tuple[Mapping[str, int], Mapping[str, Join]]:
        """How rows are joined, as `PromptBatch` takes it: read off two small prompts with unlike pictures.

        Raises:
            PromptError: the processor does not take two prompts at once, or joins them in a way that is not known.
        """
        one, *two = (_png(colour, size) for colour, size in _UNLIKE.items())
        samples = [Sample("", "?", "", (one,)), Sample("", "?!", "", tuple(two))]
        try:
            return learn_joins([self._inputs(sample) for sample in samples], self._apply(samples))
        except Exception as error:
            name = type(self.processor).__name__
            raise PromptError(f"{name}: prompts with unlike pictures cannot be joined: {error}") from error

    def messages(self, sample: Sample) -> list[dict[str, Any]]:
        """Return a sample as chat messages, its pictures in place of `<image>` or else before the text."""
        messages: list[dict[str, Any]] = []
        if self.system_prompt:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        return [*messages, {"role": "user", "content": self._content(sample)}]

    def prompt_length(self, sample: Sample) -> int:
        """Return the number of tokens of a sample's prompt, pictures included, whatever the limit is."""
        return self._inputs(sample)["input_ids"].shape[1]

    def _content(self, sample: Sample) -> list[dict[str, Any]]:
        pieces = sample.problem.split(IMAGE_PLACEHOLDER)
        if len(pieces) == 1:
            pieces = [""] * len(sample.images) + pieces
        elif len(pieces) - 1 != len(sample.images):
            raise MarkError(
                f"{sample.name}: the problem has {len(pieces) - 1} {IMAGE_PLACEHOLDER} "
                f"placeholders for {len(sample.images)} images"
            )
        for mark in filter(None, (getattr(self.processor, name, None) for name in _MARKS)):
            if any(mark in piece for piece in pieces):
                raise MarkError(
                    f"{sample.name}: the problem holds {mark!r}, the processor's own mark; {IMAGE_PLACEHOLDER} says "
                    "where a picture belongs"
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

    def check_length(self, sample: Sample, length: int) -> None:
        """Raise PromptTooLong if `length` tokens of a sample's prompt are more than the limit."""
        if length > self.max_prompt_length:
            raise PromptTooLong(
                f"{sample.name}: the prompt has {length} tokens, max_prompt_length is {self.max_prompt_length}; "
                "cutting it would cut image tokens: raise the limit, shrink the picture or drop the row"
            )

    def _process(self, sample: Sample) -> dict[str, Tensor]:
        inputs = self._inputs(sample)
        self.check_length(sample, inputs["input_ids"].shape[1])
        return inputs

    def _inputs(self, sample: Sample) -> dict[str, Tensor]:
        try:
            return self._apply([sample])
        except DataError:
            raise
        except Exception as error:
            raise PromptError(f"{sample.name}: the processor refuses it: {error}") from error

    def _apply(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return what the processor makes of the samples, padded on the left if there are several."""
        padding = {"processor_kwargs": {"padding": True, "padding_side": "left"}} if len(samples) > 1 else {}
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        conversations = [self._messages_with_pictures(sample) for sample in samples]
        return dict(self.processor.apply_chat_template(conversations, **options, **padding))

    def _messages_with_pictures(self, sample: Sample) -> list[dict[str, Any]]:
        messages = self.messages(sample)
        places = [part for part in messages[-1]["content"] if part["type"] == "image"]
        for part, picture in zip(places, sample.open_images(), strict=True):
            part["image"] = picture
        return messages


def dummy_prompt(collator: PromptCollator) -> PromptBatch:
    """Return a prompt with a black picture, for forwards of rows without any: see `PromptBatch.with_picture`."""
    return collator([Sample(id="dummy", problem="", answer="", images=(_png("black", _DUMMY_SIZE),))])


def _png(colour: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()
