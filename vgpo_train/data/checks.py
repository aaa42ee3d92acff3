"""Finds the rows of a data set that cannot be used, before the first step: each is read and its prompt made once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from vgpo_train.data.errors import WITHOUT_COLUMN, DataError, FieldError
from vgpo_train.data.prompts import PromptCollator
from vgpo_train.data.samples import PictureDataset

_LISTED = 20  # rows of a kind that a report names


@dataclass(frozen=True)
class Examined:
    """The result of reading one row of a data set."""

    place: int  # in the data set
    id: str | None = None  # None if it cannot be read
    source: str = ""
    images: int = 0
    kind: str = ""  # of what is wrong with it; "" if it can be used
    message: str = ""


def examine(data: PictureDataset, collator: PromptCollator, places: Iterable[int]) -> list[Examined]:
    """Read rows of a data set and make their prompts.

    Args:
        data: the data set.
        collator: makes the prompts; its limit on their length applies.
        places: of the rows.

    Returns:
        One result a row, in the order given; errors are part of it and not raised.
    """
    return [_examined(data, collator, place) for place in places]


def unusable(rows: Iterable[Examined]) -> list[Examined]:
    """Return the rows that cannot be used, by place: those with an error, and those with the id of an earlier one.

    Args:
        rows: what `examine` found, of the whole data set, in any order.
    """
    found, sources = [], {}
    for row in sorted(rows, key=lambda row: row.place):
        if not row.kind and row.id in sources:
            message = f"{row.source}: id {row.id!r} is already that of {sources[row.id]}"
            row = Examined(row.place, row.id, row.source, row.images, FieldError.kind, message)
        if row.kind:
            found.append(row)
        elif row.id is not None:
            sources[row.id] = row.source
    return found


def report(name: str, count: int, bad: Sequence[Examined]) -> str:
    """Return what is wrong with a data set: how many rows of each kind, and the first of them.

    A column that no row has is said once, with the columns of the first row.

    Args:
        name: of the data set.
        count: its rows.
        bad: those that cannot be used.
    """
    lines = [f"{name}: {len(bad)} of {count} rows cannot be used"]
    for kind, rows in groupby(sorted(bad, key=lambda row: row.kind), key=lambda row: row.kind):
        messages = [row.message for row in rows]
        if len(messages) == count and kind.startswith(WITHOUT_COLUMN):
            column = kind.removeprefix(WITHOUT_COLUMN)
            lines.append(f"  no row has the column{column}; data.columns and data.test_columns map fields to columns")
            lines.append(f"    {messages[0]}")
            continue
        lines.append(f"  {kind}: {len(messages)}")
        lines.extend(f"    {message}" for message in messages[:_LISTED])
        if len(messages) > _LISTED:
            lines.append(f"    ... and {len(messages) - _LISTED} more")
    return "\n".join(lines)


def _examined(data: PictureDataset, collator: PromptCollator, place: int) -> Examined:
    sample = None
    try:
        sample = data[place]
        collator.check_length(sample, collator.prompt_length(sample))
    except DataError as error:
        kind, message = error.kind, str(error)
    else:
        kind, message = "", ""
    if sample is None:
        return Examined(place, kind=kind, message=message)
    return Examined(place, sample.id, sample.source, len(sample.images), kind, message)
