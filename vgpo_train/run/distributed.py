"""Ranks, and the collectives of the driver, over the backend that DeepSpeed started."""

import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vgpo_train.config import ConfigError

T = TypeVar("T")


class RankError(ConfigError):
    """Work failed on some rank; every rank raises it, with the messages of those that failed."""


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


def together(work: Callable[[], T]) -> T:
    """Runs `work`, which has no collective, on every rank; if it fails on one, all ranks raise.

    Returns:
        What it returned on this rank.

    Raises:
        RankError: bad input, such as a file that is missing on one machine, was found by some rank.
    """
    result, error = None, None
    try:
        result = work()
    except (ImportError, OSError, ValueError) as raised:  # ConfigError and DataError are ValueErrors
        error = raised
    raised_by = gather_lists([None if error is None else (socket.gethostname(), str(error))])
    messages = {text for _, text in filter(None, raised_by)}
    if not messages:
        return result  # type: ignore[return-value]
    if len(messages) == 1 and None not in raised_by:
        raise RankError(messages.pop()) from error
    raise RankError("\n".join(f"rank {n} on {one[0]}: {one[1]}" for n, one in enumerate(raised_by) if one)) from error


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
