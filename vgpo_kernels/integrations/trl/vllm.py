"""Corrections of TRL's generation by vLLM for prompts with pictures, applied if the installed TRL has the defects.

TRL 1.16 gives a vLLM inside the trainer's process ("colocate") the raw pictures beside ids that the processor has
expanded already, to N placeholders a picture. vLLM takes the first placeholder for the mark of the picture and expands
it again: it completes a prompt with 2 N - 1 placeholders, which is not the prompt that is trained on.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl.generation import vllm_generation

# vLLM's lowest; it is added to a logit.
_BANNED = -100.0


def expands_twice() -> bool:
    """Returns whether the installed TRL sends expanded ids beside raw pictures to a vLLM in its process."""
    sent = inspect.getsource(vllm_generation.VLLMGeneration.generate)
    return '{"prompt_token_ids": ids}' in sent and '"multi_modal_data"' in sent


def samples_placeholders() -> bool:
    """Returns whether the installed TRL lets vLLM sample the tokens that stand for pictures."""
    return "logit_bias" not in inspect.getsource(vllm_generation)


def without_placeholders(generation_kwargs: Mapping[str, Any] | None, placeholders: Iterable[int]) -> dict[str, Any]:
    """Returns the `generation_kwargs` of VLLMGeneration under which no placeholder is sampled.

    A sampled one would be a picture without pixels in the forward of an update.

    Args:
        generation_kwargs: as given by the caller; its `logit_bias` of other tokens is kept.
        placeholders: ids of the tokens that stand for pictures and videos.
    """
    given = dict(generation_kwargs or {})
    return given | {"logit_bias": {**(given.get("logit_bias") or {}), **dict.fromkeys(placeholders, _BANNED)}}


def unexpanded_prompts(
    processor: Any,
    conversations: Sequence[list[dict[str, Any]]],
    *,
    chat_template: str | None = None,
    **template_options: Any,
) -> list[list[int]]:
    """Returns the ids of each prompt with one mark a picture, as its chat template writes it and vLLM expects it.

    The text is tokenized without expanding the marks, which is right for pictures side by side (LLaVA), rows with a
    break at the end (Pixtral) and marks that are not the placeholder (Gemma 3), unlike collapsing runs of placeholders.

    Args:
        processor: with a chat template and a tokenizer.
        conversations: prompts whose messages hold blocks, as `_tokenize_prompts` of TRL takes them.
        chat_template: another than the processor's own.
        template_options: further arguments of `apply_chat_template`.
    """
    texts = processor.apply_chat_template(
        conversation=list(conversations),
        chat_template=chat_template,
        add_generation_prompt=True,
        tokenize=False,
        **template_options,
    )
    # As the processor itself decides when it tokenizes: a template may write the first special token.
    bos = processor.tokenizer.bos_token
    special = bos is None or not texts[0].startswith(bos)
    ids: list[list[int]] = processor.tokenizer(texts, add_special_tokens=special)["input_ids"]
    return ids


class UnexpandedEngine:
    """A VLLMGeneration that is sent unexpanded prompts, and must complete the expanded ones.

    Args:
        engine: the VLLMGeneration; everything except `generate` is its own.
        unexpanded: the ids to send in place of the prompts; None: the prompts themselves.
    """

    def __init__(self, engine: Any, unexpanded: list[list[int]] | None) -> None:
        self._engine = engine
        self._unexpanded = unexpanded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: list[list[int]], images: Any, **options: Any) -> Any:
        """Generates as VLLMGeneration does.

        Raises:
            RuntimeError: vLLM completed another prompt than one of `prompts`.
        """
        sent = prompts if self._unexpanded is None else self._unexpanded
        results = self._engine.generate(prompts=sent, images=images, **options)
        for row, (ours, theirs) in enumerate(zip(prompts, results[0], strict=True)):
            if list(ours) != list(theirs):
                raise RuntimeError(
                    f"prompt {row}: expected vLLM to complete the {len(ours)} tokens that are trained on, got "
                    f"{len(theirs)} tokens, {_first_difference(ours, theirs)}: the processor that vLLM loads from the "
                    "model's folder expands pictures or text otherwise than `processing_class`; save the latter "
                    "there, with its limits of pixels and its chat template"
                )
        return results


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return f"of which token {place} is {other} in place of {one}"
    return f"alike up to token {min(len(ours), len(theirs))}"
