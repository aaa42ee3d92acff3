"""Checkpoint folder to model and processor (`loading`, public by the names below), DeepSpeed engines, export."""

from vgpo_train.model.loading import (
    end_tokens,
    layer_count,
    limit_pixels,
    load_model,
    load_processor,
    visual_token_ids,
)

__all__ = ["end_tokens", "layer_count", "limit_pixels", "load_model", "load_processor", "visual_token_ids"]
