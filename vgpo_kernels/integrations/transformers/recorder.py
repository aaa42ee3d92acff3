"""`Recorder`: the record of a model's last outermost forward or `generate`, and how forwards make it.

recorder = Recorder(find_parts(model), options)
with recorder:
    model.generate(**inputs)
recorder.mass  # (layers, B, tokens, S)
"""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels.integrations.transformers.attention_function import NAME
from vgpo_kernels.integrations.transformers.heatmap import find_picture, lay_out
from vgpo_kernels.integrations.transformers.mask_intervals import KeyIntervals
from vgpo_kernels.integrations.transformers.model_parts import Parts
from vgpo_kernels.integrations.transformers.pictures import described
from vgpo_kernels.integrations.transformers.recorder_base import Prompt, RecorderBase
from vgpo_kernels.integrations.transformers.sequence import SEGMENTS, RecordingOptions, SequenceRecord, Tokens


class Recorder(RecorderBase):
    """What `record_visual_attention` yields: the record of the last outermost forward or `generate`.

    Args:
        parts: of the model.
        options: what to record.
    """

    def __init__(self, parts: Parts, options: RecordingOptions) -> None:
        super().__init__(parts, options.layers)
        self._options = options
        self._sequence: SequenceRecord | None = None
        self._called: set[int] = set()  # layers of the running forward

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of the segments, in the order of the last dimension of `mass`."""
        return SEGMENTS[self._options.segments]

    @property
    def mass(self) -> Tensor:
        """(layers, B, tokens, S) fp32, with heads="all" (layers, B, heads, tokens, S): attention on each segment."""
        return self._finished().mass()

    @property
    def columns(self) -> Tensor:
        """(layers, B, n) fp32, with heads="all" (layers, B, heads, n): what each visual token received."""
        return self._finished().received()

    @property
    def visual_positions(self) -> Tensor:
        """(B, n) int64: the position in the sequence of each visual token of `columns`, -1 where a row has fewer."""
        return self._finished().visual_positions()

    def heatmap(
        self, sample: int, image: int = 0, layer: int | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Returns what each piece of an image received, as a map.

        Args:
            sample: row of the batch.
            image: which of the row's images, in order.
            layer: index of a recorded layer; None takes the mean over all of them.
            grid: height and width of the image in tokens, for families whose inputs do not say it. image_grid_thw
                (Qwen) and image_sizes (Pixtral) of the model's inputs say it, and so does a fixed number of tokens
                that makes a square (LLaVA, Gemma 3). If images cannot be told apart, all of the row must have this
                grid.

        Returns:
            (h, w) fp32, the mean over heads of `columns`.

        Raises:
            ValueError: recorded without columns=True, another layer, or a grid that is unknown or does not fit.
            IndexError: there is no such row or image.
        """
        columns, sequence = self.columns, self._finished()
        if not 0 <= sample < columns.shape[1]:
            raise IndexError(f"sample: expected one of {columns.shape[1]} rows, got {sample}")
        if layer is not None and layer not in self.layers:
            raise ValueError(f"layer: expected one of the recorded {list(self.layers)}, got {layer}")
        chosen = columns if layer is None else columns[self.layers.index(layer)][None]
        values = chosen[:, sample].flatten(0, -2).mean(0)  # [n]
        ids = sequence.prompt_ids_or(sequence.tokens.ids)
        at = self.visual_positions[sample]
        is_image = (at >= 0) & sequence.tokens.is_image(ids[sample][at.clamp(min=0)])
        # `generate` describes the images of its prompts once, however often each is sampled.
        inputs = {"input_ids": ids[:: sequence.samples], **sequence.described}
        picture = find_picture(self._parts.config, inputs, sample // sequence.samples, image, grid)
        return lay_out(values[is_image], picture)

    def _finished(self) -> SequenceRecord:
        if self._sequence is None:
            raise RuntimeError("nothing has been recorded: no forward or generate has ended since recording began")
        return self._sequence

    # Called by the attention and the mask function.

    def first_key(self, kv_length: int) -> int:
        """Returns the position of the first of `kv_length` keys: a sliding cache drops the first ones."""
        return max(0, self._sequence.tokens.length - kv_length) if self._sequence is not None else 0

    def observe(
        self, layer: int, q: Tensor, k: Tensor, lse: Tensor | None, mask: KeyIntervals | None, options: dict[str, Any]
    ) -> None:
        self._called.add(layer)
        if layer in self.layers and lse is not None and mask is not None and self._sequence is not None:
            self._sequence.heads = q.shape[1]
            with torch.no_grad():
                self._sequence.observe(layer, q, k, lse, mask, options)

    # Called by generate and by forwards.

    def begin_generate(self, prompt: Prompt) -> None:
        self._sequence, self._prompt = None, prompt

    def end_generate(self, result: Any) -> None:
        self._prompt = None
        sequences = getattr(result, "sequences", result)
        if result is None:
            self._sequence = None
        elif self._sequence is not None and isinstance(sequences, Tensor):
            self._sequence.end_at(sequences.shape[1] - 1)  # the last token sampled is never run

    def _begin_forward(self, name: str, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ValueError(
                f"{name} was called without input_ids, which say where the pictures are; "
                "call it with input_ids while recording"
            )
        # transformers 5.24 calls it `cache` and still takes the older name.
        cache = kwargs["cache"] if kwargs.get("cache") is not None else kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        sequence = self._sequence_for(ids, past, cache, kwargs)
        self._check_images(sequence, ids, past, kwargs)
        sequence.begin(ids, self._padding_of(kwargs.get("attention_mask")), past)
        sequence.add_cache(cache)
        self._sequence, self._called = sequence, set()

    def _end_forward(self, output: Any) -> None:
        if output is None:  # the forward raised
            self._sequence = None
            return
        missing = [layer for layer in self.layers if layer not in self._called]
        if missing:
            self._sequence = None
            raise RuntimeError(self._why_not_called(missing))
        if self._sequence is not None:
            for value in output.values() if isinstance(output, dict) else output:
                self._sequence.add_cache(value)

    def _why_not_called(self, missing: list[int]) -> str:
        name = self._parts.name
        used = getattr(self._parts.config.get_text_config(), "_attn_implementation", None)
        if used != NAME:
            wanted: Any = {"text_config": NAME} if "text_config" in self._parts.config.sub_configs else NAME
            return (
                f"{name} ran with attn_implementation={used!r}, of which nothing can be recorded; call "
                f"model.set_attn_implementation({wanted!r}) before recording; a family that will not take it bypasses "
                "transformers' attention interface"
            )
        if self._called:
            return f"layers {missing} of {name} have no attention to record; those that have: {sorted(self._called)}"
        return (
            f"{name} is set to 'vgpo' but none of its layers called it: it bypasses transformers' attention interface, "
            "and its attention cannot be recorded"
        )

    def _sequence_for(self, ids: Tensor, past: int, cache: Any, kwargs: dict[str, Any]) -> SequenceRecord:
        """Returns the record that a forward continues or begins."""
        known = self._sequence
        if past and known is not None and known.tokens.length >= past and known.tokens.rows == ids.shape[0]:
            if not known.has_cache(cache):
                raise ValueError(
                    f"past_key_values: expected the cache of the forward before, got another one, of {past} tokens; "
                    "its sequence has not been recorded, or no longer is"
                )
            return known
        tokens = Tokens(ids, self._parts.visual, split=self._options.segments != "visual")
        if self._prompt is None:
            if past:
                raise ValueError(
                    f"a forward continues a cache of {past} tokens that were not recorded; begin with the first forward"
                )
            length = self._options.prompt_length
            return SequenceRecord(self._options, tokens, prompt=length, described=described(kwargs))
        prompt_ids = self._prompt.ids.to(ids.device)
        samples = ids.shape[0] // prompt_ids.shape[0]
        prompt_ids = prompt_ids.repeat_interleave(samples, dim=0)
        prompt = prompt_ids.shape[1]
        if past > prompt:
            raise ValueError(
                f"past_key_values: expected a cache of at most the prompt's {prompt} tokens where generate begins, got "
                f"one of {past}"
            )
        if past:
            tokens.append(prompt_ids[:, :past], None, prompt=prompt, sampled=True)
        return SequenceRecord(
            self._options,
            tokens,
            prompt=prompt,
            sampled=True,
            prompt_ids=prompt_ids,
            end_tokens=self._prompt.end_tokens,
            described=self._prompt.described,
            samples=samples,
        )

    def _padding_of(self, mask: Any) -> Tensor | None:
        """Returns (B, T), 0 for padding; None if all tokens are real, or it makes no difference which are."""
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return mask
        # The queries of a completion that is being sampled are no padding, and no query attends to any.
        if self._options.columns and self._prompt is None:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                "attention_mask: expected (B, T) with columns=True, which leaves the queries of padding out, "
                f"got {shape}"
            )
        return None

    def _check_images(self, sequence: SequenceRecord, ids: Tensor, past: int, kwargs: dict[str, Any]) -> None:
        pixels = [name for name, value in kwargs.items() if name.startswith("pixel_values") and value is not None]
        if past == 0 and pixels and not bool(sequence.tokens.is_visual(sequence.prompt_ids_or(ids)).any()):
            raise ValueError(
                f"{self._parts.name} was given {pixels[0]} but no visual token (id {sorted(self._parts.visual.all)}) "
                "in input_ids: attention to its pictures cannot be found"
            )
