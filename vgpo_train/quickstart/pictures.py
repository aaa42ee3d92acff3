"""Draws a data set of coloured shapes on a grid: `python -m vgpo_train.quickstart.pictures DIR`."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

CELL = 28  # pixels: one merged visual token of a Qwen2.5-VL tower with patches of 14
SUPERSAMPLING = 4
BACKGROUND = (244, 244, 240)
COLOURS = {
    "red": (214, 48, 49),
    "green": (39, 160, 80),
    "blue": (40, 90, 210),
    "yellow": (240, 196, 25),
    "purple": (150, 60, 190),
}
SHAPES = ("circle", "square", "triangle")
ROWS, COLUMNS = 2, 3
EMPTY = "empty"


@dataclass(frozen=True)
class Cell:
    """A coloured shape."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Puzzle:
    """A grid of ROWS x COLUMNS cells, read row by row (None: an empty cell), and the colour asked for."""

    cells: tuple[Cell | None, ...]
    asked: str

    @property
    def names(self) -> tuple[str, ...]:
        """What the cells are called, row by row: a colour or `empty`."""
        return tuple(EMPTY if cell is None else cell.colour for cell in self.cells)

    @property
    def problem(self) -> str:
        return f"Name the cells in order, then count the {self.asked} ones."

    @property
    def answer(self) -> str:
        return answer_text(self.names, self.asked)


def answer_text(names: tuple[str, ...], asked: str) -> str:
    """Return the answer: the names of the cells in order, then the count of the colour asked for."""
    return f"{' '.join(names)}; {asked} {names.count(asked)}"


def named_cells(answer: str) -> tuple[str, ...]:
    """Return what an answer calls the cells."""
    return tuple(answer.partition(";")[0].split())


def draw_puzzle(rng: random.Random) -> Puzzle:
    """Draw a puzzle whose count is uniform over 0 to the number of cells."""
    n = ROWS * COLUMNS
    asked = rng.choice(tuple(COLOURS))
    matching = set(rng.sample(range(n), rng.randint(0, n)))
    return Puzzle(tuple(_draw_cell(rng, asked, i in matching) for i in range(n)), asked)


def draw_picture(puzzle: Puzzle, rng: random.Random) -> Image.Image:
    """Draw a puzzle's grid with jittered positions, sizes and colours: COLUMNS * CELL x ROWS * CELL pixels, RGB."""
    cell = CELL * SUPERSAMPLING
    size = (COLUMNS * cell, ROWS * cell)
    picture = Image.new("RGB", size, _jittered_colour(BACKGROUND, 6, rng))
    pen = ImageDraw.Draw(picture)
    for i, content in enumerate(puzzle.cells):
        if content is not None:
            row, column = divmod(i, COLUMNS)
            _draw_shape(pen, content, column * cell, row * cell, rng)
    return picture.resize((size[0] // SUPERSAMPLING, size[1] // SUPERSAMPLING), Image.Resampling.BOX)


def draw_puzzles(n: int, rng: random.Random, taken: set) -> Iterator[Puzzle]:
    """Draw `n` puzzles whose cells have no names in `taken`, and add theirs to it."""
    drawn = 0
    while drawn < n:
        puzzle = draw_puzzle(rng)
        if puzzle.names not in taken:
            taken.add(puzzle.names)
            drawn += 1
            yield puzzle


def make_pictures(folder: str | Path, *, train: int = 2048, test: int = 256, seed: int = 0) -> Path:
    """Write a data set: `train.jsonl`, `test.jsonl` and the PNG files they name, no picture content twice.

    Args:
        folder: where to write; created if it is missing.
        train: pictures to learn from.
        test: held-out pictures.
        seed: the same seed draws the same files.

    Returns:
        The folder.

    Raises:
        ValueError: a split without pictures.
    """
    for name, value in (("train", train), ("test", test)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1 picture, got {value}")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, taken = random.Random(seed), set()
    # The held-out split is drawn first: it does not depend on the number of training pictures.
    for split, n in (("test", test), ("train", train)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as lines:
            for number, puzzle in enumerate(draw_puzzles(n, rng, taken)):
                row = _write_row(folder, f"{split}-{number:05d}", puzzle, rng)
                lines.write(json.dumps(row) + "\n")
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vgpo_train.quickstart.pictures", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="where to write the data set")
    parser.add_argument("--train", type=int, default=2048, help="pictures to learn from (default: %(default)s)")
    parser.add_argument("--test", type=int, default=256, help="held-out pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    folder = make_pictures(options.folder, train=options.train, test=options.test, seed=options.seed)
    print(f"{options.train} training and {options.test} held-out pictures in {folder}")


def _draw_cell(rng: random.Random, asked: str, matches: bool) -> Cell | None:
    if not matches and rng.random() < 0.15:
        return None
    colour = asked if matches else rng.choice([colour for colour in COLOURS if colour != asked])
    return Cell(colour, rng.choice(SHAPES))


def _draw_shape(pen: ImageDraw.ImageDraw, content: Cell, left: int, top: int, rng: random.Random) -> None:
    cell = CELL * SUPERSAMPLING
    radius = cell * rng.uniform(0.30, 0.40)
    margin = cell / 2 - radius - SUPERSAMPLING
    x = left + cell / 2 + rng.uniform(-margin, margin)
    y = top + cell / 2 + rng.uniform(-margin, margin)
    fill = _jittered_colour(COLOURS[content.colour], 22, rng)
    box = (x - radius, y - radius, x + radius, y + radius)
    if content.shape == "circle":
        pen.ellipse(box, fill=fill)
    elif content.shape == "square":
        pen.rectangle(box, fill=fill)
    else:
        pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=fill)


def _jittered_colour(colour: tuple[int, int, int], by: int, rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, channel + rng.randint(-by, by))) for channel in colour)


def _write_row(folder: Path, name: str, puzzle: Puzzle, rng: random.Random) -> dict:
    path = f"images/{name}.png"
    draw_picture(puzzle, rng).save(folder / path)
    return {
        "id": name,
        "problem": puzzle.problem,
        "answer": puzzle.answer,
        "images": [path],
        "asked": puzzle.asked,
    }


if __name__ == "__main__":
    main()
