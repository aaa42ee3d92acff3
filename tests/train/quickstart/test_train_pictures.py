"""The drawn data set: files that agree with each other, and splits that share no picture."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vgpo_train.quickstart.pictures import (
    CELL,
    COLOURS,
    COLUMNS,
    EMPTY,
    draw_picture,
    draw_puzzle,
    main,
    make_pictures,
    named_cells,
)


def _rows(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_rows_and_files_agree(pictures: Path) -> None:
    rows = _rows(pictures, "train") + _rows(pictures, "test")
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        names = named_cells(row["answer"])
        assert set(names) <= {*COLOURS, EMPTY}
        assert row["answer"].endswith(f"; {row['asked']} {names.count(row['asked'])}")
        assert row["asked"] in row["problem"]
        with Image.open(pictures / row["images"][0]) as picture:
            assert picture.format == "PNG"
            assert picture.size[0] * picture.size[1] == CELL * CELL * len(names)


def test_a_cell_shows_the_colour_it_is_named_after() -> None:
    rng = random.Random(0)
    for _ in range(20):
        puzzle = draw_puzzle(rng)
        picture = draw_picture(puzzle, rng)
        for place, name in enumerate(puzzle.names):
            row, column = divmod(place, COLUMNS)
            box = (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL)
            # The most colourful pixel of a cell lies on its shape, wherever that is.
            pixels = [colour for _, colour in picture.crop(box).getcolors(CELL * CELL)]
            pixel = max(pixels, key=lambda p: max(p) - min(p))
            nearest = min(COLOURS, key=lambda c: sum((a - b) ** 2 for a, b in zip(pixel, COLOURS[c], strict=True)))
            # An empty cell is nearly white, which no colour of the list is.
            assert (min(pixel) > 220) if name == EMPTY else nearest == name


def test_no_picture_is_in_both_splits(pictures: Path) -> None:
    def contents(split: str) -> list[tuple]:
        found = []
        for row in _rows(pictures, split):
            with Image.open(pictures / row["images"][0]) as picture:
                found.append((picture.size, named_cells(row["answer"])))
        return found

    train, test = contents("train"), contents("test")
    assert len(set(train + test)) == len(train) + len(test)


def test_a_guess_is_rarely_right() -> None:
    rng = random.Random(1)
    answers = Counter(draw_puzzle(rng).answer for _ in range(2000))
    assert max(answers.values()) / 2000 < 0.3


def test_a_seed_draws_the_same_files(tmp_path: Path) -> None:
    one, two, other = (
        make_pictures(tmp_path / name, train=6, test=3, seed=s) for name, s in (("a", 1), ("b", 1), ("c", 2))
    )
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 2 + 6 + 3
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    assert (one / "train.jsonl").read_bytes() != (other / "train.jsonl").read_bytes()


def test_more_training_pictures_leave_the_held_out_split_alone(tmp_path: Path) -> None:
    few, many = make_pictures(tmp_path / "a", train=2, test=3), make_pictures(tmp_path / "b", train=9, test=3)
    assert (few / "test.jsonl").read_bytes() == (many / "test.jsonl").read_bytes()


def test_a_split_needs_a_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="test must be at least 1 picture, got 0"):
        make_pictures(tmp_path, train=1, test=0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main([str(tmp_path), "--train", "3", "--test", "2", "--seed", "4"])
    assert "3 training and 2 held-out pictures" in capsys.readouterr().out
    assert (len(_rows(tmp_path, "train")), len(_rows(tmp_path, "test"))) == (3, 2)
