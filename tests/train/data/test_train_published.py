"""Data sets as they are published, in one file or many, read a row at a time."""

import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from vgpo_train.config import load_config
from vgpo_train.data import Columns, DataError, FieldError, PictureDataset, PromptCollator, examine, unusable
from vgpo_train.model import load_processor
from vgpo_train.preflight import open_datasets

CONFIGS = Path(__file__).resolve().parents[3] / "vgpo_train" / "configs"


def _png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (56, 56), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def _parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with the two data sets of the paper, as they are downloaded."""
    rows = [
        {
            "question": "<image>\nWhich is larger?" if number else "Which is larger?",
            "answer": "\\boxed{A}",
            "PassRate_32BTrained": 0.5,
            "PassRate_7BBase": 0.25,
            "category": "(GradeSchool) Geometric",
            "source": "Processed",
            "qid": f"Processed-{number}",
            "image": ["images/Processed-0.png"],
        }
        for number in range(3)
    ]
    _parquet(tmp_path / "data/ViRL39K/39Krelease.parquet", rows)
    (tmp_path / "data/ViRL39K/README.md").write_text("# ViRL39K\n")
    (tmp_path / "data/ViRL39K/images").mkdir()
    (tmp_path / "data/ViRL39K/images/Processed-0.png").write_bytes(_png("red"))
    for split, count in (("train", 2), ("test", 4)):
        rows = [
            {
                "id": f"{split}-{number}",
                "question": "<image>Which angle is right?",
                "answer": "B",
                "subject": "math",
                "image": {"bytes": _png("blue"), "path": f"{number}.png"},
            }
            for number in range(count)
        ]
        _parquet(tmp_path / f"data/MMK12/data/{split}-00000-of-00001.parquet", rows)
    return tmp_path


@pytest.mark.parametrize("name", ["vgpo_7b.yaml", "vgpo_32b.yaml"])
def test_the_shipped_settings_read_the_published_files(
    name: str, published: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(published)
    config = load_config(CONFIGS / name, [])
    datasets = open_datasets(config.data)
    train, test = datasets["data.train"], datasets["data.test"]
    assert [sample.id for sample in train] == ["Processed-0", "Processed-1", "Processed-2"]
    assert [sample.id for sample in test] == ["test-0", "test-1", "test-2", "test-3"]
    assert (train[1].problem, train[1].answer) == ("<image>\nWhich is larger?", "\\boxed{A}")
    assert train[0].extra.keys() == {"PassRate_32BTrained", "PassRate_7BBase", "category", "source"}
    assert train[0].open_images()[0].getpixel((0, 0)) == (255, 0, 0)
    assert test[0].extra == {"subject": "math"}
    collator = PromptCollator(load_processor(tiny_checkpoint), max_prompt_length=200)
    for data in datasets.values():
        assert unusable(examine(data, collator, range(len(data)))) == []


def test_published_spellings_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png("red"))
    row = {"qid": 0, "question": "<image> what?", "answer": "\\boxed{A}", "image": ["a.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"qid": 1}) + "\n" + json.dumps(row) + "\n")
    first, second = PictureDataset(tmp_path / "rows.jsonl")
    assert [first.id, second.id] == ["1", "0"]
    assert (second.problem, second.answer, second.images) == ("<image> what?", "\\boxed{A}", (tmp_path / "a.png",))


def test_a_mapping_says_which_column_holds_what(tmp_path: Path) -> None:
    row = {"id": 4, "uid": "u4", "problem": "the wrong one", "prompt": "the right one", "gold": "1", "figures": []}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (sample,) = PictureDataset(path, columns={"id": "uid", "problem": "prompt", "answer": "gold", "images": "figures"})
    assert (sample.id, sample.problem, sample.answer) == ("u4", "the right one", "1")
    assert sample.extra == {"id": 4, "problem": "the wrong one"}
    with pytest.raises(FieldError, match=r"line 1: id '4': field 'frage' is missing; the row has \['figures', "):
        PictureDataset(path, columns={"problem": "frage"})[0]
    # A preset means its columns, and no others.
    with pytest.raises(FieldError, match="field 'question' is missing"):
        PictureDataset(path, columns="ViRL39K")[0]
    with pytest.raises(FieldError, match="expected one of the fields 'problem' and 'question', got both"):
        Columns().text({"problem": "?", "question": "??"}, "problem")


def _numbered(first: int, count: int) -> list[dict[str, Any]]:
    return [
        {"id": number, "problem": "?", "answer": "1", "images": [{"bytes": _png("red"), "path": None}]}
        for number in range(first, first + count)
    ]


def test_a_folder_a_glob_or_a_list_is_a_data_set(tmp_path: Path) -> None:
    for number in range(3):
        _parquet(tmp_path / f"set/train-0000{number}-of-00003.parquet", _numbered(10 * number, 2))
    expected = ["0", "1", "10", "11", "20", "21"]
    shards = [str(path) for path in sorted((tmp_path / "set").iterdir())]
    for source in (
        tmp_path / "set",
        str(tmp_path / "set"),
        f"{tmp_path}/set/train-*.parquet",
        f"{tmp_path}/**/t*",
        shards,
    ):
        assert [sample.id for sample in PictureDataset(source)] == expected
    assert [sample.id for sample in PictureDataset(list(reversed(shards)))] == ["20", "21", "10", "11", "0", "1"]
    assert [sample.id for sample in PictureDataset(shards, limit=3)] == expected[:3]
    assert PictureDataset(shards)[5].source == f"{shards[2]}, row 1 (from 0)"
    row = {"id": "m", "problem": "?", "answer": 1, "images": []}
    (tmp_path / "set/train-more.JSONL").write_text(json.dumps(row) + "\n")
    assert [sample.id for sample in PictureDataset(tmp_path / "set")] == [*expected, "m"]


@pytest.mark.parametrize("name", ["train-00001.jsonl.gz", "more.csv", "b.parquet.zst", "c.json", "data.arrow"])
def test_rows_in_another_form_are_not_left_out_of_a_folder_without_a_word(tmp_path: Path, name: str) -> None:
    _parquet(tmp_path / "set/train-00000.parquet", _numbered(0, 2))
    (tmp_path / "set/train_infos.json").write_text("{}")
    assert len(PictureDataset(tmp_path / "set")) == 2
    (tmp_path / "set" / name).write_text(' [{"id": 1}]')
    with pytest.raises(DataError, match=f"expected data files of .jsonl or .parquet alone, got {name}, too; convert"):
        PictureDataset(tmp_path / "set")


def test_a_source_without_a_file_or_of_several_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data file matches '.*x-\*\.parquet'"):
        PictureDataset(f"{tmp_path}/x-*.parquet")
    with pytest.raises(
        DataError, match=r"folder '.*' has no .jsonl or .parquet file in it; a glob reaches deeper ones"
    ):
        PictureDataset(tmp_path)
    with pytest.raises(DataError, match="expected at least one data file, got an empty list"):
        PictureDataset([])
    _parquet(tmp_path / "once/a.parquet", _numbered(0, 1))
    with pytest.raises(DataError, match=r"expected each data file once, got .*a\.parquet more than once"):
        PictureDataset([str(tmp_path / "once/a.parquet")] * 2)
    with pytest.raises(FileNotFoundError, match=r"data file '.*b\.jsonl' does not exist"):
        PictureDataset([str(tmp_path / "b.jsonl")])
    for number, names in enumerate(
        [
            ("train-00000-of-00001", "test-00000-of-00001"),
            ("mmk12_test", "mmk12_train"),
            ("training", "testing"),
            ("data", "data_test"),
            ("Train", "Validation"),
            ("train", "valid"),
            ("train", "testmini-0"),
            ("train", "minitest"),
            ("train", "TestSet"),
            ("data", "validate"),
            ("train", "held_out"),
            ("train", "other"),
            ("trainTest", "x"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            (folder / f"{name}.jsonl").write_text("{}\n")
        with pytest.raises(DataError, match=rf"files of several splits \(.*{names[0]}.*; name those of one in a list"):
            PictureDataset(folder)


def test_a_folder_of_one_split_is_a_data_set(tmp_path: Path) -> None:
    for number, names in enumerate([("a-test", "b-test"), ("train-a", "train-b"), ("contest", "latest")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            (folder / f"{name}.jsonl").write_text("{}\n")
        assert len(PictureDataset(folder)) == 2, names


def test_columns_of_categories_and_files_that_changed_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = pyarrow.Table.from_pylist(_numbered(0, 200))
    kinds = pyarrow.array([f"kind {number}" for number in range(200)]).dictionary_encode()
    pyarrow.parquet.write_table(rows.append_column("kind", kinds), path)
    assert PictureDataset(path)[150].extra == {"kind": "kind 150"}
    _parquet(path, _numbered(500, 3))
    assert [sample.id for sample in PictureDataset(path)] == ["500", "501", "502"]


def test_a_folder_for_copies_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _parquet(tmp_path / "rows.parquet", _numbered(0, 1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    with pytest.raises(DataError, match=r"rows\.parquet: no copy can be made in .*; set XDG_CACHE_HOME"):
        PictureDataset(path)


def test_rows_are_not_held_in_memory(tmp_path: Path) -> None:
    noise = [os.urandom(1_000_000) for _ in range(40)]  # 40 MB that do not compress
    rows = [
        row | {"images": [{"bytes": data, "path": None}]} for row, data in zip(_numbered(0, 40), noise, strict=True)
    ]
    path = _parquet(tmp_path / "large.parquet", rows, row_group_size=10)
    del rows, noise
    PictureDataset(path)  # makes the copy
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    data = PictureDataset(path)
    assert sum(len(sample.images[0]) for sample in data) == 40_000_000
    assert pyarrow.total_allocated_bytes() - before < 1_000_000
    assert tracemalloc.get_traced_memory()[1] < 10_000_000, "bytes at most, a few rows at a time"
    tracemalloc.stop()
