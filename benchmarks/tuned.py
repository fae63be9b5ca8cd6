"""What `offramp tune` gains on this machine: the plain model, the artifact as compiled, the artifact as tuned.

    python -m benchmarks.tuned [--tasks resnet20 resnet56 sst2] [--batches 1 8 32] [--epochs 30]

Compiles with the heads that `benchmarks.heads` has trained, exits chosen by FLOPs, tunes for every batch size, and
times both against the plain backbone in ONNX Runtime on the artifact's own test rows, each pair interleaved round by
round, all sessions on one pool of threads. Disagreement is that of the test rows. Writes benchmarks/results/tuned.json,
keeping tasks that are not asked for, and the README's table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import log, markdown, replace_block
from benchmarks.tasks import TASKS
from benchmarks.trained import heads_of, made_ready, options_of
from offramp.compiler import Training, finish
from offramp.compiler.measure import Bench, machine, versions
from offramp.runtime import share_threads
from offramp.runtime.artifact import open_artifact
from offramp.runtime.table import percent
from offramp.runtime.tune import Objective, tune

RESULTS = Path(__file__).parent / "results" / "tuned.json"
KIND, ROUNDS = "searched", 30
HEAD = (
    "task, batch", "exits asked, before", "after", "plain, ms per row", "time saved, before", "after",
    "disagreement, before", "after",
)  # fmt: skip


def measured(name: str, batches: Sequence[int], epochs: int, threads: int, seed: int) -> list[dict[str, Any]]:
    """One task's artifact at every batch size."""
    task = TASKS[name](seed)
    options = options_of(task, KIND, epochs, seed=seed, threads=threads, batches=(), targets=("onnx-segments",))
    ready = made_ready(task, options)
    assert ready.plain is not None
    heads = heads_of(task, ready, options, KIND)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "compiled"
        finish(ready, heads, compiled, options, log)
        for batch in batches:
            log(f"{name}, batch {batch}")
            tuned = Path(folder) / str(batch)
            some = dict(ready.rows.take(ready.splits.test[np.arange(batch) % len(ready.splits.test)]))
            tune(compiled, tuned, objective=Objective(batch), threads=threads, rows=some)
            told: dict[str, Any] = {
                "task": name, "batch": batch, "machine": machine(), "versions": versions(), "seed": seed,
                "threads": threads, "epochs": options.training.epochs, "rounds": ROUNDS,
            }  # fmt: skip
            for when, path in (("before", compiled), ("after", tuned)):
                artifact = open_artifact(path)
                plan = artifact.manifest.plans[artifact.manifest.default_plan]
                bench = Bench(artifact, ready.plain, threads)
                told[when] = {
                    "asked": sum(t is not None for t in plan.thresholds),
                    "timing": asdict(bench.timing(ready.rows, ready.splits.test, batch, ROUNDS, seed)),
                    "disagreement": artifact.manifest.evaluation.disagreement,
                    "accuracy": artifact.manifest.evaluation.accuracy,
                    "certificate": None if plan.certificate is None else asdict(plan.certificate),
                }
            rows.append(told)
    return rows


def table(results: Sequence[dict[str, Any]]) -> str:
    """Medians over rounds; time saved against the plain model of the same rounds."""
    rows = []
    for told in results:
        before, after = told["before"], told["after"]
        rows.append(
            [
                f"{told['task']}, {told['batch']}",
                str(before["asked"]),
                str(after["asked"]),
                f"{after['timing']['backbone_ms']:.3f}",
                percent(1 - before["timing"]["ratio"]),
                percent(1 - after["timing"]["ratio"]),
                percent(before["disagreement"], 2),
                percent(after["disagreement"], 2),
            ]
        )
    return markdown(HEAD, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["resnet20", "resnet56", "sst2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--epochs", type=int, default=Training.epochs, help="that the heads were trained for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    share_threads(args.threads)
    before = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else []
    rows = [row for row in before if row["task"] not in args.tasks]
    rows += [row for name in args.tasks for row in measured(name, args.batches, args.epochs, args.threads, args.seed)]
    results = sorted(rows, key=lambda row: list(TASKS).index(row["task"]))
    RESULTS.write_text(json.dumps({"command": "python -m benchmarks.tuned", "results": results}, indent=1) + "\n")
    replace_block("tuned", table(results))


if __name__ == "__main__":
    main()
