"""docs/zoo.md from the sweep's JSON, and nothing that is not in it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown

CANDIDATES_ONLY = "candidates only"
PAGE = Path("docs") / "zoo.md"

Row = Mapping[str, Any]

_OPENING = """# The zoo

Written by `make zoo`, not by hand. Random weights: what is checked is that a model can be captured and cut, and that
every backend gives the eager run's answers; nothing here says how well exits would do.

For each model: capture, candidates, a program with three exits at spread places (fewer where it has fewer places),
every backend, and the answers compared with the eager run's for these cases: all rows leave at the first exit, none
leaves, each exit alone, mixed; each at every batch size listed. "near" counts rows whose confidence lies within 1e-5
of a threshold, which may leave elsewhere. Answers may differ by 1e-4; by more only up to twice what the eager run's
own answers are off by, against itself in float64, with torch's own kernels in oneDNN's place, and with every input
value moved by its last bit: a random network can be that ill-conditioned, and "own rounding" then says by how much.
Seconds are the processor's, one thread, for capture and candidates together; other work on the machine can stretch
them.

`passed`: all of it held. `candidates only`: captured, candidates found, the rest not run yet. `refused`: one line says
why. `failed`: a bug of ours, or not done in time. `unbuildable`: the library itself cannot build it here. The share is
what passed of all that are listed and can be built, tried or not.
"""


def page(result: Mapping[str, Any]) -> str:
    """The whole page."""
    rows: Sequence[Row] = result["results"]
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [_OPENING, f"Measured with {versions} on {result['machine']}.\n", _summary(rows, result["listed"])]
    parts += [_timing(rows)]
    for library in libraries:
        own = [row for row in rows if row["library"] == library]
        parts += [f"\n## {library}\n", _table(own), _reasons(own)]
    return "\n".join(part for part in parts if part) + "\n"


def _summary(rows: Sequence[Row], listed: Mapping[str, int]) -> str:
    """What the share is of: all models listed that can be built, tried or not."""
    head = ("library", "listed", "passed", CANDIDATES_ONLY, "refused", "failed", "unbuildable", "not tried", "share")
    cells = []
    for library, total in listed.items():
        found = Counter(_outcome(row) for row in rows if row["library"] == library)
        counts = [found[kind] for kind in head[2:7]]
        share = f"{found['passed'] / max(total - found['unbuildable'], 1):.1%}"
        cells.append([library, str(total), *map(str, counts), str(total - sum(counts)), share])
    return markdown(head, cells)


def _outcome(row: Row) -> str:
    return CANDIDATES_ONLY if row["outcome"] == "passed" and row["depth"] != "full" else str(row["outcome"])


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
    head = (
        "model",
        "parameters",
        "candidates",
        "side inputs",
        "seconds",
        "batches",
        "near",
        "difference",
        "own rounding",
        "outcome",
    )
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
        f"{row['own_rounding']:.0e}" if "own_rounding" in row else "",
        _outcome(row),
    ]


def _reasons(rows: Sequence[Row]) -> str:
    told = [f"- `{row['name']}`: {row['outcome']}, {_plain(row['reason'])}" for row in rows if "reason" in row]
    return "\n" + "\n".join(told) if told else ""


def _plain(reason: str) -> str:
    """One line that Markdown shows as it is."""
    return " ".join(reason.split()).replace("|", "\\|").replace("<", "\\<")
