"""What VGPO asks of a transformers model: attention on the images, and log-probabilities and loss without logits.

`record_visual_attention` records each token's attention on the images, exactly and without attention maps:

    from vgpo_kernels.integrations.transformers import record_visual_attention

    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation={"text_config": "vgpo"})
    with record_visual_attention(model, layers="all", queries="predicting") as rec:
        sequences = model.generate(**inputs)
    rec.mass  # (layers, B, tokens, 1): attention on visual tokens, one entry for each token of the completion

`fused_logprobs` replaces the output head, so that the logits of a sequence never exist:

    with fused_logprobs(model) as fused:
        out = fused.policy_loss(inputs, old_logps, advantages, completion_mask, prompt_length=prompt_length)
    out.loss.backward()

`completion_focus` and `focus_from_attention` give what `vgpo_weights` takes; `visual_token_mask` and `image_ids` say
which tokens are visual, and of which picture.

Importing this package makes "vgpo" known to transformers. If no recorder is active, it is transformers' own "sdpa",
mask included, except in models with a soft-cap on their attention, which "sdpa" refuses: those run our kernels
throughout. The vision tower stays on "sdpa" even if "vgpo" is set for the whole model.

The names of `__all__` are public; the modules are not. `api` holds the entry points. Recording: `recorder` and its
base, `sequence`, `attention_function`, `mask_intervals`, `heatmap`. The output head: `fused_head`, `head_patch`. The
model: `model_parts`, `visual_tokens`, `pictures`.
"""

from vgpo_kernels.integrations.transformers import attention_function
from vgpo_kernels.integrations.transformers.api import (
    completion_focus,
    focus_from_attention,
    fused_logprobs,
    model_logprobs,
    record_visual_attention,
)
from vgpo_kernels.integrations.transformers.fused_head import FusedHead, ModelLogprobs
from vgpo_kernels.integrations.transformers.pictures import check_separable, image_ids
from vgpo_kernels.integrations.transformers.recorder import Recorder
from vgpo_kernels.integrations.transformers.visual_tokens import visual_token_mask

__all__ = [
    "FusedHead",
    "ModelLogprobs",
    "Recorder",
    "check_separable",
    "completion_focus",
    "focus_from_attention",
    "fused_logprobs",
    "image_ids",
    "model_logprobs",
    "record_visual_attention",
    "visual_token_mask",
]

attention_function.register()
