"""The README's tables, written by the benchmarks between markers, so that no figure is typed in by hand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; the first column to the left, the others to the right."""
    align = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rows))


def folded(summary: str, text: str) -> str:
    """Text that GitHub shows once its summary is clicked on."""
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def replace_block(name: str, text: str) -> None:
    """Put `text` between the README's markers `<!-- NAME -->` and `<!-- /NAME -->`."""
    page = README.read_text()
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, after = page[: page.index(start) + len(start)], page[page.index(end) :]
    README.write_text(f"{before}\n{text}\n{after}")


def log(line: str) -> None:
    """To stderr, where progress goes."""
    sys.stderr.write(f"{line}\n")
