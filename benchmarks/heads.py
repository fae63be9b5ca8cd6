"""Searched heads against the default ones, on trained weights and rows that nothing has been picked on.

    python -m benchmarks.heads [--tasks resnet20 resnet56 resnet50 sst2] [--engine tpe] [--trials 4] [--epochs 30]

For every task both kinds of heads are trained on the same rows with the same seeds; then exits are chosen and judged
on ten random splits of rows no head has learned from, at every tolerance. The oracle lets every row leave at the first
exit that agrees, heads free. Where a search keeps some of the places only, what default heads would save at those
stands beside. A second table tells what `joint` saves where it realises 1 % of disagreement on new rows, and where it
costs one point of accuracy, between tolerances.

Writes benchmarks/results/heads.json and the tables in the README; tasks that are not asked for keep their rows there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.resplits import Answers, judge_all
from benchmarks.tables import log, markdown, replace_block
from benchmarks.tasks import TASKS, Task
from benchmarks.trained import WORK, made_ready, work_of
from offramp.compiler import (
    Options,
    Training,
    calibrate,
    costs,
    finish,
    record,
    records,
    train,
)
from offramp.compiler.measure import machine, versions
from offramp.compiler.search import NONE, Search
from offramp.runtime.errors import InputError
from offramp.runtime.selection import oracle_cost
from offramp.runtime.table import percent

RESULTS = Path(__file__).parent / "results" / "heads.json"
TOLERANCES = (0.005, 0.01, 0.02)
POLICIES = ("certified", "joint")
SWEEP = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)  # under `joint`, for the second table
AIMS = {"disagreement": 0.01, "accuracy_change": -0.01}
THERE = "default at the searched ones' places"
HEAD = (
    "task, policy and tolerance", "default heads save", "at the searched places", "searched heads save", "oracle",
    "disagreement", "accuracy, points",
)  # fmt: skip
AIMS_HEAD = ("task", "at 1 % disagreement", "oracle", "at one point of accuracy")


def answers(task: Task, options: Options, kind: str) -> tuple[Answers, dict[str, Any]]:
    """Compile with heads of one kind -> what they answer on the rows to score and to judge by, and what that took."""
    work, out = work_of(task.name, kind), WORK / f"heads-{task.name}-{kind}"
    fresh = not work.exists()
    started = time.perf_counter()
    ready = made_ready(task, options)  # its test rows are the artifact's; the table's figures are of many such halvings
    heads = train(ready, options, work, log)
    trained = time.perf_counter()
    manifest = finish(ready, heads, out, options, log)
    done = time.perf_counter()
    temperatures = calibrate(record(ready.backbone, heads, ready.rows, task.validate, "calibrate"))
    asked = np.concatenate([task.score, task.judged])
    price = costs(ready.backbone, heads)
    recording = record(ready.backbone, heads, ready.rows, asked, "answers")
    given = Answers(recording, temperatures, task.labels[asked], price)
    every = records(recording, temperatures)
    told = {
        "train_s": trained - started if fresh else None,  # None: an interrupted run was taken up
        "compile_s": done - started if fresh else None,
        "oracle_saved": 1 - oracle_cost(every, price) / float(price.reach[-1]),
        "timings": [asdict(timing) for timing in manifest.measured.timings],
        "heads": [
            {
                "place": h.candidate.place,
                "head": h.config.describe(),
                "flops_share": float(price.head[i] / price.reach[-1]),
                "agreement": float(every.agrees[:, i].mean()),
            }
            for i, h in enumerate(heads)
        ],
    }
    return given, told


def compared(task: Task, training: Training, search: Search, seed: int, threads: int) -> dict[str, Any]:
    """Both kinds of heads at every tolerance under every policy, and the default ones at the searched ones' places."""
    result: dict[str, Any] = {"task": task.name, "rows": {}, "kinds": {}, "splits": []}
    result["rows"] = {part: len(getattr(task, part)) for part in ("learn", "validate", "score", "judged")}
    training, search = replace(training, **task.training), replace(search, **task.search)
    result |= {"epochs": training.epochs, "engine": search.engine, "trials": search.trials}
    options = Options(
        training=training, seed=seed, threads=threads, max_candidates=task.max_candidates, policy=task.policy
    )  # fmt: skip
    given = {}
    for kind in task.kinds:
        chosen = search if kind == "searched" else Search()
        given[kind], result["kinds"][kind] = answers(task, replace(options, search=chosen), kind)
    places = {head["place"] for head in result["kinds"]["searched"]["heads"]}
    default = result["kinds"]["default"]["heads"] if "default" in task.kinds else ()
    if len(places) < len(default):
        given[THERE] = given["default"].at([i for i, head in enumerate(default) if head["place"] in places])
    for kind, policy, tolerance in itertools.product(given, POLICIES, TOLERANCES):
        asked = replace(options, tolerance=tolerance, policy=policy)
        named = {"kind": kind, "policy": policy, "tolerance": tolerance}
        try:
            judged = judge_all([given[kind]], asked, len(task.score))
        except InputError as error:  # too few rows for a certificate
            judged = {"refused": str(error)}
        result["splits"].append({**named, **judged})
    result["sweep"] = {
        kind: [
            judge_all([given[kind]], replace(options, tolerance=tolerance, policy="joint"), len(task.score))
            for tolerance in SWEEP
        ]
        for kind in _kinds(result)
    }
    return result


