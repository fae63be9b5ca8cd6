"""The single ONNX file skips for real: its time when all rows leave at once, none do, and at its own thresholds.

    python -m benchmarks.single_file

Runs on the artifacts that `benchmarks.cifar10_resnet` left in build/benchmarks, from plain onnxruntime sessions
and no line of the runtime's executor. Each round times, on the same rows, the first stage's own model and the
file under three settings of its `thresholds` input. Writes results/single_file.json and the README's table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.cifar import load_images
from benchmarks.tables import markdown, replace_block
from offramp.compiler.measure import machine, versions
from offramp.runtime import open_artifact
from offramp.runtime.execution import ASK
from offramp.runtime.table import percent

RESULTS = Path(__file__).parent / "results" / "single_file.json"
ARTIFACTS = Path("build") / "benchmarks"
HEAD = ("model, batch", "first stage", "file, all leave", "ratio", "file, own thresholds", "file, none leaves")
SETTINGS = ("first_stage", "all_leave", "own", "none_leaves")


def session(model: bytes, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Two pools in one process: without this the idle one spins on the other's core.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def measure(model: str, batch: int, rounds: int, threads: int, images: np.ndarray) -> dict[str, Any]:
    """Medians in ms per row of the four settings, rounds interleaved, and the ratio all-leave / first stage."""
    artifact = open_artifact(ARTIFACTS / f"{model}-certified-0.02")
    whole = session(artifact.read("model.onnx"), threads)
    first = session(artifact.read(artifact.manifest.stages[0].file), threads)
    name = artifact.manifest.inputs[0].name
    own, asked = np.array(artifact.manifest.thresholds(), np.float32), np.array(True)
    generator = np.random.default_rng(batch)
    calls = max(1, 64 // batch)

    def run(thresholds: np.ndarray) -> Callable[[np.ndarray], object]:
        return lambda x: whole.run(None, {name: x, "thresholds": thresholds})

    sides: tuple[Callable[[np.ndarray], object], ...] = (
        lambda x: first.run(None, {name: x, ASK: asked}),
        run(np.full_like(own, -np.inf)),
        run(own),
        run(np.full_like(own, np.inf)),
    )
    seconds = np.zeros((rounds, len(sides)))
    for index in range(-2, rounds):
        work = [images[generator.choice(len(images), batch, replace=False)] for _ in range(calls)]
        for side in np.roll(range(len(sides)), index):
            start = time.perf_counter()
            for x in work:
                sides[side](x)
            if index >= 0:
                seconds[index, side] = time.perf_counter() - start
    medians = np.median(seconds, axis=0) * 1e3 / (calls * batch)
    ratios = seconds[:, 1] / seconds[:, 0]
    return {
        "model": model,
        "batch": batch,
        "threads": threads,
        "rounds": rounds,
        **{f"{setting}_ms": float(m) for setting, m in zip(SETTINGS, medians, strict=True)},
        "all_leave_over_first_stage": float(np.median(ratios)),
        "all_leave_over_first_stage_quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
        "own_saves": float(1 - np.median(seconds[:, 2] / seconds[:, 3])),
    }


def table(results: list[dict[str, Any]]) -> str:
    """The README's table."""
    rows = [
        [
            f"{r['model']}, {r['batch']}",
            f"{r['first_stage_ms']:.3f} ms",
            f"{r['all_leave_ms']:.3f} ms",
            f"{r['all_leave_over_first_stage']:.2f}",
            f"{r['own_ms']:.3f} ms ({percent(r['own_saves'])} less than none)",
            f"{r['none_leaves_ms']:.3f} ms",
        ]
        for r in results
    ]
    return markdown(HEAD, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    images, _ = load_images()
    results = [
        measure(model, batch, args.rounds, args.threads, images)
        for model in ("resnet20", "resnet56")
        for batch in (1, 32)
    ]
    result = {
        "command": "python -m benchmarks.single_file",
        "machine": machine(),
        "versions": versions(),
        "seed": "the batch size",
        "results": results,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    replace_block("single_file", table(results))


if __name__ == "__main__":
    main()
