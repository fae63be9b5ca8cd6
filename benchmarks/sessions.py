"""What each choice of how we make ONNX Runtime's sessions is worth: threads, memory and operators that are not fused.

    python -m benchmarks.sessions [--tasks resnet20 sst2] [--batches 1 32] [--rounds 30] [--threads 2] [--seed 0]

The trained backbone, cut at up to six places; heads stand there and are never asked, so that their weights do not
matter. Every way of `benchmarks.session_ways` has a process, and all answer the same batches in turn, the order turned
round by round: first the stages, then the whole model in one session made in the same way. Times are over those of
`ours` in the same round. Processes are started anew after every ten rounds, as `benchmarks.speed` does with sessions,
and what the rounds can tell is worked out from these tens. Batch 1 is timed once more beside a process that keeps one
core busy. Memory is of the stages alone, at the first batch. Writes benchmarks/results/sessions.json and the README's
table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.session_ways import OURS, ROWS, SPECS, WAYS, WHOLE
from benchmarks.speed_rounds import REST, TOGETHER, WARM, error
from benchmarks.tables import log, markdown, replace_block
from benchmarks.tasks import TASKS, save_rows
from benchmarks.trained import made_ready, options_of
from offramp.compiler import default_heads
from offramp.compiler.distill import fresh_head
from offramp.compiler.emit import SEGMENTS, emit
from offramp.compiler.measure import machine, versions
from offramp.compiler.stream import mix
from offramp.passes import ExitPlan, PlannedExit, build_program, row_shape

RESULTS = Path(__file__).parent / "results" / "sessions.json"
PLACES, PICKED = 6, 512  # exits; rows that batches are drawn from
SECONDS, MOST_CALLS = 0.05, 256  # of our stages in a round
PARTS = (False, True)  # the stages, the whole model
MEMORY_BATCH = 32
BUSY = "while True: pass"


def emitted(name: str, threads: int, seed: int, folder: Path) -> None:
    """A task's stages, its whole model and some of its test rows, as `benchmarks.session_ways` reads them."""
    task = TASKS[name](seed)
    ready = made_ready(task, options_of(task, "default", seed=seed, threads=threads))
    backbone, places = ready.backbone, ready.candidates[:PLACES]
    configs = default_heads(backbone, places)
    heads = {
        place.name: fresh_head(configs[place.name], row_shape(backbone, place.name), backbone.classes, mix(seed, index))
        for index, place in enumerate(places)
    }
    plan = ExitPlan(tuple(PlannedExit(place.name, 1.0, 0.0) for place in places))
    specs, files = emit(build_program(backbone, plan, heads), (SEGMENTS,))
    for file, content in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
    (folder / SPECS).write_text(json.dumps([asdict(spec) for spec in specs]))
    assert ready.plain is not None
    assert not ready.plain.external, "a model with its weights in other files needs them written too"
    (folder / WHOLE).write_bytes(ready.plain.proto)
    save_rows(folder / ROWS, ready.rows.take(ready.splits.test[:PICKED]))


