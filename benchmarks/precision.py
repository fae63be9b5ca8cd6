"""What fp16 and int8 stages bring on this machine: size, time, compute saved and what the answers pay for it.

    python -m benchmarks.precision [--tasks resnet20] [--precisions fp32 fp16 int8] [--batches 1 32] [--tolerance 0.02]
        [--epochs 30]

Compiles with the heads that `benchmarks.heads` has trained, once at every precision under the same tolerance, which
holds for exits and precision together. Every artifact is timed against the plain float32 backbone in ONNX Runtime on
its own test rows, interleaved round by round; once as it is, once with infinite thresholds, where only the precision
can save time. One thread: ONNX Runtime's tools that make int8 of float32 cannot share a pool. Disagreement is with the
float32 backbone, on the test rows. Writes benchmarks/results/precision.json and the README's table.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.tables import log, markdown, replace_block
from benchmarks.tasks import TASKS
from benchmarks.trained import heads_of, made_ready, options_of
from offramp.compiler import PRECISIONS, Training, finish
from offramp.compiler.measure import Bench, machine, versions
from offramp.runtime.artifact import open_artifact
from offramp.runtime.errors import ToleranceError
from offramp.runtime.table import percent

RESULTS = Path(__file__).parent / "results" / "precision.json"
KIND, ROUNDS = "searched", 30
HEAD = (
    "task, precision", "size of the stages", "exits", "compute saved", "disagreement", "of it the precision's",
    "accuracy", "time saved, no exit, batch", "with exits, batch",
)  # fmt: skip


def measured(
    name: str, precisions: Sequence[str], batches: Sequence[int], tolerance: float, epochs: int, threads: int, seed: int
) -> list[dict[str, Any]]:
    """One task's artifact at every precision."""
    task = TASKS[name](seed)
    options = options_of(task, KIND, epochs, seed=seed, threads=threads, batches=(), targets=("onnx-segments",))
    ready = made_ready(task, options)
    assert ready.plain is not None
    heads = heads_of(task, ready, options, KIND)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in precisions:
            log(f"{name}, {precision}")
            told: dict[str, Any] = {"task": name, "precision": precision, "tolerance": tolerance, "threads": threads}
            rows.append(told)
            try:
                asked = replace(options, precision=precision, tolerance=tolerance)
                manifest = finish(ready, heads, Path(folder) / precision, asked, log)
            except ToleranceError as error:
                told["refused"] = str(error)
                continue
            bench = Bench(open_artifact(Path(folder) / precision), ready.plain, threads)
            seen, never = manifest.evaluation, [[math.inf] * (len(manifest.exits) - 1)]
            certificate = manifest.plans[manifest.default_plan].certificate
            told |= {
                "bytes": sum(manifest.files[stage.file].size for stage in manifest.stages),
                "exits": len(manifest.exits) - 1,
                "saved": 1 - seen.flops / seen.flops_backbone,
                "disagreement": seen.disagreement,
                "precision_alone": 1 - seen.exits[-1].agreement_all,
                "accuracy": seen.accuracy,
                "accuracy_backbone": seen.accuracy_backbone,
                "certificate": None if certificate is None else asdict(certificate),
                "timings": [asdict(bench.timing(ready.rows, ready.splits.test, b, ROUNDS, seed)) for b in batches],
                "no_exit": [bench.dial(ready.rows, ready.splits.test, b, ROUNDS, seed, never)[0] for b in batches],
            }
    return rows


def table(results: Sequence[dict[str, Any]]) -> str:
    """Medians over rounds; time saved against the plain float32 backbone of the same rounds."""
    rows = []
    for told in results:
        name = f"{told['task']}, {told['precision']}"
        if "refused" in told:
            rows.append([name, *["refused"] * (len(HEAD) - 1)])
            continue
        batches = [timing["batch"] for timing in told["timings"]]
        alone = [f"{percent(1 - ratio)} ({batch})" for ratio, batch in zip(told["no_exit"], batches, strict=True)]
        exits = [f"{percent(1 - t['ratio'])} ({t['batch']})" for t in told["timings"]]
        rows.append(
            [
                name,
                f"{told['bytes'] / 1e6:.2f} MB",
                str(told["exits"]),
                percent(told["saved"]),
                percent(told["disagreement"], 2),
                percent(told["precision_alone"], 2),
                f"{percent(told['accuracy_backbone'], 2)} → {percent(told['accuracy'], 2)}",
                ", ".join(alone),
                ", ".join(exits),
            ]
        )
    return markdown(HEAD, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["resnet20"])
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--epochs", type=int, default=Training.epochs, help="that the heads were trained for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    given = (args.precisions, args.batches, args.tolerance, args.epochs, args.threads, args.seed)
    results = [row for name in args.tasks for row in measured(name, *given)]
    told = {"command": "python -m benchmarks.precision", "machine": machine(), "versions": versions(), "rounds": ROUNDS}
    told |= {"epochs": args.epochs, "threads": args.threads}
    RESULTS.write_text(json.dumps({**told, "seed": args.seed, "results": results}, indent=1) + "\n")
    replace_block("precision", table(results))


if __name__ == "__main__":
    main()
