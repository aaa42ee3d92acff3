"""The entry points of recording and of the fused output head: arguments checked, then the context manager."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vgpo_kernels._dispatch import checks_values
from vgpo_kernels._validate import FLOATING, INTEGER, MASK, check_choice, check_tensor
from vgpo_kernels.focus import visual_focus_score
from vgpo_kernels.integrations.transformers.fused_head import FusedHead, ModelLogprobs
from vgpo_kernels.integrations.transformers.model_parts import choose_layers, find_parts
from vgpo_kernels.integrations.transformers.recorder import Recorder
from vgpo_kernels.integrations.transformers.sequence import SEGMENTS, RecordingOptions


@contextmanager
def record_visual_attention(
    model: nn.Module,
    layers: str | Sequence[int] = "last",
    segments: str = "visual",
    heads: str = "mean",
    columns: bool = False,
    *,
    prompt_length: int | None = None,
    queries: str = "token",
) -> Iterator[Recorder]:
    """Records, inside the `with`, how much the queries of a model's text decoder attend to visual tokens.

    The recorded queries are those of the completion. Under `generate`, and if forwards continue a KV cache, the
    completion is what comes after the first prompt; in a plain forward it begins at `prompt_length`, and without a
    `prompt_length` there is none: every token of the forward is recorded. Each outermost forward that does not continue
    the one before starts a new record, so that the record is always of the last forward or `generate`.

    Recorded numbers are constants: no gradient flows into them. Recording changes the model's own results by rounding
    at most, in the recorded layers, which run another kernel. A layer that gradient checkpointing runs again is not
    recorded again.

    Args:
        model: a vision-language model of transformers set to "vgpo", bare or wrapped (DeepSpeed, DDP, PEFT).
        layers: "last", "all", or layer indices, negative ones from the end.
        segments: "visual" gives one segment, the visual tokens. "image/query/generated" gives three that sum to 1:
            visual tokens, the rest of the prompt, the completion. Padding is in none.
        heads: "mean" over heads, or "all" for each head.
        columns: record also what each visual token received, summed over the completion's queries (over all queries
            if there is no completion). Padding is left out, and under `generate` so are queries from a row's end token
            on, which the model runs only until the last row has ended.
        prompt_length: tokens before the completion in a plain forward, padding included; fewer than the sequence has
            when the record is read. `generate` needs none.
        queries: which query stands for a token of the completion: "token" the one at the token itself; the last token
            that `generate` samples is never run through the model, so that the record has one token less. "predicting"
            the one before it, which produced it; complete under `generate`.

    Yields:
        A Recorder. `mass` (layers, B, tokens, S) fp32, with heads="all" (layers, B, heads, tokens, S). With
        columns=True `columns` (layers, B, [heads,] n) fp32, `visual_positions` (B, n) with -1 where a row has fewer
        visual tokens, and `heatmap(sample, image)` -> (h, w). Tokens after a row's end are there, too: mask them.

    Raises:
        TypeError, ValueError: an argument is not one of those above; the family's decoder gets no visual tokens, or its
            layers choose keys for each query, have sinks or a bias on the scores; heads larger than the kernels take,
            with layer and size; in a forward, a mask that is no interval of keys for each query, or dropout.
        RuntimeError: the model does not run "vgpo", or bypasses transformers' attention interface.

    Example:
        >>> import torch
        >>> from transformers import LlavaConfig, LlavaForConditionalGeneration
        >>> size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> vision = {"model_type": "clip_vision_model", "image_size": 4, "patch_size": 2, **size}
        >>> text = {"model_type": "llama", "vocab_size": 9, **size}
        >>> config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=8)
        >>> model = LlavaForConditionalGeneration(config)
        >>> model.set_attn_implementation({"text_config": "vgpo"})
        >>> with record_visual_attention(model, layers="all", prompt_length=3) as rec:
        ...     output = model(input_ids=torch.tensor([[8, 8, 1, 2, 3]]))
        >>> rec.mass.shape  # two layers, one row, two tokens of completion
        torch.Size([2, 1, 2, 1])

    Source: the masses are those of `vgpo_kernels.attention_mass`, from the LSE of the very forward that is recorded.
    """
    check_choice("segments", segments, tuple(SEGMENTS))
    check_choice("heads", heads, ("mean", "all"))
    check_choice("queries", queries, ("token", "predicting"))
    if not isinstance(columns, bool):
        raise TypeError(f"columns: expected a bool, got {columns!r}")
    if prompt_length is not None and (isinstance(prompt_length, bool) or not isinstance(prompt_length, int)):
        raise TypeError(f"prompt_length: expected an int or None, got {prompt_length!r}")
    if prompt_length is not None and prompt_length < 1:
        raise ValueError(f"prompt_length: expected at least 1, got {prompt_length}")
    parts = find_parts(model)
    options = RecordingOptions(
        layers=choose_layers(parts, layers),
        segments=segments,
        all_heads=heads == "all",
        columns=columns,
        prompt_length=prompt_length,
        predicting=queries == "predicting",
    )
    with Recorder(parts, options) as recorder:
        yield recorder


def focus_from_attention(rec: Recorder, completion_mask: Tensor) -> Tensor:
    """Returns the focus of each completion token on the images from recorded attention, as `vgpo_weights` takes it.

    Args:
        rec: of a forward or `generate` with a completion.
        completion_mask: (B, T), 1 for the tokens of the completion.

    Returns:
        (B, T) fp32: the mean over recorded layers and heads of the visual mass, 0 outside the mask.

    Raises:
        TypeError: `completion_mask` is no mask.
        ValueError: the record does not cover the mask's tokens, or is NaN there (on a GPU, with VGPO_DEBUG=1).

    Example:
        >>> import torch
        >>> class Record:  # as `record_visual_attention` gives: two layers, one row, two tokens, one segment
        ...     mass = torch.tensor([[[[0.25], [0.5]]], [[[0.75], [0.5]]]])
        >>> focus_from_attention(Record(), torch.tensor([[1, 1]]))
        tensor([[0.5000, 0.5000]])

    Source: rho of VGPO (arXiv 2604.09349), with attention in place of similarity.
    """
    mass = rec.mass[..., 0]  # [layers, B, (heads,) tokens]
    check_tensor("completion_mask", completion_mask, shape=(mass.shape[1], "T"), dtypes=MASK)
    tokens, columns = mass.shape[-1], completion_mask.shape[1]
    if tokens != columns:
        raise ValueError(
            f"completion_mask: expected one column for each of the {tokens} recorded tokens, got {columns}; under "
            "generate record with queries='predicting', or record a forward over the whole sequence with prompt_length"
        )
    focus = mass.transpose(0, 1).flatten(1, -2).mean(1)
    mask = completion_mask.to(focus.device) != 0
    broken = (focus.isnan() & mask).nonzero().tolist() if checks_values(None, mass) else []
    if broken:
        row, token = broken[0]
        raise ValueError(f"rec.mass: expected numbers under completion_mask, got NaN in row {row}, token {token}")
    return torch.where(mask, focus, 0.0)


def completion_focus(
    states: Tensor,
    visual_mask: Tensor,
    completion_mask: Tensor,
    *,
    image_ids: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Returns the focus of each completion token on the images from hidden states, as `vgpo_weights` takes it.

    It is `visual_focus_score` with the masks of prompts and completions apart, as training loops hold them.

    Args:
        states: (B, P + T, D), last-layer states after the final norm, of prompts and completions.
        visual_mask: (B, P), 1 for the visual tokens of the prompts; see `visual_token_mask`.
        completion_mask: (B, T), 1 for the tokens of the completion.
        image_ids: (B, P) integers, the image of each visual token, for one prototype an image; see `image_ids`.
        impl: "triton", "native" or "reference"; None chooses by device.

    Returns:
        (B, T) float32 (float64 for float64 states) cosines, 0 outside the mask and in rows without a visual token.

    Raises:
        TypeError, ValueError: as `visual_focus_score`.

    Example:
        >>> import torch
        >>> states = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0]]])
        >>> completion_focus(states, torch.tensor([[True, False]]), torch.tensor([[True, True]]))
        tensor([[ 0.7071, -1.0000]])

    Source: rho of VGPO (arXiv 2604.09349).
    """
    check_tensor("visual_mask", visual_mask, shape=("B", "P"), dtypes=MASK)
    check_tensor("completion_mask", completion_mask, shape=(visual_mask.shape[0], "T"), dtypes=MASK)
    prompt, length = visual_mask.shape[1], completion_mask.shape[1]
    check_tensor("states", states, shape=(visual_mask.shape[0], prompt + length, "D"), dtypes=FLOATING)
    if image_ids is not None:
        check_tensor("image_ids", image_ids, shape=tuple(visual_mask.shape), dtypes=INTEGER)
        image_ids = nn.functional.pad(image_ids, (0, length), value=-1)
    visual = nn.functional.pad(visual_mask, (0, length))
    completion = nn.functional.pad(completion_mask, (prompt, 0))
    return visual_focus_score(states, visual, completion, image_ids=image_ids, impl=impl)[:, prompt:]


