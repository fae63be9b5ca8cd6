"""Searched heads against the default ones, on trained weights and rows that nothing has been picked on.

    python -m benchmarks.heads [--tasks resnet20 resnet56 sst2] [--engine tpe] [--trials 8] [--epochs 50]

For every task both kinds of heads are trained on the same rows with the same seeds; then exits are chosen and judged
on ten random splits of rows no head has learned from, at every tolerance. The oracle lets every row leave at the first
exit that agrees, heads free. Writes benchmarks/results/heads.json and the table in the README; tasks that are not
asked for keep their rows there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.resplits import Answers, judge, summarise
from benchmarks.tables import markdown, replace_block
from benchmarks.tasks import TASKS, Task
from offramp.compiler import (
    Options,
    RowSplits,
    Training,
    calibrate,
    capture,
    choose_candidates,
    costs,
    input_specs,
    keep_independent,
    record,
)
from offramp.compiler.capture import bind
from offramp.compiler.compile import records, train
from offramp.compiler.measure import machine, usable_cores, versions
from offramp.compiler.search import NONE, Search
from offramp.compiler.stream import tensors
from offramp.compiler.thresholds import oracle_cost
from offramp.passes import find_candidates
from offramp.runtime.data import fit_rows
from offramp.runtime.table import percent

RESULTS = Path(__file__).parent / "results" / "heads.json"
WORK = Path("build") / "benchmarks"
TOLERANCES = (0.005, 0.01, 0.02)
POLICIES = ("certified", "joint")
SPLITS = 10
HEAD = (
    "task, policy and tolerance", "default heads save", "searched heads save", "oracle", "disagreement",
    "accuracy, points",
)  # fmt: skip


def answers(task: Task, options: Options, kind: str) -> tuple[Answers, dict[str, Any]]:
    """Train heads of one kind -> what they answer on the rows to score and to judge by, and what that took."""
    example = tensors(task.rows, task.learn[:8])
    backbone = capture(task.model, example, name=task.name)
    rows = fit_rows(task.rows, input_specs(backbone))
    found = keep_independent(backbone, find_candidates(backbone), bind(backbone.inputs, example, task.name))
    candidates = choose_candidates(backbone, found, options.max_candidates)
    nothing = np.empty(0, np.int64)
    splits = RowSplits(options.seed, task.learn, task.validate, task.score, nothing, nothing)
    started = time.perf_counter()
    heads = train(backbone, candidates, rows, splits, options, WORK / f"heads-{task.name}-{kind}.work", _log)
    seconds = time.perf_counter() - started
    temperatures = calibrate(record(backbone, heads, rows, task.validate, "calibrate"))
    asked = np.concatenate([task.score, task.judged])
    given = Answers(
        record(backbone, heads, rows, asked, "answers"), temperatures, task.labels[asked], costs(backbone, heads)
    )
    every = records(given.recording, given.temperatures)
    told = {
        "seconds": seconds,
        "oracle_saved": 1 - oracle_cost(every, given.costs) / float(given.costs.reach[-1]),
        "heads": [
            {
                "place": h.candidate.place,
                "head": h.config.describe(),
                "flops_share": float(given.costs.head[i] / given.costs.reach[-1]),
                "agreement": float(every.agrees[:, i].mean()),
            }
            for i, h in enumerate(heads)
        ],
    }
    return given, told


def judged(given: Answers, options: Options, seen: int) -> dict[str, Any]:
    """One choice of options over `SPLITS` splits."""
    jobs = [(given, options, split, seen) for split in range(SPLITS)]
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("spawn")) as pool:
        outcomes = list(pool.map(judge, *zip(*jobs, strict=True)))
    return summarise(outcomes, options.tolerance)


def compared(task: Task, training: Training, search: Search, seed: int) -> dict[str, Any]:
    """Both kinds of heads at every tolerance under every policy."""
    result: dict[str, Any] = {"task": task.name, "rows": {}, "kinds": {}, "splits": []}
    result["rows"] = {part: len(getattr(task, part)) for part in ("learn", "validate", "score", "judged")}
    for kind, chosen in (("default", Search()), ("searched", search)):
        options = Options(training=training, search=chosen, seed=seed)
        given, result["kinds"][kind] = answers(task, options, kind)
        for policy in POLICIES:
            for tolerance in TOLERANCES:
                asked = Options(tolerance=tolerance, policy=policy, training=training, seed=seed)
                named = {"kind": kind, "policy": policy, "tolerance": tolerance}
                result["splits"].append({**named, **judged(given, asked, len(task.score))})
    return result


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's table: mean ± standard deviation over splits."""
    rows = []
    for result in results:
        found = {(s["kind"], s["policy"], s["tolerance"]): s for s in result["splits"]}
        for policy in POLICIES:
            for tolerance in TOLERANCES:
                pair = [found[kind, policy, tolerance] for kind in ("default", "searched")]
                rows.append(
                    [
                        f"{result['task']}, {policy} {percent(tolerance)}",
                        *(_spread(s["saved"], 1) + " %" for s in pair),
                        percent(result["kinds"]["searched"]["oracle_saved"]),
                        " / ".join(_spread(s["disagreement"], 2) for s in pair) + " %",
                        " / ".join(_spread(s["accuracy_change"], 2) for s in pair),
                    ]
                )
    return markdown(HEAD, rows)


def _spread(value: Mapping[str, float], digits: int) -> str:
    return f"{value['mean'] * 100:.{digits}f} ± {value['sd'] * 100:.{digits}f}"


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--engine", default="tpe")
    parser.add_argument("--trials", type=int, default=Search.trials)
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    assert args.engine != NONE, "one kind against itself says nothing"
    torch.set_num_threads(args.threads)
    search = Search(engine=args.engine, trials=args.trials)
    before = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else []
    results = {result["task"]: result for result in before}
    for name in args.tasks:
        results[name] = {
            **compared(TASKS[name](args.seed), Training(epochs=args.epochs), search, args.seed),
            "machine": machine(), "versions": versions(), "seed": args.seed, "epochs": args.epochs,
            "engine": args.engine, "trials": args.trials, "threads": args.threads,
        }  # fmt: skip
        ordered = [results[name] for name in TASKS if name in results]
        RESULTS.write_text(json.dumps({"command": "python -m benchmarks.heads", "results": ordered}, indent=1) + "\n")
        replace_block("heads", table(ordered))


if __name__ == "__main__":
    main()
