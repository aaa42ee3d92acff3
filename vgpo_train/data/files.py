"""The files of a data set; a row is read when it is indexed."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from vgpo_train.data.errors import DataError

SUFFIXES = (".jsonl", ".parquet")
# Rows in a form that is not read: beside files that are read, they must not be left out without a word.
_OTHER_ROWS = re.compile(r"\.(csv|tsv|ndjson|arrow|feather|orc|(jsonl|parquet)\.\w+)$", re.IGNORECASE)
# A word of a file's name: train-00000, mmk12_test, ViRL39K.val, testmini, trainSet
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_SPLIT = re.compile(r"(train|test|valid|eval).*|val|dev|minitest|hold(?:out)?|held(?:out)?")
_WHOLE = "no split"
_COPIED_ROWS = 64  # at once, of rows with pictures


class Rows(Protocol):
    """The rows of a file."""

    path: Path

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """Return the file and the place of a row in it, for messages."""
        ...

    def read(self, index: int) -> dict[str, Any]:
        """Return a row; raises DataError if it cannot be read."""
        ...


def data_files(source: str | os.PathLike[str] | Sequence[str]) -> list[Path]:
    """Return the files of a data set.

    Args:
        source: a `.jsonl` or `.parquet` file, a folder of such files, a glob, or a list of these.

    Returns:
        The files: of a folder or a glob by name, of a list in its order.

    Raises:
        FileNotFoundError: a file or folder that does not exist, a glob that matches no file.
        DataError: an unknown extension, an empty list, a folder without such a file, with rows in another form or
            with files of several splits.
    """
    if isinstance(source, (str, os.PathLike)):
        return _files_of(os.fspath(source))
    files = [file for part in source for file in _files_of(os.fspath(part))]
    if not files:
        raise DataError("expected at least one data file, got an empty list")
    if twice := sorted({str(file) for file in files if files.count(file) > 1}):
        raise DataError(f"expected each data file once, got {', '.join(twice)} more than once")
    return files


def open_rows(path: Path) -> Rows:
    """Return the rows of a file.

    Raises:
        DataError: the file cannot be read.
    """
    return JsonLines(path) if path.suffix.lower() == ".jsonl" else ParquetRows(path)


class JsonLines:
    """The rows of a JSONL file, blank lines left out; in memory are the offsets of their starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets, self._lines = array("Q"), array("Q")
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, index: int) -> str:
        return f"{self.path}, line {self._lines[index]}"

    def read(self, index: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            row = json.loads(line.decode("utf-8-sig"))  # Windows programs begin a file with a mark
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8: {error}") from error
        except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
            raise DataError(f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"expected a JSON object, got {type(row).__name__}")
        return row


class ParquetRows:
    """The rows of a Parquet file, in a memory-mapped Arrow copy: reading one from Parquet decodes its row group."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.path = path
        try:
            self._table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(_arrow_copy(path)))).read_all()
        except DataError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
        names = self._table.column_names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{path}: expected each column once, got {', '.join(map(repr, twice))} more than once")

    def __len__(self) -> int:
        return self._table.num_rows

    def where(self, index: int) -> str:
        return f"{self.path}, row {index} (from 0)"

    def read(self, index: int) -> dict[str, Any]:
        try:
            return self._table.slice(index, 1).to_pylist()[0]
        except (ArithmeticError, ValueError) as error:  # such as a time that Python has no type for
            raise DataError(f"a value that cannot be read: {error}") from error


def cache_folder() -> Path:
    """Return the folder of the Arrow copies of Parquet files; they may be deleted between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vgpo_train"


def _arrow_copy(path: Path) -> Path:
    """Return the Arrow copy of a Parquet file, made by the first process that needs it."""
    from filelock import FileLock

    state = path.stat()
    key = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
    copy = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow"
    draft = copy.with_suffix(".draft")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.with_suffix(".lock")):
            if not copy.exists():
                try:
                    _copy_parquet(path, draft)
                    draft.rename(copy)
                finally:
                    draft.unlink(missing_ok=True)
    except OSError as error:  # none of Parquet's own errors is one: a folder that cannot be written, a full disk
        raise DataError(f"{path}: no copy can be made in {copy.parent}: {error}; set XDG_CACHE_HOME") from error
    return copy


def _copy_parquet(path: Path, target: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    with file, pyarrow.ipc.new_stream(target, file.schema_arrow) as copy:
        for batch in file.iter_batches(batch_size=_COPIED_ROWS):
            copy.write_batch(batch)
    pyarrow.default_memory_pool().release_unused()


def _files_of(source: str) -> list[Path]:
    source = os.path.expanduser(source)
    path = Path(source)
    if path.is_dir():
        return _files_of_folder(path)
    if path.exists():
        return [_known(path)]
    if glob.has_magic(source):
        files = [Path(match) for match in sorted(glob.glob(source, recursive=True)) if os.path.isfile(match)]
        if files:
            return [_known(file) for file in files]
        raise FileNotFoundError(f"no data file matches {source!r}")
    raise FileNotFoundError(f"data file {source!r} does not exist")


def _files_of_folder(folder: Path) -> list[Path]:
    seen = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in seen if file.suffix.lower() in SUFFIXES]
    if not files:
        raise DataError(f"folder {str(folder)!r} has no {' or '.join(SUFFIXES)} file in it; a glob reaches deeper ones")
    if others := [file.name for file in seen if _other_rows(file)]:
        raise DataError(
            f"folder {str(folder)!r}: expected data files of {' or '.join(SUFFIXES)} alone, got {', '.join(others)}, "
            "too; convert them, or name the files to read in a list or by a glob"
        )
    splits = {_split(file): file for file in reversed(files)}
    if len(splits) > 1:
        names = ", ".join(f"{file.name}: {split}" for split, file in sorted(splits.items()))
        raise DataError(
            f"folder {str(folder)!r} has files of several splits ({names}); name those of one in a list or by a glob"
        )
    return files


def _other_rows(file: Path) -> bool:
    if file.suffix.lower() != ".json":
        return _OTHER_ROWS.search(file.name) is not None
    with file.open("rb") as opened:  # a list of rows, or an object that describes the data set
        return opened.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _split(file: Path) -> str:
    """Return the split that a file is of by its name."""
    matches = (_SPLIT.fullmatch(word.lower()) for word in _WORD.findall(file.stem))
    return next((match[1] or match[0] for match in matches if match), _WHOLE)


def _known(path: Path) -> Path:
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: unknown extension {path.suffix!r}; expected {' or '.join(SUFFIXES)}")
    return path
