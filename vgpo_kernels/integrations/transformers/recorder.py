"""Follows a model's forwards while it is entered, and keeps what its attention looked at.

recorder = Recorder(find_parts(model), wishes)
with recorder:
    model.generate(**inputs)
recorder.mass  # (layers, B, tokens, S)
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vgpo_kernels.integrations.transformers import attention_function
from vgpo_kernels.integrations.transformers.generate_patch import FOLLOWERS, Prompt, follow, read_prompt, unfollow
from vgpo_kernels.integrations.transformers.mask_intervals import KeyIntervals
from vgpo_kernels.integrations.transformers.model_parts import Parts
from vgpo_kernels.integrations.transformers.pictures import described, find_picture, lay_out
from vgpo_kernels.integrations.transformers.segments import SEGMENTS, Tokens
from vgpo_kernels.integrations.transformers.sequence import Sequence, Wishes

_STANCE: list[Any] = []  # torch.compile's, as long as anything records


class Recorder:
    """What `record_visual_attention` yields: the record of the last outermost forward or `generate`.

    Args:
        parts: of the model.
        wishes: what to record.
    """

    def __init__(self, parts: Parts, wishes: Wishes) -> None:
        self._parts = parts
        self._wishes = wishes
        self._sequence: Sequence | None = None
        self._generating: Prompt | None = None
        self._outermost: nn.Module | None = None
        self._called: set[int] = set()
        self._undo: list[Callable[[], None]] = []

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the recorded layers, in the order of the first dimension of `mass`."""
        return self._wishes.layers

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of the segments, in the order of the last dimension of `mass`."""
        return SEGMENTS[self._wishes.segments]

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
        sequence = self._finished()
        sequence.received()
        return sequence.visual_positions  # type: ignore[return-value]

    def heatmap(
        self, sample: int, image: int = 0, layer: int | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Returns what each piece of a picture received, as a map.

        Args:
            sample: row of the batch.
            image: which of the row's pictures, in order.
            layer: index of a recorded layer; None takes the mean over all of them.
            grid: height and width of the picture in tokens, for families that do not say. Said it is by image_grid_thw
                (Qwen) or image_sizes (Pixtral) of the model's inputs, and by a fixed number of tokens that makes a
                square (LLaVA, Gemma 3). Where pictures cannot be told apart, all of the row are to have this grid.

        Returns:
            (h, w) fp32, the mean over heads of `columns`.

        Raises:
            ValueError: recorded without columns=True, another layer, or a grid that is unknown or does not fit.
            IndexError: there is no such row or picture.
        """
        columns, sequence = self.columns, self._finished()
        if not 0 <= sample < columns.shape[1]:
            raise IndexError(f"sample: expected one of {columns.shape[1]} rows, got {sample}")
        if layer is not None and layer not in self.layers:
            raise ValueError(f"layer: expected one of the recorded {list(self.layers)}, got {layer}")
        chosen = columns if layer is None else columns[self.layers.index(layer)][None]
        values = chosen[:, sample].flatten(0, -2).mean(0)  # [n]
        ids: Tensor = sequence.prompt_ids_or(sequence.tokens.ids)  # type: ignore[arg-type]
        at = self.visual_positions[sample]
        is_image = (at >= 0) & sequence.tokens.is_image(ids[sample][at.clamp(min=0)])
        # `generate` describes the pictures of its prompts once, however often each is sampled.
        inputs = {"input_ids": ids[:: sequence.samples], **sequence.described}
        picture = find_picture(self._parts.config, inputs, sample // sequence.samples, image, grid)
        return lay_out(values[is_image], picture)

    def __enter__(self) -> "Recorder":
        if not attention_function.LISTENERS:
            # A compiled forward would call hooks and attention of the time when it was traced.
            _STANCE.append(torch.compiler.set_stance("force_eager"))
            _STANCE[-1].__enter__()
        for module in self._parts.entries:
            before = module.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            after = module.register_forward_hook(self._after_forward, always_call=True)
            self._undo += [before.remove, after.remove]
            if callable(getattr(module, "generate", None)):
                follow(module)
                self._undo.append(functools.partial(unfollow, module))
        attention_function.LISTENERS.append(self)
        FOLLOWERS.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        attention_function.LISTENERS.remove(self)
        FOLLOWERS.remove(self)
        if not attention_function.LISTENERS:  # recorders may end in any order
            _STANCE.pop().__exit__(None, None, None)
        while self._undo:
            self._undo.pop()()
        self._outermost = self._generating = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recorder":
        """Returns itself: the hooks of a model copied while recorded come here, and are not heard."""
        return self

    # What the attention and the mask function ask and tell.

    def makes_mask_for(self, config: Any) -> bool:
        """Tells whether masks made for this configuration are those of the recorded decoder."""
        return id(config) in self._parts.configs

    def hears(self, module: nn.Module) -> bool:
        """Tells whether the module belongs to the recorded decoder, in a forward that is being recorded."""
        return self._outermost is not None and id(module) in self._parts.attention

    def first_key(self, kv_length: int) -> int:
        """Returns the token that the first of so many keys stands at: a sliding cache drops the first ones."""
        return max(0, self._sequence.tokens.length - kv_length) if self._sequence is not None else 0

    def observe(
        self, layer: int, q: Tensor, k: Tensor, lse: Tensor | None, mask: KeyIntervals | None, options: dict[str, Any]
    ) -> None:
        """Takes what a layer attended with; no LSE where no recorder records the layer."""
        self._called.add(layer)
        if layer in self.layers and lse is not None and mask is not None and self._sequence is not None:
            self._sequence.heads = q.shape[1]
            with torch.no_grad():
                self._sequence.observe(layer, q, k, lse, mask, options)

    # Forwards.

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The same module again: its last forward was interrupted, not even an exception was caught.
        if not self.follows(module) or (self._outermost is not None and self._outermost is not module):
            return
        if args:
            kwargs = {**inspect.signature(module.forward).bind_partial(*args).arguments, **kwargs}
        ids = kwargs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise ValueError(
                f"{type(module).__name__} was called without input_ids, which say where the pictures are; "
                "call it with input_ids while recording"
            )
        self._outermost = None
        # transformers 5.24 calls it `cache` and still takes the older name.
        cache = kwargs["cache"] if kwargs.get("cache") is not None else kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        sequence = self._sequence_for(ids, past, cache, kwargs)
        self._check_images(sequence, ids, past, kwargs)
        sequence.begin(ids, self._padding_of(kwargs.get("attention_mask")), past)
        sequence.holds(cache)
        self._sequence, self._called, self._outermost = sequence, set(), module

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        if self._outermost is not module:
            return
        self._outermost = None
        if output is None:  # the forward raised
            self._sequence = None
            return
        missing = [layer for layer in self.layers if layer not in self._called]
        if missing:
            self._sequence = None
            raise RuntimeError(self._why_not_called(missing))
        if self._sequence is not None:
            for value in output.values() if isinstance(output, dict) else output:
                self._sequence.holds(value)

    def _why_not_called(self, missing: list[int]) -> str:
        name = self._parts.name
        used = getattr(self._parts.config.get_text_config(), "_attn_implementation", None)
        if used != attention_function.NAME:
            wanted: Any = attention_function.NAME
            if "text_config" in self._parts.config.sub_configs:
                wanted = {"text_config": wanted}
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

    def _sequence_for(self, ids: Tensor, past: int, cache: Any, kwargs: dict[str, Any]) -> Sequence:
        """Returns the sequence that a forward continues or begins."""
        known = self._sequence
        if past and known is not None and known.tokens.length >= past and known.tokens.rows == ids.shape[0]:
            if not known.held(cache):
                raise ValueError(
                    f"past_key_values: expected the cache of the forward before, got another one, of {past} tokens; "
                    "its sequence has not been recorded, or no longer is"
                )
            return known
        tokens = Tokens(self._parts.visual, split=self._wishes.segments != "visual")
        if self._generating is None:
            if past:
                raise ValueError(
                    f"a forward continues a cache of {past} tokens that were not recorded; begin with the first forward"
                )
            return Sequence(self._wishes, tokens, prompt=self._wishes.prompt_length, described=described(kwargs))
        prompt_ids = self._generating.ids.to(ids.device)
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
        return Sequence(
            self._wishes,
            tokens,
            prompt=prompt,
            sampled=True,
            prompt_ids=prompt_ids,
            end_tokens=self._generating.end_tokens,
            described=self._generating.described,
            samples=samples,
        )

    def _padding_of(self, mask: Any) -> Tensor | None:
        """Returns (B, T), 0 for padding; None where all tokens are real, or it makes no difference which are."""
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return mask
        # The queries of a completion that is being sampled are no padding, and no query looks at any.
        if self._wishes.columns and self._generating is None:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                "attention_mask: expected (B, T) with columns=True, which leaves the queries of padding out, "
                f"got {shape}"
            )
        return None

    def _check_images(self, sequence: Sequence, ids: Tensor, past: int, kwargs: dict[str, Any]) -> None:
        pictures = [name for name, value in kwargs.items() if name.startswith("pixel_values") and value is not None]
        if past == 0 and pictures and not bool(sequence.tokens.is_visual(sequence.prompt_ids_or(ids)).any()):
            wanted = sorted(self._parts.visual.all)
            raise ValueError(
                f"{self._parts.name} was given {pictures[0]} but no visual token (id {wanted}) in input_ids: attention "
                "to its pictures cannot be found"
            )

    # generate.

    def follows(self, module: nn.Module) -> bool:
        """Tells whether the module is one of those that are recorded, and no copy."""
        return any(module is entry for entry in self._parts.entries)

    @property
    def generating(self) -> bool:
        """Whether a call of `generate` is being followed."""
        return self._generating is not None

    def begin_generate(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hears the arguments of a call."""
        self._sequence = None
        self._generating = read_prompt(module, args, kwargs)

    def end_generate(self, result: Any) -> None:
        """Hears what the call returned; None where it raised."""
        self._generating = None
        sequences = getattr(result, "sequences", result)
        if result is None:
            self._sequence = None
        elif self._sequence is not None and isinstance(sequences, Tensor):
            self._sequence.end_at(sequences.shape[1] - 1)  # the last token sampled is never run

    def _finished(self) -> Sequence:
        if self._sequence is None or self._sequence.tokens.ids is None:
            raise RuntimeError("nothing has been recorded: no forward or generate has ended since recording began")
        return self._sequence
