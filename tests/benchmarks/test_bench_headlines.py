"""The tables that README.md and docs/dev/performance.md show of files of results."""

from pathlib import Path

import pytest
from result_factory import entry, write_results

from benchmarks.headlines import PAGES, PLACE, fill_pages, filled, headlines
from benchmarks.result_file import Results, read_results
from tests.tools.working_tree import RESULTS, ROOT

PAGE = "Before.\n<!-- of machine.json{} -->\n{}<!-- end of machine.json -->\nAfter.\n"


@pytest.fixture
def results(tmp_path: Path) -> Results:
    entries = [
        entry("focus", "vgpo_kernels", "ours", 2e-3, memory=5_000_000),
        entry("focus", "vgpo_kernels, plain torch", "ours, plain", 8e-3),
        entry("focus", "loop", "peer", 20e-3),
        entry("focus", "copy", "bound", 1e-3),
        entry("focus", "vgpo_kernels", "ours", 1.0, case="another case"),
        entry("focus", "vgpo_kernels", "ours", 1.0, length=512),
        entry("mass", "vgpo_kernels", "ours", 4e-3),
        entry("mass", "eager", "peer", 2e-3),
    ]
    return read_results(write_results(tmp_path / "machine.json", entries))


def test_the_first_case_of_each_room_the_worst_first(results: Results):
    assert headlines(results, wide=False).splitlines() == [
        "|  | ours | our plain torch | others |",
        "| --- | --- | --- | --- |",
        "| mass | 4.00 ms | - | eager 0.500x |",
        "| focus | 2.00 ms | 4.00x | copy *(less)* 0.500x, loop 10.0x |",
        "",
        "Cases: mass: one case; focus: one case.",
    ]


def test_the_wide_table_has_the_floor_and_memory(results: Results):
    row = headlines(results, wide=True).splitlines()[3]
    assert row == "| focus | 2.00 ms | 50.0% | 4.00x | copy *(less)* 0.500x, loop 10.0x | 5.00 MB |"


@pytest.mark.parametrize("wide", ["", ", wide"])
def test_only_the_place_of_the_file_is_filled(results: Results, wide: str):
    page = PAGE.format(wide, "old\n") + "<!-- of other.json -->\nkept\n<!-- end of other.json -->\n"
    made = filled(page, {"machine.json": results}.get)
    assert made == page.replace("old\n", headlines(results, wide=bool(wide)))
    assert filled(made, {"machine.json": results}.get) == made


def test_pages_are_filled_where_they_have_a_place(results: Results, tmp_path: Path):
    (tmp_path / "README.md").write_text(PAGE.format("", ""))
    assert fill_pages([results], tmp_path) == [tmp_path / "README.md"]
    assert "| mass | 4.00 ms |" in (tmp_path / "README.md").read_text()
    assert fill_pages([results], tmp_path) == []


@pytest.mark.parametrize("name", PAGES)
def test_what_is_committed_is_what_the_files_say(name: str):
    page = (ROOT / name).read_text()
    assert PLACE.search(page)
    assert filled(page, lambda file: read_results(ROOT / RESULTS / file)) == page
