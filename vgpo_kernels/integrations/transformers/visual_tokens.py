"""Which tokens of a sequence stand for pieces of pictures and videos, by a model's configuration.

find_visual_tokens(model.config).image  # frozenset of ids
visual_token_mask(model.config, input_ids)  # (B, L) bool
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vgpo_kernels._validate import INTEGER, check_tensor

IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index")
VIDEO_TOKEN_FIELDS = ("video_token_id", "video_token_index")


class VisualTokens(NamedTuple):
    """The ids of the tokens that stand for pieces of pictures and of videos; empty if a configuration names none."""

    image: frozenset[int]
    video: frozenset[int]

    @property
    def all(self) -> frozenset[int]:
        """Both."""
        return self.image | self.video


def find_visual_tokens(config: Any, name: str = "config") -> VisualTokens:
    """Returns the ids that a configuration names, or one of its parts (Phi-4-multimodal: that of the vision tower).

    Args:
        config: of a vision-language model of transformers.
        name: what it is of, for the error.

    Raises:
        ValueError: no image token is named.
    """
    configs = list(_with_parts(config))
    visual = VisualTokens(_named(configs, IMAGE_TOKEN_FIELDS), _named(configs, VIDEO_TOKEN_FIELDS))
    if not visual.image:
        raise ValueError(
            f"{name}: expected a configuration that names the image token ({' or '.join(IMAGE_TOKEN_FIELDS)}), got "
            f"{type(config).__name__}; pass that of a vision-language model whose pictures are tokens of input_ids"
        )
    return visual


def visual_token_mask(config: Any, input_ids: Tensor) -> Tensor:
    """Returns which tokens stand for pieces of pictures or videos.

    Args:
        config: of a vision-language model of transformers.
        input_ids: (B, L).

    Returns:
        (B, L) bool.

    Raises:
        ValueError: the configuration names no image token.
        TypeError: `input_ids` are no integers.

    Example:
        >>> import torch
        >>> from transformers import LlavaConfig
        >>> visual_token_mask(LlavaConfig(image_token_id=8), torch.tensor([[1, 8, 8, 2]]))
        tensor([[False,  True,  True, False]])
    """
    check_tensor("input_ids", input_ids, shape=("B", "L"), dtypes=INTEGER)
    return among(input_ids, find_visual_tokens(config).all)


def among(ids: Tensor, wanted: Iterable[int]) -> Tensor:
    """Returns which of `ids` are in `wanted`."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in sorted(wanted):
        found |= ids == token
    return found


def _with_parts(config: Any) -> Iterator[Any]:
    """Yields a configuration, then those inside of it, the outer ones first."""
    level = [config]
    while level:
        yield from level
        inner = [getattr(each, name, None) for each in level for name in getattr(each, "sub_configs", ())]
        level = [each for each in inner if isinstance(each, PreTrainedConfig)]


def _named(configs: Iterable[Any], fields: tuple[str, ...]) -> frozenset[int]:
    """Returns the ids of the first configuration that names any."""
    for config in configs:
        values = [getattr(config, field, None) for field in fields]
        found = {value for value in values if isinstance(value, int) and not isinstance(value, bool)}
        if found:
            return frozenset(found)
    return frozenset()
