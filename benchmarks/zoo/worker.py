"""One model in a process of its own: whatever happens becomes one row."""

from __future__ import annotations

import resource
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from offramp.runtime.errors import OfframpError

from .check import examine
from .sources import Entry, Unbuildable, build

CANDIDATES, FULL = "candidates", "full"


def examine_one(entry: Entry, depth: str, memory: int, work: Path, pipe: Connection) -> None:
    """One model -> its row, sent through `pipe`. `memory` is in bytes."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    row: dict[str, Any] = {"library": entry.library, "name": entry.name, "depth": depth}
    started = time.perf_counter()
    try:
        built = build(entry)
        row["build_s"] = time.perf_counter() - started
        examine(built, entry.name.split("/")[-1], row, work if depth == FULL else None)
        row["outcome"] = "passed"
    except Unbuildable as error:
        row |= {"outcome": "unbuildable", "reason": str(error)}
    except OfframpError as error:
        row |= {"outcome": "refused", "error": type(error).__name__, "reason": str(error)}
        row["cause"] = "".join(traceback.format_exception(error))[-6000:]
    except Exception as error:  # noqa: BLE001  # whatever it is, it is one row of the table: a failure
        where = traceback.extract_tb(error.__traceback__)[-1]
        row |= {"outcome": "failed", "error": type(error).__name__, "reason": " ".join(str(error).split())[:500]}
        row |= {"where": f"{where.filename}:{where.lineno}", "cause": traceback.format_exc()[-6000:]}
    row["total_s"] = time.perf_counter() - started
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    pipe.send(row)
