"""docs/zoo.md from the sweep's JSON, and nothing that is not in it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown

PAGE = Path("docs") / "zoo.md"

Row = Mapping[str, Any]

_OPENING = """# The zoo

Written by `make zoo`, not by hand. Random weights: what is checked is that a model can be captured and cut, and that
every backend gives the eager run's answers; nothing here says how well exits would do.

For each model: capture, candidates, a program with three exits at spread places (fewer where it has fewer places),
every backend, and the answers compared with the eager run's for these cases: all rows leave at the first exit, none
leaves, each exit alone, mixed; each at every batch size listed. "near" counts rows whose confidence lies within 1e-5
of a threshold, which may leave elsewhere. Seconds are one core's, for capture and candidates together.

`passed`: all of it held. `refused`: one line says why, and the reason is about the model. `failed`: a bug of ours, or
not done in time. `unbuildable`: the library itself cannot build it here; not counted.
"""


def page(result: Mapping[str, Any]) -> str:
    """The whole page."""
    rows: Sequence[Row] = result["results"]
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [_OPENING, f"Measured with {versions} on {result['machine']}.\n", _summary(rows, libraries)]
    parts += [_timing(rows)]
    for library in libraries:
        own = [row for row in rows if row["library"] == library]
        parts += [f"\n## {library}\n", _table(own), _reasons(own)]
    return "\n".join(part for part in parts if part) + "\n"


def _summary(rows: Sequence[Row], libraries: Sequence[str]) -> str:
    head = ("library", "tried", "passed", "refused", "failed", "unbuildable", "share passed")
    cells = []
    for library in libraries:
        count = dict.fromkeys(("passed", "refused", "failed", "unbuildable"), 0)
        for row in rows:
            if row["library"] == library:
                count[row["outcome"]] += 1
        tried = sum(count.values()) - count["unbuildable"]
        share = f"{count['passed'] / tried:.1%}" if tried else "-"
        cells.append([library, str(tried), *map(str, count.values()), share])
    return markdown(head, cells)


def _timing(rows: Sequence[Row]) -> str:
    seconds = sorted(row["seconds"] for row in rows if "seconds" in row)
    if not seconds:
        return ""
    over = sum(s > 10 for s in seconds)
    return (
        f"\nCapture and candidates: {statistics.median(seconds):.1f} s for the median model, {seconds[-1]:.1f} s for "
        f"the slowest, over 10 s for {over} of {len(seconds)}."
    )


def _table(rows: Sequence[Row]) -> str:
    head = ("model", "parameters", "candidates", "side inputs", "seconds", "batches", "near", "difference", "outcome")
    return markdown(head, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    backends = [b for b in row.get("backends", {}).values() if "difference" in b]
    parameters = row.get("parameters")
    return [
        row["name"],
        f"{parameters / 1e6:.2f} M" if parameters else "",
        str(row.get("candidates", "")),
        ", ".join(row.get("side_inputs", ())),
        f"{row['seconds']:.1f}" if "seconds" in row else "",
        " ".join(map(str, row.get("batches", ()))),
        str(sum(b["near"] for b in backends)) if backends else "",
        f"{max(b['difference'] for b in backends):.0e}" if backends else "",
        row["outcome"] if row["depth"] == "full" or row["outcome"] != "passed" else "passed (candidates only)",
    ]


def _reasons(rows: Sequence[Row]) -> str:
    told = [f"- `{row['name']}`: {row['outcome']}, {_plain(row['reason'])}" for row in rows if "reason" in row]
    return "\n" + "\n".join(told) if told else ""


def _plain(reason: str) -> str:
    """One line that Markdown shows as it is."""
    return " ".join(reason.split()).replace("|", "\\|").replace("<", "\\<")
