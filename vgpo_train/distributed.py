"""The few collectives the driver needs, over whatever backend DeepSpeed started."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number among all."""
    return dist.get_rank()


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size()


def device() -> torch.device:
    """Where this process computes: its own GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def is_main() -> bool:
    """Whether this process writes files and draws the progress bar."""
    return rank() == 0


def gather_rows(rows: Tensor) -> Tensor:
    """Returns every rank's rows, in the order of the ranks; each rank gives the same shape."""
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_lists(own: list[Any]) -> list[Any]:
    """Returns every rank's list, one after the other."""
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, own)
    return [item for part in parts for item in part]


def sum_over_ranks(value: float, device: torch.device) -> float:
    """Returns the sum of `value` over the ranks."""
    return _reduce(value, dist.ReduceOp.SUM, device)


def max_over_ranks(value: float, device: torch.device) -> float:
    """Returns the largest `value` of the ranks."""
    return _reduce(value, dist.ReduceOp.MAX, device)


def _reduce(value: float, operation: dist.ReduceOp, device: torch.device) -> float:
    # float64 holds token counts exactly.
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total, operation)
    return float(total)