class Child:
    """A process that makes its sessions in one way."""

    def __init__(self, way: str, folder: Path, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.session_ways", way, str(folder), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, whole: bool, batches: Sequence[Sequence[int]]) -> dict[str, float]:
        """What the batches take: `seconds`, and `mib` at the peak so far."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"whole": whole, "batches": batches}) + "\n")
        self._process.stdin.flush()
        told: dict[str, float] = json.loads(self._process.stdout.readline())
        return told

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()


@contextlib.contextmanager
def started(folder: Path, threads: int) -> Iterator[dict[str, Child]]:
    """A process for every way."""
    with contextlib.ExitStack() as stack:
        children = {}
        for way in WAYS:
            children[way] = Child(way, folder, threads)
            stack.callback(children[way].close)
        yield children


@contextlib.contextmanager
def busy(cores: int) -> Iterator[None]:
    """So many cores kept busy by others."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(cores)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


Taken = dict[tuple[str, bool], list[float]]  # seconds by round, of a way's stages and of its whole model


def timed(folder: Path, batch: int, rounds: int, threads: int, seed: int) -> dict[str, Any]:
    """Every way at one batch size, stages and whole model: over ours, medians over rounds."""
    generator, rows = np.random.default_rng([seed, batch]), len(next(iter(np.load(folder / ROWS).values())))
    taken: Taken = {(way, whole): [] for way in WAYS for whole in PARTS}
    mib: dict[str, list[float]] = {way: [] for way in WAYS}
    while len(taken[OURS, False]) < rounds:
        with started(folder, threads) as children:
            first = {way: child.ask(False, [draw(generator, rows, batch)]) for way, child in children.items()}
            again = children[OURS].ask(False, [draw(generator, rows, batch)])
            calls = int(np.clip(SECONDS / again["seconds"], 1, MOST_CALLS))
            for index in range(-WARM, TOGETHER):
                work = [draw(generator, rows, batch) for _ in range(calls)]
                found = asked(children, work, index)
                for key, seconds in found.items() if index >= 0 else ():
                    taken[key].append(seconds)
        for way, told in first.items():
            mib[way].append(told["mib"])
    return {"batch": batch, "calls": calls, "rounds": len(taken[OURS, False]), "ways": summary(taken, mib)}


def draw(generator: np.random.Generator, rows: int, batch: int) -> list[int]:
    """Rows of one batch."""
    picked: list[int] = generator.choice(rows, batch, replace=rows < batch).tolist()
    return picked


def asked(children: Mapping[str, Child], work: Sequence[Sequence[int]], index: int) -> dict[tuple[str, bool], float]:
    """One round: seconds of every way, whose turn it is by the round's number."""
    names, found = list(children), {}
    turn = index % len(names)
    for whole in PARTS:
        for way in (names[turn:] + names[:turn])[:: 1 if index % 2 else -1]:
            time.sleep(REST)
            found[way, whole] = children[way].ask(whole, work)["seconds"]
    return found


def summary(taken: Taken, mib: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Of every way: its times over ours, its stages' over its whole model's, memory at the peak."""
    seconds = {key: np.array(values) for key, values in taken.items()}
    ways: dict[str, dict[str, Any]] = {}
    for way, one in WAYS.items():
        stages, whole = (seconds[way, part] / seconds[OURS, part] for part in PARTS)
        ways[way] = {
            "what": one.what, "mib": float(np.median(mib[way])),
            "stages": float(np.median(stages)), "stages_error": error(stages),
            "whole": float(np.median(whole)), "whole_error": error(whole),
            "stages_of_whole": float(np.median(seconds[way, False] / seconds[way, True])),
        }  # fmt: skip
    return ways


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's: stages in each way over those in ours, and in brackets the whole model likewise."""
    head = ["", *(f"{r['task']}, {r['batch']}{', one core busy' if r['busy'] else ''}" for r in results)]
    memory = [r for r in results if r["batch"] == MEMORY_BATCH]
    head += [f"{r['task']}, MiB at {r['batch']}" for r in memory]
    rows = []
    for way, one in WAYS.items():
        cells = [f"{r['ways'][way]['stages']:.2f} ({r['ways'][way]['whole']:.2f})" for r in results]
        rows.append([one.what, *cells, *(f"{r['ways'][way]['mib']:.0f}" for r in memory)])
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["resnet20", "sst2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=30, help="rounded up to tens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = []
    for name in args.tasks:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            emitted(name, args.threads, args.seed, folder)
            for cores, batches in ((0, args.batches), (1, args.batches[:1])):
                for batch in batches:
                    log(f"{name}, batch {batch}" + (", one core busy" if cores else ""))
                    with busy(cores):
                        found = timed(folder, batch, args.rounds, args.threads, args.seed)
                    results.append({"task": name, "busy": cores, **found})
    told = {
        "command": "python -m benchmarks.sessions", "machine": machine(), "versions": versions(), "seed": args.seed,
        "threads": args.threads, "places": PLACES, "results": results,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    replace_block("sessions", table(results))


if __name__ == "__main__":
    main()
