"""What a step reports: one line of `metrics.jsonl`, TensorBoard, and the progress bar."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vgpo_train.rl.types import SEGMENTS, ScoredRollout, Weighting
from vgpo_train.run import distributed
from vgpo_train.run.checkpoint import write_text

TENTHS = 10  # parts of a completion that a curve has a point for


class PhaseTimer:
    """Adds up the seconds of the named phases of a step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times the block as `phase`."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self, *, tokens: int) -> dict[str, float]:
        """Returns `time_*` in seconds, and `tokens` per second of all phases."""
        total = sum(self._seconds.values())
        phases = {f"time_{phase}": seconds for phase, seconds in self._seconds.items()}
        return phases | {"time_step": total, "tokens_per_second": tokens / total}


class MetricsLog:
    """`metrics.jsonl` and TensorBoard, written by the main rank; a resumed run drops lines past its checkpoint."""

    def __init__(self, output_dir: Path, steps_done: int, *, tensorboard: bool) -> None:
        self._lines = None
        self._board = None
        if not distributed.is_main():
            return
        path = output_dir / "metrics.jsonl"
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= steps_done]
        write_text(path, "".join(kept))
        self._lines = path.open("a", encoding="utf-8")
        if tensorboard:
            self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=steps_done + 1)

    def write(self, metrics: dict[str, Any]) -> None:
        """Appends one step's metrics: numbers, and lists of them; what is not a number becomes null."""
        if self._lines is None:
            return
        self._write_line(metrics)
        if self._board is not None:
            for name, value in _scalars(metrics):
                if name != "step" and _is_number(value):
                    self._board.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Closes the files."""
        for file in (self._lines, self._board):
            if file is not None:
                file.close()

    def _write_line(self, metrics: dict[str, Any]) -> None:
        self._lines.write(json.dumps({name: _clean(value) for name, value in metrics.items()}) + "\n")
        self._lines.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the steps of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rollout_metrics(whole: ScoredRollout, kept: Tensor, max_new_tokens: int) -> dict[str, Any]:
    """Returns what a rollout looked like, over all ranks' rows.

    Args:
        whole: the gathered rollout.
        kept: (B,) bool, rows that updates learn from.
        max_new_tokens: a completion of this length may have been cut.
    """
    lengths = whole.completion_mask.sum(1)
    metrics = {
        "reward": _mean(whole.rewards),
        "reward_std": float(whole.rewards.std(correction=0)),
        "accuracy": _mean(whole.accuracies),
        "completion_length": _mean(lengths),
        "full_length_fraction": _mean(lengths == max_new_tokens),
        "kept_fraction": _mean(kept),
    }
    if whole.entropy is not None:
        metrics["rollout_entropy"] = _mean(whole.entropy[whole.completion_mask])
    if whole.focus is not None:
        metrics |= focus_metrics(whole.focus, whole.completion_mask & whole.has_visual[:, None])
    if whole.attention is not None:
        metrics |= attention_metrics(
            whole.attention, whole.completion_mask & whole.has_visual[:, None], whole.accuracies > 0.5
        )
    return metrics


def weight_metrics(weighting: Weighting, completion_mask: Tensor) -> dict[str, float]:
    """Returns what any algorithm's factors look like over a rollout with `completion_mask` (B, T); None is 1."""
    lengths = completion_mask.sum(1)
    tokens, rows = weighting.token_weights, weighting.trajectory_weights
    tokens = torch.ones_like(completion_mask, dtype=torch.float32) if tokens is None else tokens
    rows = torch.ones_like(lengths, dtype=torch.float32) if rows is None else rows
    return {
        "token_weight_std": _std(tokens[completion_mask]),
        "trajectory_weight_std": _std(rows),
        "corr_trajectory_weight_length": correlation(rows, lengths),
    } | weighting.metrics


