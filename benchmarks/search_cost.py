"""What a search costs: all trials of all candidates on one stream, against the same trials one after the other.

    python -m benchmarks.search_cost [--candidates 2 4 8 16] [--rows 384] [--rounds 2]

On the trained ResNet-56. The shared search runs first and proposes; then each of its trials is trained alone: its own
passes through the whole backbone for as many epochs as it learned, its own scoring. Both sides in one process with
the same threads, sizes in turn, round after round, behind a search that only warms up: what a process pays once, most
of it the import of NNI, is no part of a trial. Writes results/search_cost.json, the README's table and
docs/search-cost.svg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot as plt

from benchmarks.tables import log, markdown, replace_block
from benchmarks.tasks import TASKS, Task
from offramp.compiler import Options, Ready, RowSplits, Training, prepare
from offramp.compiler.distill import fresh_head
from offramp.compiler.heads import HeadConfig
from offramp.compiler.learner import Learner
from offramp.compiler.measure import machine, versions
from offramp.compiler.search import Found, Search, search_heads
from offramp.compiler.search.trial import Trial, places, score

RESULTS = Path(__file__).parent / "results" / "search_cost.json"
FIGURE = Path(__file__).parents[1] / "docs" / "search-cost.svg"
SEARCH = Search(engine="tpe", trials=4, waves=1, epochs=2)
SCORED = 256  # rows
TOLERANCE = 0.01
HEAD = ("candidates", "trials", "shared, s", "one after the other, s", "times less")


def ready_with(task: Task, candidates: int, seed: int, rows: int) -> Ready:
    """The backbone with so many of its candidates, spread evenly."""
    certify, test = task.judged[:2000], task.judged[2000:]
    splits = RowSplits(seed, task.learn[:rows], task.validate, task.score[:SCORED], certify, test)
    options = Options(seed=seed, max_candidates=candidates)
    return prepare(task.model, task.rows, options=options, splits=splits, name=task.name)


def shared(ready: Ready, training: Training) -> tuple[Found, float]:
    """All trials on one stream -> what was tried, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        found = search_heads(
            ready.backbone, ready.candidates, ready.rows, learn=ready.splits.distil, select=ready.splits.select,
            tolerance=TOLERANCE, search=SEARCH, training=training, seed=ready.splits.seed, folder=Path(folder),
        )  # fmt: skip
        return found, time.perf_counter() - started


def alone(ready: Ready, found: Found, training: Training) -> float:
    """The same trials, each with the backbone to itself -> seconds."""
    started = time.perf_counter()
    for record in found.trials:
        candidate = ready.candidates[record["candidate"]]
        (place,) = places(ready.backbone, [candidate])
        stream = training.stream(ready.backbone, [candidate], ready.rows, ready.splits.seed)
        config = HeadConfig(record["family"], record["settings"])
        pieces = [stream.shuffled(ready.splits.distil, epoch) for epoch in range(SEARCH.epochs)]
        learner = Learner(
            fresh_head(config, place.shape, place.classes, 0), len(pieces[0]) * SEARCH.epochs, record["rate"], training,
            stream.features,
        )  # fmt: skip
        after = candidate.flops_after / place.total
        trial = Trial(0, config, record["rate"], None, learner, after, place.price(config))
        for epoch in range(max(record["scores"])):
            learner.module.train()
            for observed in stream.augmented(pieces[epoch], epoch):
                learner.learn(observed.target, observed.values[0], observed.hint)
            if epoch + 1 in record["scores"]:
                score([trial], stream.plain(ready.splits.select), TOLERANCE, epoch + 1)
    return time.perf_counter() - started


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's table: medians over rounds."""
    rows = [
        [
            str(r["candidates"]), str(r["trials"]), f"{median(r['shared_s']):.1f}", f"{median(r['alone_s']):.1f}",
            f"{median(r['ratios']):.1f}",
        ]
        for r in results
    ]  # fmt: skip
    return markdown(HEAD, rows)


def plot(results: Sequence[Mapping[str, Any]]) -> None:
    """Seconds against candidates, both sides, and the line that twice the candidates would take twice as long."""
    matplotlib.rcParams["svg.hashsalt"] = "search-cost"  # the same figures, the same file
    sizes = [r["candidates"] for r in results]
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for key, label in (("alone_s", "one after the other"), ("shared_s", "shared stream")):
        axes.plot(sizes, [median(r[key]) for r in results], marker="o", label=label)
    first = median(results[0]["shared_s"]) / sizes[0]
    axes.plot(sizes, [first * n for n in sizes], "--", color="grey", label="shared stream, were it linear")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.set_xlabel("candidates")
    axes.set_ylabel("seconds")
    axes.legend(frameon=False)
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--rows", type=int, default=384, help="that heads learn from in an epoch")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task, training = TASKS["resnet56"](args.seed), replace(Training(), batch=64)
    results: list[dict[str, Any]] = [
        {"candidates": n, "trials": 0, "shared_s": [], "alone_s": [], "ratios": []} for n in args.candidates
    ]
    shared(ready_with(task, args.candidates[0], args.seed, args.rows), training)
    for turn in range(args.rounds):
        for result in results:
            ready = ready_with(task, result["candidates"], args.seed, args.rows)
            found, ours = shared(ready, training)
            theirs = alone(ready, found, training)
            result["trials"] = len(found.trials)
            result["shared_s"].append(ours)
            result["alone_s"].append(theirs)
            result["ratios"].append(theirs / ours)
            log(f"round {turn + 1}: {result['candidates']} candidates, {ours:.1f} s shared, {theirs:.1f} s alone")
    told = {
        "command": "python -m benchmarks.search_cost", "machine": machine(), "versions": versions(), "seed": args.seed,
        "threads": args.threads, "rows": args.rows, "batch": training.batch, "engine": SEARCH.engine,
        "epochs": SEARCH.epochs, "waves": SEARCH.waves, "results": results,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    replace_block("search_cost", table(results))
    plot(results)


if __name__ == "__main__":
    main()
