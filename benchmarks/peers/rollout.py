"""A random Qwen2.5-VL and a random rollout of it, of given sizes: what a training step is measured on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vgpo_kernels.testing import ragged_mask

# A patch of a picture is 14 x 14 pixels of 3 colours in 2 frames; 2 x 2 patches are a token.
PATCH, MERGE, FRAMES, COLOURS = 14, 2, 2, 3
WINDOW = 8  # patches
SPECIAL_TOKENS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2.5-VL with tied embeddings: of its text half, and of its vision tower after `vision_`."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    vision_heads: int

    @property
    def whole_picture_layers(self) -> list[int]:
        """Layers of the vision tower that attend to the whole picture; the others attend within windows."""
        return sorted({*range(7, self.vision_layers, 8), self.vision_layers - 1})

    def config(self) -> Qwen2_5_VLConfig:
        """Returns the configuration; the last token ids are the special ones."""
        head_dim = self.hidden // self.heads
        text = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 128_000,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16],
            },
        }
        vision = {
            "depth": self.vision_layers,
            "hidden_size": self.vision_hidden,
            "intermediate_size": self.vision_intermediate,
            "num_heads": self.vision_heads,
            "out_hidden_size": self.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "window_size": WINDOW * PATCH,
            "fullatt_block_indexes": self.whole_picture_layers,
        }
        special = {name: self.vocabulary - 1 - place for place, name in enumerate(SPECIAL_TOKENS)}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)


SHAPES = {
    "tiny": Shape(2, 32, 64, 2, 1, 256, 2, 32, 64, 2),
    "small": Shape(4, 256, 704, 4, 2, 4096, 2, 128, 384, 4),
    "3B": Shape(36, 2048, 11008, 16, 2, 151_936, 32, 1280, 3420, 16),
}
TINY = {
    "model": "tiny",
    "B": 4,
    "group": 2,
    "micro": 2,
    "P": 24,
    "V": 16,
    "R": 16,
    "shortest": 9,
    "checkpoints": False,
}


class MicroBatch(NamedTuple):
    """What one forward gets: b rows of P prompt tokens and of completions, cut after the longest of them."""

    rows: slice
    arguments: dict[str, Tensor]  # of the model; input_ids are (b, L)
    mask: Tensor  # (b, L - P) bool: tokens of the completions
    visual: Tensor  # (b, L) bool


class Rollout(NamedTuple):
    """A policy, its optimizer and a rollout of B rows of P prompt tokens and up to R completion tokens."""

    model: Qwen2_5_VLForConditionalGeneration
    optimizer: torch.optim.Optimizer
    batches: list[MicroBatch]
    prompt_length: int
    completion_mask: Tensor  # (B, R) bool
    group_ids: Tensor  # (B,) int64
    advantages: Tensor  # (B,) fp32
    laps: dict[str, list[dict[str, float]]]  # seconds of each phase, a step of a method after the other


def build(sizes: Mapping[str, Any], device: torch.device) -> Rollout:
    """Returns a random policy and a random rollout, the same each time.

    Args:
        sizes: "model" of SHAPES; "B" rows in groups of "group", in micro-batches of "micro"; "P" tokens a prompt, "V"
            of them visual; completions of "shortest" to "R" tokens; "checkpoints": whether activations are made again
            in the backward.
        device: parameters are made there, in bf16 on a GPU and fp32 elsewhere.
    """
    config = SHAPES[sizes["model"]].config()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = _policy(config, device, checkpoints=sizes["checkpoints"])
        mask = ragged_mask(completion_lengths(sizes), sizes["R"])
        ids = _token_ids(config, sizes)
        batches = []
        for first in range(0, sizes["B"], sizes["micro"]):
            rows = slice(first, min(first + sizes["micro"], sizes["B"]))
            batches.append(_micro_batch(config, ids, mask, rows, sizes, device))
        advantages = torch.randn(sizes["B"]).to(device)
    groups = torch.arange(sizes["B"], device=device) // sizes["group"]
    return Rollout(model, _optimizer(model), batches, sizes["P"], mask.to(device), groups, advantages, {})


def _policy(config: Qwen2_5_VLConfig, device: torch.device, *, checkpoints: bool) -> Qwen2_5_VLForConditionalGeneration:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()  # in eval mode nothing is checkpointed; there is no dropout


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW with a learning rate of 0: the same arithmetic, and each step begins with the same parameters."""
    fused = next(model.parameters()).is_cuda
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=fused)
    # The moments are made in a first step, which must not be a measured one.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _token_ids(config: Qwen2_5_VLConfig, sizes: Mapping[str, Any]) -> Tensor:
    """Returns (B, P + R): for each group a prompt of words, a picture and words, then completions of words."""
    words = config.text_config.vocab_size - len(SPECIAL_TOKENS)
    ids = torch.randint(0, words, (sizes["B"], sizes["P"] + sizes["R"]))
    prompts = ids[:: sizes["group"], : sizes["P"]].repeat_interleave(sizes["group"], 0)[: sizes["B"]]
    first = (sizes["P"] - sizes["V"]) // 2
    prompts[:, first - 1] = config.vision_start_token_id
    prompts[:, first : first + sizes["V"]] = config.image_token_id
    prompts[:, first + sizes["V"]] = config.vision_end_token_id
    ids[:, : sizes["P"]] = prompts
    return ids


def _micro_batch(
    config: Qwen2_5_VLConfig, ids: Tensor, mask: Tensor, rows: slice, sizes: Mapping[str, Any], device: torch.device
) -> MicroBatch:
    count, length = mask[rows].shape[0], int(mask[rows].sum(1).max())
    ids, mask = ids[rows, : sizes["P"] + length].to(device), mask[rows, :length].to(device)
    visual = ids == config.image_token_id
    patches = sizes["V"] * MERGE * MERGE
    arguments = {
        "input_ids": ids,
        "attention_mask": torch.cat([torch.ones_like(ids[:, : sizes["P"]]), mask.long()], 1),
        "mm_token_type_ids": visual.long(),
        "pixel_values": torch.randn(count * patches, COLOURS * FRAMES * PATCH * PATCH).to(device),
        "image_grid_thw": torch.tensor([picture_grid(sizes["V"])] * count, device=device),
    }
    return MicroBatch(rows, arguments, mask, visual)


def completion_lengths(sizes: Mapping[str, Any]) -> list[int]:
    """Returns how many tokens each completion has: from "R" down to "shortest", evenly."""
    return torch.linspace(sizes["R"], sizes["shortest"], sizes["B"]).long().tolist()


def picture_grid(tokens: int) -> tuple[int, int, int]:
    """Returns frames, height and width in patches of the squarest picture of so many tokens."""
    height = max(side for side in range(1, int(tokens**0.5) + 1) if tokens % side == 0)
    return 1, height * MERGE, tokens // height * MERGE
