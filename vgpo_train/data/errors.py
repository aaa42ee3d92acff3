"""What can be wrong with a data set, each kind with the words that a report counts it under."""

from collections.abc import Iterable, Sequence

WITHOUT_COLUMN = "rows without the column"


class DataError(ValueError):
    """A file, a row or a prompt that cannot be used; the message names it and the reason."""

    kind = "rows that cannot be read"


class FieldError(DataError):
    """A field of a row is missing, empty or of another type than expected, or an id appears twice."""

    kind = "rows with a field that cannot be used"


class ColumnError(FieldError):
    """A row lacks the column that a field is read from.

    Args:
        columns: any of them would do.
        row: what the row has.
    """

    def __init__(self, columns: Sequence[str], row: Iterable[str]) -> None:
        either = " or ".join(map(repr, columns))
        super().__init__(f"field {either} is missing; the row has {sorted(row)}")
        self.kind = f"{WITHOUT_COLUMN} {either}"


class PictureError(DataError):
    """A picture is missing, broken or not a picture."""

    kind = "rows with a picture that cannot be read"


class MarkError(DataError):
    """The number of `<image>` placeholders is not that of the pictures."""

    kind = "rows whose <image> placeholders do not fit their pictures"


class PromptError(DataError):
    """The checkpoint's processor refuses a prompt."""

    kind = "prompts that the processor refuses"


class PromptTooLong(DataError):
    """A prompt is longer than the limit, and cutting it would cut the tokens of its pictures."""

    kind = "prompts longer than data.max_prompt_length"