def correlation(x: Tensor, y: Tensor) -> float:
    """Returns Pearson's correlation of two vectors, 0 if one of them is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else 0.0


def focus_metrics(focus: Tensor, mask: Tensor) -> dict[str, float]:
    """Returns the mean focus over `mask` (B, T), and that of the later half of a completion over the earlier half."""
    return {"focus_mean": _mean(focus[mask]), "focus_late_early_ratio": late_early_ratio(focus, mask)}


def attention_metrics(attention: Tensor, mask: Tensor, correct: Tensor) -> dict[str, Any]:
    """Returns what completions attend to along their tokens.

    Args:
        attention: (B, T, 3), mass on image, query and generated tokens.
        mask: (B, T) bool, tokens of completions with a picture in their prompt.
        correct: (B,) bool, completions that are right.

    Returns:
        `attention_SEGMENT`: the mean mass in each tenth of a completion, NaN in a tenth that no token falls in;
        `visual_late_early_ratio`: image mass in the later half of completions over the earlier half, of all, and of
        those that are `_correct` and `_incorrect`, NaN if there is none.
    """
    image = attention[..., SEGMENTS.index("image")]
    tenth = completion_tenths(mask)
    curves = {
        f"attention_{segment}": [_mean(attention[..., number][tenth == place]) for place in range(TENTHS)]
        for number, segment in enumerate(SEGMENTS)
    }
    return curves | {
        "visual_late_early_ratio": late_early_ratio(image, mask),
        "visual_late_early_ratio_correct": late_early_ratio(image, mask & correct[:, None]),
        "visual_late_early_ratio_incorrect": late_early_ratio(image, mask & ~correct[:, None]),
    }


def completion_tenths(mask: Tensor) -> Tensor:
    """Returns (B, T) int64: floor(10 t / T_i) for token t = 0 .. T_i - 1 of `mask` (B, T), -1 outside."""
    token = mask.long().cumsum(1) - 1
    tenth = TENTHS * token // mask.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask, tenth, -1)


def late_early_ratio(values: Tensor, mask: Tensor) -> float:
    """Returns the mean of `values` over the later half of `mask` (B, T) in each row, over that of the earlier half.

    The middle token of an odd row is late.
    """
    place = mask.long().cumsum(1)  # 1 .. T_i
    late = mask & (2 * place > mask.sum(1, keepdim=True))
    early_mean, late_mean = _mean(values[mask & ~late]), _mean(values[late])
    return late_mean / early_mean if early_mean else math.nan


def merge_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of the metrics of a step's updates, under the names of `metrics.jsonl`.

    A step without an update (every group was filtered out) has a loss of 0 and changed nothing.
    """
    names = sorted({name for update in updates for name in update} - {"skipped_updates"})
    means = {name: math.fsum(update[name] for update in updates) / len(updates) for name in names}
    clip = sum(means.get(f"clip_fraction_{side}", 0.0) for side in ("low", "high"))
    return {"loss": 0.0, "kl": 0.0, "clip_fraction": clip, "updates": len(updates)} | means


def progress(metrics: dict[str, Any]) -> dict[str, str]:
    """Returns what the progress bar shows of a step."""
    shown = {
        "reward": f"{metrics['reward']:.3f}",
        "length": f"{metrics['completion_length']:.1f}",
        "kl": f"{metrics['kl']:.2e}",
        "s/step": f"{metrics['time_step']:.2f}",
    }
    if "accuracy_test" in metrics:
        shown["test"] = f"{metrics['accuracy_test']:.3f}"
    return shown


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else math.nan


def _std(values: Tensor) -> float:
    return float(values.double().std(correction=0)) if values.numel() else 0.0


def _scalars(metrics: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the numbers of a step by name; those of a curve as NAME/0, NAME/1, ..."""
    for name, value in metrics.items():
        if isinstance(value, list):
            yield from ((f"{name}/{place}", item) for place, item in enumerate(value))
        else:
            yield name, value


def _clean(value: Any) -> Any:
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
