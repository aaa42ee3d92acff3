"""The pictures of a report, each for light and for dark pages: time and memory against length, share of the ceiling."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, NullFormatter

from benchmarks.report_text import caption
from benchmarks.result_file import OURS, PLAIN, Entry, Results
from benchmarks.scaling import sweeps

LENGTH = "T"  # the axis whose sweeps are drawn
COLUMNS = 3


class Theme(NamedTuple):
    """Colours of a page; those of peers are told apart also by the colour-blind."""

    page: str
    ink: str
    faint: str
    ours: str
    peers: tuple[str, ...]


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#d1d9e0", "#0969da", ("#bc4c00", "#8250df", "#1a7f37", "#bf3989", "#7d4e00")),
    "dark": Theme("#0d1117", "#e6edf3", "#3d444d", "#58a6ff", ("#f0883e", "#d2a8ff", "#3fb950", "#ff7bba", "#e3b341")),
}
MARKERS = ("s", "^", "D", "v", "P")


def draw(results: Results, folder: Path) -> dict[str, dict[str, Path]]:
    """Draws what a file has to show.

    Args:
        results: of one machine.
        folder: where the PNG files go, named after the file of results.

    Returns:
        The pictures by title and theme; those without data are left out.
    """
    drawings: dict[str, tuple[str, Callable[[Results, Theme], Any]]] = {
        "Time against length": ("time", draw_time),
        "Peak extra memory against length": ("memory", draw_memory),
        "Share of the machine's ceiling, ours and the best peer, worst case of each room": ("ceiling", draw_ceiling),
    }
    written: dict[str, dict[str, Path]] = {}
    for title, (name, drawing) in drawings.items():
        for theme, colours in THEMES.items():
            with plt.rc_context(_style(colours)):
                figure = drawing(results, colours)
                if figure is None:
                    continue
                figure.supxlabel(caption(results), fontsize=8, alpha=0.75)
                path = folder / f"{results.path.stem}-{name}-{theme}.png"
                figure.savefig(path, dpi=120)
                plt.close(figure)
                written.setdefault(title, {})[theme] = path
    return written


def draw_time(results: Results, theme: Theme) -> Any:
    """Seconds of each provider against length, and the floor; None without such a sweep."""

    def floor(axes: Any, entries: Sequence[Entry]) -> None:
        axes.plot(
            *zip(*((x.size, x.floor) for x in entries), strict=True),
            color=theme.ink,
            linestyle=":",
            linewidth=1.2,
            label="floor",
        )

    return _sweeps(results, theme, lambda x: x.median, "s", floor)


def draw_memory(results: Results, theme: Theme) -> Any:
    """Peak bytes beyond inputs and results against length; None without such a sweep."""
    return _sweeps(results, theme, lambda x: x.memory, "B", None)


def draw_ceiling(results: Results, theme: Theme) -> Any:
    """Bars of what ours reaches of the ceiling, and the best peer beside it, in the worst case of each room."""
    worst: dict[str, tuple[Entry, Entry | None]] = {}
    for group in results.groups:
        ours = group.ours
        if ours is None or group.in_sweep:
            continue
        if ours.room not in worst or ours.of_ceiling < worst[ours.room][0].of_ceiling:
            worst[ours.room] = ours, group.best_peer
    if not worst:
        return None
    pairs = sorted(worst.values(), key=lambda x: x[0].of_ceiling, reverse=True)  # the last is drawn on top
    figure, axes = plt.subplots(figsize=(9.5, 1.1 + 0.62 * len(pairs)), layout="constrained")
    for place, (ours, peer) in enumerate(pairs):
        _bar(axes, place + 0.19, ours, theme.ours)
        if peer is not None:
            _bar(axes, place - 0.19, peer, theme.peers[0])
    axes.set_yticks(range(len(pairs)), [f"{ours.room}\n{ours.case}" for ours, _ in pairs], fontsize=8)
    most = max(entry.of_ceiling for pair in pairs for entry in pair if entry is not None)
    axes.set_xlim(0, max(1.0, most) * 1.22)  # room for the names beside the bars
    axes.axvline(1, color=theme.ink, linestyle=":", linewidth=1.2)
    axes.set_xticks([tick / 5 for tick in range(6)], [f"{20 * tick}%" for tick in range(6)])
    axes.set_xlabel("share of the rate of a large product or copy, whichever bounds the work")
    axes.margins(y=0.02)
    axes.grid(axis="y", visible=False)
    return figure


def _bar(axes: Any, place: float, entry: Entry, colour: str) -> None:
    axes.barh(place, entry.of_ceiling, height=0.36, color=colour)
    axes.annotate(
        f"{100 * entry.of_ceiling:.2g}%  {entry.provider}",
        (entry.of_ceiling, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        bbox={"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 0.5},  # keeps grid lines off the text
    )


def _sweeps(
    results: Results,
    theme: Theme,
    value: Callable[[Entry], float | None],
    unit: str,
    beside: Callable[[Any, Sequence[Entry]], None] | None,
) -> Any:
    """One pair of logarithmic axes a room; `beside` draws what else belongs to a room's sweep."""
    rooms: dict[str, list[list[Entry]]] = {}
    for (room, axis, _), entries in sweeps(results).items():
        # Nothing of a logarithm is left of what takes no memory.
        if axis == LENGTH and any(value(entry) for entry in entries):
            rooms.setdefault(room, []).append(entries)
    if not rooms:
        return None
    columns = min(COLUMNS, len(rooms))
    rows = math.ceil(len(rooms) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), layout="constrained", squeeze=False)
    for axes, (room, curves) in zip(grid.flat, rooms.items(), strict=False):
        _curves(axes, curves, theme, value)
        if beside is not None:
            beside(axes, curves[0])
        _dress(axes, room, [entry.size for entry in curves[0]], unit)
    for axes in grid.flat[len(rooms) :]:
        axes.set_visible(False)
    return figure


def _curves(axes: Any, curves: Sequence[Sequence[Entry]], theme: Theme, value: Callable[[Entry], float | None]) -> None:
    others = 0
    for entries in curves:
        points = [(entry.size, value(entry)) for entry in entries if value(entry)]
        style = {"color": theme.ours, "marker": "o", "linewidth": 2.2, "zorder": 3}
        if entries[0].role == PLAIN:
            style = {"color": theme.ours, "marker": "o", "linestyle": "--", "alpha": 0.7}
        elif entries[0].role != OURS:
            style = {"color": theme.peers[others % len(theme.peers)], "marker": MARKERS[others % len(MARKERS)]}
            others += 1
        axes.plot(*zip(*points, strict=True), label=entries[0].provider, markersize=4, **style)


def _dress(axes: Any, title: str, sizes: Sequence[float], unit: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size / 1024:g}k" if size >= 1024 else f"{size:g}" for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(EngFormatter(unit))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(LENGTH, fontsize=8)
    axes.set_title(title, fontsize=9.5)
    axes.legend(fontsize=7.5, frameon=False)


def _style(theme: Theme) -> Any:
    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    return {
        "figure.facecolor": theme.page,
        "axes.facecolor": theme.page,
        "savefig.facecolor": theme.page,
        "axes.edgecolor": theme.faint,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "font.size": 9,
        **dict.fromkeys(inked, theme.ink),
    }
