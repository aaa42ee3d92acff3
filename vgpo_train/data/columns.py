"""The columns that hold the fields of a sample: by known names, a published data set's preset, or a mapping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from vgpo_train.data.errors import ColumnError, FieldError

FIELDS = ("id", "problem", "answer", "images")
AUTO: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "qid"),
    "problem": ("problem", "question"),
    "answer": ("answer",),
    "images": ("images", "image"),
}
PRESETS: Mapping[str, Mapping[str, str]] = {
    "virl39k": {"id": "qid", "problem": "question", "answer": "answer", "images": "image"},
    "mmk12": {"id": "id", "problem": "question", "answer": "answer", "images": "image"},
}
_SHOWN = 200  # characters of a row's value in an error message


class Columns:
    """Takes the fields of a sample from a row.

    Args:
        choice: "auto" takes `problem` or `question`, `images` or `image`, `id` or `qid`, whichever a row has; the name
            of a preset ("virl39k", "mmk12") or a mapping such as `{problem: prompt}` name the columns, and
            fields that a mapping leaves out are found as by "auto".

    Raises:
        ValueError: an unknown preset, or a mapping of unknown fields or to what is no column name.
    """

    def __init__(self, choice: str | Mapping[str, str] = "auto") -> None:
        if isinstance(choice, str):
            if choice.lower() not in ("auto", *PRESETS):
                names = ", ".join(map(repr, ("auto", *PRESETS)))
                raise ValueError(f"expected {names} or a mapping such as {{problem: question}}, got {choice!r}")
            choice = PRESETS.get(choice.lower(), {})
        if not isinstance(choice, Mapping):
            raise ValueError(f"expected the name of a preset or a mapping, got {type(choice).__name__}")
        for field, column in choice.items():
            if field not in FIELDS:
                raise ValueError(f"expected a mapping of {', '.join(FIELDS)}, got the field {field!r}")
            if not isinstance(column, str) or not column:
                raise ValueError(f"{field}: expected the name of a column, got {column!r}")
        self._names = {field: (choice[field],) if field in choice else AUTO[field] for field in FIELDS}

    def id(self, row: Mapping[str, Any]) -> str | None:
        """Return the row's id as text, or None if it has none."""
        return next((str(row[name]) for name in self._names["id"] if row.get(name) is not None), None)

    def text(self, row: Mapping[str, Any], field: str) -> str:
        """Return the problem or the answer as text.

        Raises:
            FieldError: it is missing, null, empty, given twice, or neither text nor a finite number.
        """
        name = self._one(row, field)
        value = row[name]
        if value is None:
            raise FieldError(f"field {name!r} is null")
        if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
            raise FieldError(f"field {name!r} must be text or a number, got {type(value).__name__}: {shown(value)}")
        if isinstance(value, (float, Decimal)) and not math.isfinite(value):
            raise FieldError(f"field {name!r} must be text or a finite number, got {value}")
        text = str(value)
        if not text.strip():
            raise FieldError(f"field {name!r} is empty, got {shown(value)}")
        return text

    def images(self, row: Mapping[str, Any]) -> Sequence[Any]:
        """Return the row's pictures as they are given, none for null or [].

        Raises:
            FieldError: the column is missing, or pictures stand in two columns.
        """
        try:
            value = row[self._one(row, "images")]
        except FieldError as error:
            error.args = (f"{error}; a row of text alone says null or []",)
            raise
        if value is None:
            return ()
        return value if isinstance(value, (list, tuple)) else (value,)

    def extra(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of the row is none of the fields."""
        taken = {name for names in self._names.values() for name in names}
        return {name: value for name, value in row.items() if name not in taken}

    def _one(self, row: Mapping[str, Any], field: str) -> str:
        names = self._names[field]
        present = [name for name in names if name in row]
        if not present:
            raise ColumnError(names, row)
        # A table with a column of each name holds null in the one that a row does not use.
        given = [name for name in present if row[name] is not None]
        if len(given) > 1:
            raise FieldError(f"expected one of the fields {' and '.join(map(repr, given))}, got both")
        return (given or present)[0]


def shown(value: Any) -> str:
    """Return how a value looks, cut short."""
    return f"{value!r:.{_SHOWN}}"
