"""In which dtype results are computed."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float64 for float64 and float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
