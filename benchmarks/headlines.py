"""The tables of README.md and docs/dev/performance.md, each between two comments, the first of which names its file.

<!-- of NAME.json -->        (or "of NAME.json, wide": with the floor's share and memory)
<!-- end of NAME.json -->
"""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.report_text import ABSENT, bytes_text, percent_text, ratio_text, seconds_text, table
from benchmarks.result_file import BOUND, PLAIN, Entry, Group, Results

PAGES = ("README.md", "docs/dev/performance.md")
PLACE = re.compile(r"<!-- of (?P<file>[\w.-]+)(?P<wide>, wide)? -->\n.*?<!-- end of (?P=file) -->", re.DOTALL)


def filled(page: str, read: Callable[[str], Results | None]) -> str:
    """Returns a page with its tables made anew.

    Args:
        page: its text.
        read: returns the results of a file's name; None leaves the table as it is.
    """

    def made(place: re.Match[str]) -> str:
        results = read(place["file"])
        if results is None:
            return place[0]
        wide = place["wide"] or ""
        return (
            f"<!-- of {place['file']}{wide} -->\n{headlines(results, wide=bool(wide))}<!-- end of {place['file']} -->"
        )

    return PLACE.sub(made, page)


def fill_pages(files: list[Results], root: Path) -> list[Path]:
    """Makes the tables of these files in the pages that have a place for them; returns the pages that changed."""
    by_name, changed = {results.path.name: results for results in files}, []
    for name in PAGES:
        page = root / name
        before = page.read_text(encoding="utf-8") if page.exists() else ""
        after = filled(before, by_name.get)
        if after != before:
            page.write_text(after, encoding="utf-8")
            changed.append(page)
    return changed


def headlines(results: Results, *, wide: bool) -> str:
    """Returns a row for the first case of each room, where we are behind or least ahead first, and their sizes."""
    first: dict[str, Group] = {}
    for group in results.groups:
        if group.ours and not group.in_sweep:
            first.setdefault(group.room, group)
    groups = sorted(first.values(), key=lambda x: (x.best_peer is None, x.ratio(x.best_peer)))
    head = ["", "ours", *(["of the ceiling"] if wide else []), "our plain torch", "others"]
    head += ["extra memory"] if wide else []
    cases = "; ".join(f"{group.room}: {group.case}" for group in groups)
    return f"{table(head, [_row(group, group.ours, wide=wide) for group in groups if group.ours])}\nCases: {cases}.\n"


def _row(group: Group, ours: Entry, *, wide: bool) -> list[str]:
    others = sorted((x for x in group.entries if x is not ours and x.role != PLAIN), key=lambda x: x.median)
    cells = [group.room, seconds_text(ours.median), *([percent_text(ours.of_ceiling)] if wide else [])]
    cells += [ratio_text(group.ratio(group.plain)), ", ".join(_said(group, x) for x in others) or ABSENT]
    return cells + ([bytes_text(ours.memory)] if wide else [])


def _said(group: Group, entry: Entry) -> str:
    return f"{entry.provider}{' *(less)*' if entry.role == BOUND else ''} {ratio_text(group.ratio(entry))}"