@contextmanager
def fused_logprobs(model: nn.Module) -> Iterator[FusedHead]:
    """Replaces a model's output head inside the `with`, for log-probabilities and losses without logits.

    The model is run as it is, wrapped or not: the head's module is called with its hooks, so that DeepSpeed ZeRO-3 and
    FSDP gather its weight once a forward, and DDP reduces its gradients. Only its product with the vocabulary is
    replaced, by `vgpo_kernels.linear_logprobs` and `linear_policy_loss` over the tokens of the completions. In place of
    logits the model gets one row of known numbers, from which the first forward finds whether the model scales or
    soft-caps its logits, as Granite, Cohere and Gemma do; that is taken into account.

    Args:
        model: a model of transformers that continues a prompt, bare, compiled or wrapped (DeepSpeed, DDP, FSDP, PEFT on
            other layers than the head, or with a copy of it in `modules_to_save`). Its head is a plain
            `torch.nn.Linear`, with or without bias, tied or not.

    Yields:
        A FusedHead:
        `logprobs(batch, prompt_length=...)`, with the arguments and the result of `model_logprobs`;
        `policy_loss(batch, old_logps, advantages, completion_mask, prompt_length=..., **options)`, a PolicyLossOutput
        with the arguments of `vgpo_kernels.linear_policy_loss` after `targets`, but for bias and softcap; with
        hidden_states=True the last hidden states are in `hidden_states` afterwards.

    Raises:
        TypeError: no model of transformers, or a head that is adapted, quantised, or no linear layer.
        ValueError: a model without a head or without weights (meta tensors), an encoder-decoder, or one that changes
            its logits in another way.
        RuntimeError: the head is called by something else inside the `with`, or has been replaced already.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **size))
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3, 4]])}  # two tokens of prompt, two of completion
        >>> with fused_logprobs(model) as fused:
        ...     out = fused.policy_loss(batch, None, torch.tensor([1.0]), torch.tensor([[1, 1]]), prompt_length=2)
        >>> out.loss.backward()
        >>> model.lm_head.weight.grad.shape
        torch.Size([9, 16])

    Source: the loss is that of `vgpo_kernels.policy_loss` on the log-probabilities of the model's logits.
    """
    with FusedHead(model) as fused:
        yield fused


