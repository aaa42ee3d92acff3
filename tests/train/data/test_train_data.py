"""Rows from disk, prompts with pictures, batches whose rows can be taken apart, and what is wrong with a data set."""

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from vgpo_kernels.integrations.transformers import visual_token_mask
from vgpo_train.data import (
    DataError,
    FieldError,
    PictureDataset,
    PictureError,
    PromptCollator,
    PromptTooLong,
    Sample,
    epoch_order,
    examine,
    report,
    step_order,
    unusable,
)
from vgpo_train.model import load_model, load_processor


def _png(colour: str = "red", size: tuple[int, int] = (56, 84)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def _jsonl(folder: Path, *rows: dict | str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path):
    return load_processor(tiny_checkpoint)


@pytest.fixture
def collator(processor) -> PromptCollator:
    return PromptCollator(processor, max_prompt_length=128)


def test_rows_of_a_real_data_set(pictures: Path) -> None:
    data = PictureDataset(pictures / "train.jsonl", limit=5)
    assert len(data) == 5
    sample = data[3]
    row = json.loads((pictures / "train.jsonl").read_text().splitlines()[3])
    assert (sample.id, sample.problem, sample.answer) == (row["id"], row["problem"], row["answer"])
    assert sample.images == (pictures / row["images"][0],)
    assert sample.extra["asked"] == row["asked"]
    assert [image.mode for image in sample.open_images()] == ["RGB"]


def test_an_id_is_the_rows_or_its_number(tmp_path: Path) -> None:
    rows = {"problem": "?", "answer": 1, "images": None}
    data = PictureDataset(_jsonl(tmp_path, rows, rows | {"id": 7}, rows | {"qid": "q1"}, rows | {"qid": 0}))
    assert [sample.id for sample in data] == ["0", "7", "q1", "0"]
    assert [sample.answer for sample in data] == ["1", "1", "1", "1"]
    assert all(sample.images == () for sample in data)


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_holds_bytes(tmp_path: Path, as_struct: bool) -> None:
    image = {"bytes": _png("blue"), "path": None} if as_struct else _png("blue")
    rows = [{"problem": "<image>?", "answer": "2", "images": [image]} for _ in range(3)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    data = PictureDataset(path, limit=2)
    assert len(data) == 2
    assert data[1].open_images()[0].getpixel((0, 0)) == (0, 0, 255)


def test_a_parquet_path_starts_at_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    rows = [{"problem": "?", "answer": "2", "images": [{"bytes": None, "path": "a.png"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert PictureDataset(tmp_path / "rows.parquet")[0].images == (tmp_path / "a.png",)


def test_errors_name_file_row_and_id(tmp_path: Path) -> None:
    good = {"id": "a", "problem": "?", "answer": "1", "images": []}
    with pytest.raises(FileNotFoundError, match=r"data file '.*nowhere\.jsonl' does not exist"):
        PictureDataset(tmp_path / "nowhere.jsonl")
    (tmp_path / "rows.csv").write_text("problem,answer\n")
    with pytest.raises(DataError, match=r"rows\.csv: unknown extension '\.csv'; expected \.jsonl or \.parquet"):
        PictureDataset(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="no rows"):
        PictureDataset(_jsonl(tmp_path))
    with pytest.raises(ValueError, match="limit must be at least 1 row or None, got 0"):
        PictureDataset(_jsonl(tmp_path, good), limit=0)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"id": "b", "problem": "?"}, "id 'b': field 'answer' is missing; the row has \\['id', 'problem'\\]"),
        ({"images": ["gone.png"]}, "id 'b': image file '.*gone\\.png' does not exist"),
        ({"images": ["."]}, "id 'b': image file '.*' is a folder"),
        ({"images": [""]}, "id 'b': an image must be a path, bytes or {bytes, path}, got ''"),
        ({"images": [3]}, "id 'b': an image must be a path, bytes or {bytes, path}, got 3"),
        (
            {"images": ["https://x/cat.png"]},
            "id 'b': image 'https://x/cat.png' is an address; only paths .* and .* bytes",
        ),
        ({"images": ["data:image/png;base64,iVBO"]}, "id 'b': image 'data:image/.*' is an address"),
        ({"images": ["file:///a.png"]}, "id 'b': image 'file:///a.png' is an address"),
        ("{problem", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
    ],
)
def test_errors_name_the_line_as_an_editor_counts_it(tmp_path: Path, row: dict | str, error: str) -> None:
    good = {"id": "a", "problem": "?", "answer": "1", "images": []}
    if isinstance(row, dict) and "id" not in row:
        row = good | {"id": "b"} | row
    data = PictureDataset(_jsonl(tmp_path, good, "", row))
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 3: {error}"):
        data[1]


@pytest.mark.parametrize("key", ["problem", "answer"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (["1", "2"], r"must be text or a number, got list: \['1', '2'\]"),
        ({"a": 1}, "must be text or a number, got dict"),
        (True, "must be text or a number, got bool: True"),
        (float("nan"), "must be text or a finite number, got nan"),
        ("", "is empty, got ''"),
        (" \n", r"is empty, got ' \\n'"),
        (None, "is null"),
    ],
)
def test_problem_and_answer_are_text_or_numbers(tmp_path: Path, key: str, value, error: str) -> None:
    good = {"id": "a", "problem": "?", "answer": "1", "images": []}
    with pytest.raises(FieldError, match=rf"rows\.jsonl, line 2: id 'b': field '{key}' {error}"):
        PictureDataset(_jsonl(tmp_path, good, good | {"id": "b", key: value}))[1]


def test_a_row_says_whether_it_has_pictures(tmp_path: Path) -> None:
    row = {"id": "a", "problem": "?", "answer": 0}
    (tmp_path / "a.png").write_bytes(_png())
    message = (
        r"line 1: id 'a': field 'images' or 'image' is missing; the row has \['answer', .*'picture', .* null or \[\]"
    )
    with pytest.raises(FieldError, match=message):
        PictureDataset(_jsonl(tmp_path, row | {"picture": ["a.png"]}))[0]
    with pytest.raises(FieldError, match="id 'a': expected one of the fields 'images' and 'image', got both"):
        PictureDataset(_jsonl(tmp_path, row | {"images": ["a.png"], "image": "a.png"}))[0]
    for none in ({"images": None}, {"images": []}, {"image": None}):
        assert PictureDataset(_jsonl(tmp_path, row | none))[0].images == ()
    # A table with a column of each name holds null in the one that a row does not use.
    for one in ({"image": "a.png"}, {"images": ["a.png"]}, {"images": None, "image": "a.png"}):
        assert PictureDataset(_jsonl(tmp_path, row | one))[0].images == (tmp_path / "a.png",)


def test_text_in_the_place_of_a_path_is_cut_short(tmp_path: Path) -> None:
    row = {"problem": "?", "answer": "1", "image": "iVBORw0KGgo" * 1000}  # base64 is longer than a file name may be
    with pytest.raises(PictureError, match=r"line 1: id '0': image 'iVBOR.* looks like base64") as raised:
        PictureDataset(_jsonl(tmp_path, row))[0]
    assert len(str(raised.value)) < 500


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    good = json.dumps({"problem": "?", "answer": "1", "images": []}).encode()
    path = tmp_path / "latin.jsonl"
    path.write_bytes(good + b"\n" + good.replace(b"?", "é?".encode("latin-1")))
    with pytest.raises(DataError, match=r"latin\.jsonl, line 2: not UTF-8: .*0xe9"):
        PictureDataset(path)[1]
    assert len(PictureDataset(path, limit=1)) == 1
    path = tmp_path / "cut.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"problem": "?"}]), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut\.parquet: cannot be read as Parquet: "):
        PictureDataset(path)


def test_a_data_set_without_some_of_its_samples(tmp_path: Path) -> None:
    rows = [{"id": name, "problem": "?", "answer": "1", "images": []} for name in "abc"]
    data = PictureDataset(_jsonl(tmp_path, *rows))
    rest = data.without({1, 9})
    assert [sample.id for sample in rest] == ["a", "c"]
    assert [sample.id for sample in rest.without({0})] == ["c"]
    assert [sample.id for sample in data] == ["a", "b", "c"], "the whole one stays as it was"
    with pytest.raises(DataError, match=r"rows\.jsonl: no rows are left of 3"):
        data.without({0, 1, 2})


def test_all_that_is_wrong_is_found_at_once(tmp_path: Path, collator: PromptCollator) -> None:
    good = {"problem": "?", "answer": "1", "images": ["a.png"]}
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "cut.png").write_bytes(_png()[:60])
    (tmp_path / "flat.png").write_bytes(_png(size=(6000, 4)))
    wrong = {
        "fine": {},
        "cut": {"images": ["cut.png"]},
        "marks": {"problem": "<image> <image>"},
        "flat": {"images": ["flat.png"]},  # Qwen2.5-VL refuses ratios of 200 and more
        "long": {"problem": "Count. " * 99},
        "null": {"answer": None},
        "also fine": {"images": []},
    }
    path = _jsonl(tmp_path, *({"id": name} | good | row for name, row in wrong.items()), "{", {"id": "fine"} | good)
    data = PictureDataset(path)
    # Two ranks share the rows; the second copy of an id is found when both are put together.
    rows = examine(data, collator, range(0, 9, 2)) + examine(data, collator, range(1, 9, 2))
    bad = unusable(rows)
    assert [row.place for row in bad] == [1, 2, 3, 4, 5, 7, 8]
    text = report("data.train", len(data), bad)
    for line in (
        "data.train: 7 of 9 rows cannot be used",
        "  rows with a picture that cannot be read: 1",
        f"    {path}, line 2: id 'cut': cannot read image {tmp_path / 'cut.png'}: image file is truncated",
        "  rows whose <image> placeholders do not fit their pictures: 1",
        "  prompts that the processor refuses: 1",
        "  prompts longer than data.max_prompt_length: 1",
        "  rows with a field that cannot be used: 2",
        f"    {path}, line 6: id 'null': field 'answer' is null",
        f"    {path}, line 9: id 'fine' is already that of {path}, line 1",
        "  rows that cannot be read: 1",
    ):
        assert line in text.splitlines()
    assert [sample.id for sample in data.without({row.place for row in bad})] == ["fine", "also fine"]


def test_a_column_that_no_row_has_is_said_once_with_the_columns_there_are(tmp_path: Path, collator) -> None:
    row = {"question": "?", "answer": "1", "images": []}
    path = _jsonl(tmp_path, row, row | {"extra": 1})

    def said(*rows: dict) -> list[str]:
        data = PictureDataset(_jsonl(tmp_path, *rows), columns={"problem": "prompt"})
        return report("data.train", len(rows), unusable(examine(data, collator, range(len(rows))))).splitlines()

    assert said(row, row | {"extra": 1}) == [
        "data.train: 2 of 2 rows cannot be used",
        "  no row has the column 'prompt'; data.columns and data.test_columns map fields to columns",
        f"    {path}, line 1: id '0': field 'prompt' is missing; the row has ['answer', 'images', 'question']",
    ]
    assert said(row, {"prompt": "?", "answer": "1", "images": []})[1] == "  rows without the column 'prompt': 1"


def test_a_report_lists_twenty_rows_of_a_kind_and_counts_all(tmp_path: Path, collator: PromptCollator) -> None:
    data = PictureDataset(_jsonl(tmp_path, *["{"] * 25))
    lines = report("data.test", 25, unusable(examine(data, collator, range(25)))).splitlines()
    assert lines[1] == "  rows that cannot be read: 25"
    assert len(lines) == 2 + 20 + 1
    assert lines[-1] == "    ... and 5 more"


def test_an_epochs_order_depends_on_epoch_and_seed_alone() -> None:
    order = epoch_order(50, 3, 1)
    assert sorted(order) == list(range(50))
    torch.manual_seed(99)  # the global generator must not matter: ranks and resumes differ in it
    assert epoch_order(50, 3, 1) == order
    assert epoch_order(50, 4, 1) != order
    assert epoch_order(50, 3, 2) != order


def test_the_prompts_of_a_step_are_a_function_of_seed_and_step_alone() -> None:
    # Ten samples in steps of six: the second step reaches into the next epoch.
    steps = [step_order(10, step, 6, seed=5) for step in range(5)]
    order = [sample for step in steps for sample in step]
    for epoch in range(3):
        assert order[epoch * 10 : epoch * 10 + 10] == epoch_order(10, epoch, 5), "each epoch has each sample once"
    assert step_order(10, 0, 6, seed=6) != steps[0]


def test_pictures_stand_where_the_problem_says(collator: PromptCollator) -> None:
    def kinds(problem: str, images: int) -> list[str]:
        content = collator.messages(Sample("a", problem, "1", (_png(),) * images))[-1]["content"]
        return [part.get("text", "IMAGE") for part in content]

    assert kinds("How many?", 2) == ["IMAGE", "IMAGE", "How many?"]
    assert kinds("In <image> and <image>: how many?", 2) == ["In ", "IMAGE", " and ", "IMAGE", ": how many?"]
    assert kinds("No picture?", 0) == ["No picture?"]
    with pytest.raises(DataError, match="id 'a': the problem has 1 <image> placeholders for 2 images"):
        kinds("<image>?", 2)
    with pytest.raises(DataError, match=r"id 'a': the problem holds '<\|image_pad\|>', the processor's own mark"):
        kinds("What does <|image_pad|> mean?", 0)


def test_system_prompt_and_suffix(processor) -> None:
    collator = PromptCollator(processor, system_prompt="Think.", suffix=" Box it.", max_prompt_length=128)
    text = processor.tokenizer.decode(collator([Sample("a", "Why?", "1")]).rows[0]["input_ids"][0])
    assert text.index("Think.") < text.index("Why? Box it.")


def test_a_prompt_over_the_limit_is_refused_not_cut(processor) -> None:
    sample = Sample("long", "How many?", "1", (_png(),))
    length = PromptCollator(processor, max_prompt_length=999)([sample]).prompt_lengths[0]
    assert PromptCollator(processor, max_prompt_length=length)([sample]).prompt_lengths == [length]
    with pytest.raises(PromptTooLong, match=rf"id 'long': the prompt has {length} tokens, .* is {length - 1}"):
        PromptCollator(processor, max_prompt_length=length - 1)([sample])


def test_a_prompt_that_the_processor_refuses_names_the_row(collator: PromptCollator) -> None:
    flat = Sample("flat", "?", "1", (_png(size=(6000, 4)),))  # Qwen2.5-VL refuses ratios of 200 and more
    with pytest.raises(DataError, match=r"id 'flat': the processor refuses it: .*aspect ratio"):
        collator([flat])


def test_image_tokens_match_the_vision_inputs(collator: PromptCollator, tiny_checkpoint: Path) -> None:
    # Grids of different sizes and a row without a picture: counts must agree row by row.
    samples = [
        Sample("a", "One?", "1", (_png(size=(56, 56)),)),
        Sample("b", "None?", "1"),
        Sample("c", "Two <image> or <image>?", "1", (_png(size=(84, 56)), _png(size=(56, 112)))),
    ]
    batch = collator(samples)
    tensors = batch.tensors()
    config = load_model(tiny_checkpoint, dtype=torch.float32).config
    merge = config.vision_config.spatial_merge_size**2
    tokens = visual_token_mask(config, tensors["input_ids"]).sum(1).tolist()
    grids = tensors["image_grid_thw"].prod(1)
    assert batch.images_per_row == [1, 0, 2]
    assert tokens == [int(grids[0]) // merge, 0, int(grids[1:].sum()) // merge]
    assert tensors["pixel_values"].shape[0] == int(grids.sum())
    assert "mm_token_type_ids" in tensors


def test_rows_are_padded_on_the_left(collator: PromptCollator) -> None:
    batch = collator([Sample("a", "Why?", "1"), Sample("b", "Why is this one longer?", "1")])
    tensors = batch.tensors(length=max(batch.prompt_lengths) + 3)
    for row, length in enumerate(batch.prompt_lengths):
        mask = tensors["attention_mask"][row]
        assert int(mask.sum()) == length
        assert mask[-length:].all()
        assert torch.equal(tensors["input_ids"][row, -length:], batch.rows[row]["input_ids"][0])
    with pytest.raises(ValueError, match=r"length 2 is shorter than the longest prompt"):
        batch.tensors(length=2)


def test_taken_rows_bring_their_own_pictures(collator: PromptCollator, tiny_checkpoint: Path) -> None:
    samples = [
        Sample("a", "One?", "1", (_png("red", (56, 56)),)),
        Sample("b", "None?", "1"),
        Sample("c", "A longer one?", "1", (_png("blue", (84, 56)), _png("green", (56, 112)))),
    ]
    batch = collator(samples)
    model = load_model(tiny_checkpoint, dtype=torch.float32).eval()
    whole = model(**batch.tensors()).logits[:, -1]
    for rows in ([2], [2, 0], [1, 2, 1]):
        part = batch.take(rows)
        assert [sample.id for sample in part.samples] == [samples[row].id for row in rows]
        torch.testing.assert_close(model(**part.tensors()).logits[:, -1], whole[rows], rtol=1e-4, atol=1e-4)
    repeated = batch.repeat(2)
    assert [sample.id for sample in repeated.samples] == ["a", "a", "b", "b", "c", "c"]
    assert repeated.tensors()["image_grid_thw"].shape[0] == 2 * 3


def test_an_empty_batch_is_refused(collator: PromptCollator) -> None:
    with pytest.raises(ValueError, match="samples must hold at least one sample"):
        collator([])
