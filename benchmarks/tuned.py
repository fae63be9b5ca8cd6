"""What choosing exits by time gains on this machine: the plain model, the artifact as compiled, as tuned, and as
compiled with `--cost time`.

    python -m benchmarks.tuned [--tasks resnet20 resnet56 sst2] [--batches 1 8 32]

Compiles with the heads that `benchmarks.heads` has trained, exits chosen by FLOPs, tunes for every batch size, and
times all against the plain backbone in ONNX Runtime on the artifact's own test rows, each in turn with it,
round by round. Disagreement is that of the test rows. Writes benchmarks/results/tuned.json and the README's table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.heads import WORK
from benchmarks.recorded import made_ready
from benchmarks.tables import log, markdown, replace_block
from benchmarks.tasks import TASKS
from offramp.compiler import Options, Training, finish, train
from offramp.compiler.measure import Bench, machine, versions
from offramp.compiler.search import Search
from offramp.runtime.artifact import open_artifact
from offramp.runtime.table import percent
from offramp.runtime.tune import Objective, tune

RESULTS = Path(__file__).parent / "results" / "tuned.json"
ROUNDS = 30
WAYS = ("by FLOPs", "tuned", "by time")
HEAD = (
    "task, batch", "exits asked", "plain, ms per row", "time saved, by FLOPs", "tuned", "by time", "disagreement",
)  # fmt: skip


def measured(name: str, batches: Sequence[int], threads: int, seed: int) -> list[dict[str, Any]]:
    """One task's artifact at every batch size."""
    task = TASKS[name](seed)
    options = Options(
        training=replace(Training(), **task.training), search=replace(Search(engine="tpe"), **task.search), seed=seed,
        threads=threads, max_candidates=task.max_candidates, batches=(), targets=("onnx-segments",),
    )  # fmt: skip
    ready = made_ready(task, options)
    assert ready.plain is not None
    heads = train(ready, options, WORK / f"heads-{name}-searched.work", log)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "compiled"
        finish(ready, heads, compiled, options, log)
        for batch in batches:
            log(f"{name}, batch {batch}")
            tuned = Path(folder) / str(batch)
            some = dict(ready.rows.take(ready.splits.test[np.arange(batch) % len(ready.splits.test)]))
            tune(compiled, tuned, objective=Objective(batch), threads=threads, rows=some)
            timed = Path(folder) / f"{batch}-timed"
            finish(ready, heads, timed, replace(options, cost="time", cost_batch=batch), log)
            told: dict[str, Any] = {"task": name, "batch": batch, "threads": threads}
            for when, path in zip(WAYS, (compiled, tuned, timed), strict=True):
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
        ways = [told[way] for way in WAYS]
        rows.append(
            [
                f"{told['task']}, {told['batch']}",
                " / ".join(str(way["asked"]) for way in ways),
                f"{ways[0]['timing']['backbone_ms']:.3f}",
                *(percent(1 - way["timing"]["ratio"]) for way in ways),
                " / ".join(percent(way["disagreement"], 2) for way in ways),
            ]
        )
    return markdown(HEAD, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["resnet20", "resnet56", "sst2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = [row for name in args.tasks for row in measured(name, args.batches, args.threads, args.seed)]
    told = {"command": "python -m benchmarks.tuned", "machine": machine(), "versions": versions(), "rounds": ROUNDS}
    RESULTS.write_text(json.dumps({**told, "seed": args.seed, "results": results}, indent=1) + "\n")
    replace_block("tuned", table(results))


if __name__ == "__main__":
    main()