def model_logprobs(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    prompt_length: int,
    completion_mask: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    hidden_states: bool = False,
    impl: str | None = None,
) -> ModelLogprobs:
    """Returns the log-probabilities of completions under a model, without logits: one forward of `fused_logprobs`.

    Args:
        model: as of `fused_logprobs`.
        batch: the model's arguments by name. `input_ids` (B, L) hold prompt and completion; no `labels`.
        prompt_length: tokens before the completion, padding included; T = L - prompt_length.
        completion_mask: (B, T), 1 for tokens of the completion; the others are skipped. None: the `attention_mask` of
            the batch there, or every token.
        temperature: divides the logits.
        entropy: compute the entropy of each token's distribution, too.
        hidden_states: return the states after the final norm, too.
        impl: "triton", "reference", or None to choose by device.

    Returns:
        ModelLogprobs(logps (B, T), entropy (B, T) or None, lse (B, T), hidden_states (B, L, D) or None), fp32 and 0
        where masked; differentiable in the model's parameters.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_logprobs`, or a bad argument.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **size))
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
        >>> model_logprobs(model, batch, prompt_length=2).logps.shape
        torch.Size([1, 2])
    """
    with fused_logprobs(model) as fused:
        return fused.logprobs(
            batch,
            prompt_length=prompt_length,
            completion_mask=completion_mask,
            temperature=temperature,
            entropy=entropy,
            hidden_states=hidden_states,
            impl=impl,
        )