def _kinds(result: Mapping[str, Any]) -> list[str]:
    """Of heads that were trained, in the order of the tables."""
    return [kind for kind in ("default", "searched") if kind in result["kinds"]]


def saved_at(sweep: Sequence[Mapping[str, Any]], what: str) -> float | None:
    """What is saved where the mean of `what` over the splits is the aim, between two tolerances; None if it never is.

    The last crossing counts: with it as the price the most is saved.
    """
    path = [(0.0, 0.0), *((point[what]["mean"], point["saved"]["mean"]) for point in sweep)]
    aim, found = AIMS[what], None
    for (before, less), (after, more) in itertools.pairwise(path):
        if min(before, after) <= aim <= max(before, after) and before != after:
            found = less + (aim - before) / (after - before) * (more - less)
    return found


def aims_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's second table: default / searched heads."""
    rows = []
    for result in results:
        kinds = result["kinds"]
        cells = {}
        for what in AIMS:
            found = [saved_at(result["sweep"][kind], what) for kind in _kinds(result)]
            most = [percent(result["sweep"][kind][-1]["saved"]["mean"]) for kind in _kinds(result)]
            cells[what] = " / ".join(
                f"more than {m}" if f is None else percent(f) for f, m in zip(found, most, strict=True)
            )
        oracle = " / ".join(percent(kinds[kind]["oracle_saved"]) for kind in _kinds(result))
        rows.append([result["task"], cells["disagreement"], oracle, cells["accuracy_change"]])
    return markdown(AIMS_HEAD, rows)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's table: mean ± standard deviation over splits."""
    rows = []
    for result in results:
        found = {(s["kind"], s["policy"], s["tolerance"]): s for s in result["splits"]}
        for policy in POLICIES:
            for tolerance in TOLERANCES:
                pair = [found[kind, policy, tolerance] for kind in _kinds(result)]
                name = f"{result['task']}, {policy} {percent(tolerance)}"
                if any("refused" in s for s in pair):
                    rows.append([name, *["too few rows"] * 3, "", "", ""])
                    continue
                # Default heads there are default heads where all places are kept.
                there = found.get((THERE, policy, tolerance), pair[0] if len(pair) > 1 else None)
                saved = (pair[0] if len(pair) > 1 else None, there, pair[-1])
                rows.append(
                    [
                        name,
                        *("" if s is None else _spread(s["saved"], 1) + " %" for s in saved),
                        " / ".join(percent(result["kinds"][kind]["oracle_saved"]) for kind in _kinds(result)),
                        " / ".join(_spread(s["disagreement"], 2) for s in pair) + " %",
                        " / ".join(_spread(s["accuracy_change"], 2) for s in pair),
                    ]
                )
    return markdown(HEAD, rows)


def _spread(value: Mapping[str, float], digits: int) -> str:
    return f"{value['mean'] * 100:.{digits}f} ± {value['sd'] * 100:.{digits}f}"


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
            **compared(TASKS[name](args.seed), Training(epochs=args.epochs), search, args.seed, args.threads),
            "machine": machine(), "versions": versions(), "seed": args.seed, "threads": args.threads,
        }  # fmt: skip
        ordered = [results[name] for name in TASKS if name in results]
        RESULTS.write_text(json.dumps({"command": "python -m benchmarks.heads", "results": ordered}, indent=1) + "\n")
        replace_block("heads", table(ordered))
        replace_block("aims", aims_table(ordered))


if __name__ == "__main__":
    main()
