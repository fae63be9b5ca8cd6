"""The sweep over the zoo.

    python -m benchmarks.zoo [--only-candidates] [--libraries torchvision timm transformers] [--models PATTERN ...]

Every model has a process of its own, forked from one that has imported everything, with a time and a memory limit, so
that a crash or a hang costs one row. Rows are appended to build/zoo/results.jsonl as they come; started again, the
sweep does what is missing there (`--again` does everything). Writes docs/zoo.md and benchmarks/results/zoo.json from
the rows.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.zoo.report import PAGE, page
from benchmarks.zoo.sources import LIBRARIES, Entry, entries
from benchmarks.zoo.worker import CANDIDATES, FULL, examine_one
from offramp.compiler.measure import machine

WORK = Path("build") / "zoo"
ROWS = WORK / "results.jsonl"
RESULTS = Path(__file__).parents[1] / "results" / "zoo.json"


def depth_of(args: argparse.Namespace) -> str:
    """How far every model is taken."""
    return CANDIDATES if args.only_candidates else FULL


class Sweep:
    """Runs entries in processes of their own, `workers` at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.depth = depth_of(args)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["benchmarks.zoo.warm"])

    def rows(self, todo: Sequence[Entry]) -> Iterator[dict[str, Any]]:
        waiting = list(todo)
        running: dict[Connection, tuple[Entry, Any, float]] = {}
        while waiting or running:
            while waiting and len(running) < self.args.workers:
                entry = waiting.pop(0)
                ours, theirs = self.context.Pipe(duplex=False)
                process = self.context.Process(
                    target=examine_one, args=(entry, self.depth, self.args.memory << 30, WORK, theirs)
                )
                process.start()
                theirs.close()
                running[ours] = (entry, process, time.monotonic() + self.args.timeout)
            ready = wait(list(running), timeout=1.0)
            for pipe in [p for p in running if p in ready]:
                entry, process, _ = running.pop(pipe)
                yield self._received(entry, process, pipe)
            for pipe, (entry, process, deadline) in list(running.items()):
                if time.monotonic() > deadline:
                    del running[pipe]
                    process.kill()
                    process.join()
                    yield self._lost(entry, f"not done after {self.args.timeout} s")

    def _received(self, entry: Entry, process: Any, pipe: Connection) -> dict[str, Any]:
        try:
            row: dict[str, Any] = pipe.recv()
        except EOFError:
            process.join()
            return self._lost(entry, f"its process died with exit code {process.exitcode}")
        process.join()
        return row

    def _lost(self, entry: Entry, reason: str) -> dict[str, Any]:
        row = {"library": entry.library, "name": entry.name, "depth": self.depth}
        return {**row, "outcome": "failed", "error": "Lost", "reason": reason}


def read_rows(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The last row of every model and depth."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[row["library"], row["name"], row["depth"]] = row
    return rows


def choose(args: argparse.Namespace) -> list[Entry]:
    """What is asked for and not there yet."""
    done = read_rows(args.rows)
    depth = depth_of(args)
    found = []
    for library in args.libraries:
        for entry in entries(library, WORK):
            if args.models and not any(fnmatch.fnmatch(entry.name, pattern) for pattern in args.models):
                continue
            row = done.get((entry.library, entry.name, depth))
            if row is None or args.again or (args.failed and row["outcome"] == "failed"):
                found.append(entry)
    # Mixed, so that half a sweep says something of every family.
    random.Random(0).shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only-candidates", action="store_true", help="capture and candidates only")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--models", nargs="+", default=[], help="patterns of names; all if left out")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--failed", action="store_true", help="also what failed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds per model")
    parser.add_argument("--memory", type=int, default=12, help="GiB per model")
    parser.add_argument("--rows", type=Path, default=ROWS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for folder in (WORK, args.rows.parent):
        folder.mkdir(parents=True, exist_ok=True)
    todo = choose(args)
    with args.rows.open("a") as file:
        for count, row in enumerate(Sweep(args).rows(todo), 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            seconds = f"{row['seconds']:.1f} s" if "seconds" in row else ""
            what = f"{row.get('candidates', '-')} candidates {seconds} {row.get('error', '')} {row.get('reason', '')}"
            sys.stderr.write(f"{count}/{len(todo)} {row['library']} {row['name']}: {row['outcome']} {what[:200]}\n")
    if args.rows == ROWS:
        publish(args.rows)


def publish(path: Path) -> None:
    """The JSON with the deepest row of every model, and the page made of it."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for (library, name, depth), row in sorted(read_rows(path).items()):
        if depth == FULL or (library, name) not in best:
            best[library, name] = {key: value for key, value in row.items() if key != "cause"}
    order = {library: index for index, library in enumerate(LIBRARIES)}
    rows = sorted(best.values(), key=lambda row: (order[row["library"]], row["name"]))
    told = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxruntime", "numpy")
    result = {
        "command": "python -m benchmarks.zoo",
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in told},
        "listed": {library: len(entries(library, WORK)) for library in LIBRARIES},
        "results": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page(result))


if __name__ == "__main__":
    main()
