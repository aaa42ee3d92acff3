"""Reads picture-and-question rows from disk and turns them into model inputs."""

from vgpo_train.data.batches import Join, PromptBatch
from vgpo_train.data.checks import Examined, examine, report, unusable
from vgpo_train.data.columns import PRESETS, Columns
from vgpo_train.data.errors import DataError, FieldError, MarkError, PictureError, PromptError, PromptTooLong
from vgpo_train.data.prompts import IMAGE_PLACEHOLDER, PromptCollator, dummy_prompt
from vgpo_train.data.samples import PictureDataset, Sample, epoch_order, step_order

__all__ = [
    "IMAGE_PLACEHOLDER",
    "PRESETS",
    "Columns",
    "DataError",
    "Examined",
    "FieldError",
    "Join",
    "MarkError",
    "PictureDataset",
    "PictureError",
    "PromptBatch",
    "PromptCollator",
    "PromptError",
    "PromptTooLong",
    "Sample",
    "dummy_prompt",
    "epoch_order",
    "examine",
    "report",
    "step_order",
    "unusable",
]
