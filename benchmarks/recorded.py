"""What trained heads said of rows that no head has learned from, kept in a small file each.

    python -m benchmarks.recorded [--tasks resnet20 resnet56 sst2] [--kind searched]

Trains the heads of `benchmarks.heads`, or takes up those it has trained, asks them once, times every stage of the
program that has an exit at each of them, and writes `benchmarks/results/records/TASK.npz`. Selection can then be
studied without weights, data or torch: `benchmarks.thresholds` and a test do.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tasks import TASKS, Task
from benchmarks.trained import KINDS, WORK, heads_of, made_ready, options_of
from benchmarks.zoo.program import write
from offramp.compiler import (
    Head,
    Ready,
    calibrate,
    costs,
    record,
)
from offramp.passes import METRICS, Backbone, ExitPlan, PlannedExit, build_program
from offramp.runtime.artifact import open_artifact
from offramp.runtime.selection import Costs, Records
from offramp.runtime.stage_times import StageTimes, measure_stages

FOLDER = Path(__file__).parent / "results" / "records"
BATCHES = (1, 32)


@dataclass(frozen=True, eq=False)
class Recorded:
    """One file. Rows that a search was scored on come first: they may choose exits, and judge nothing."""

    confidence: dict[str, np.ndarray]  # by metric: [rows, candidates] float32
    agrees: np.ndarray  # [rows, candidates] bool
    regret: np.ndarray  # [rows, candidates] float32
    right: np.ndarray  # [rows, candidates + 1] bool: as the labels say, the backbone last
    seen: int  # rows a search was scored on
    costs: Costs  # FLOPs per row
    times: StageTimes  # of the program with all these exits
    threads: int

    def records(self, metric: str = METRICS[0]) -> Records:
        """As selection reads them."""
        return Records(self.confidence[metric], self.agrees, self.confidence[METRICS[0]], self.regret)


def read(name: str) -> Recorded:
    """A task's file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        kept = dict(file)
    sizes = tuple(kept["sizes"].tolist())
    return Recorded(
        {metric: kept[metric] for metric in METRICS},
        kept["agrees"],
        kept["regret"],
        kept["right"],
        int(kept["seen"]),
        Costs(kept["segment_flops"], kept["head_flops"]),
        StageTimes(sizes, kept["silent_ms"], kept["asked_ms"], kept["gather_ms"]),
        int(kept["threads"]),
    )


def observe(task: Task, ready: Ready, heads: tuple[Head, ...], threads: int) -> Recorded:
    """Ask trained heads about every row that no head has learned from, and time them."""
    temperatures = calibrate(record(ready.backbone, heads, ready.rows, task.validate, "calibrate"))
    asked = np.concatenate([task.score, task.judged])
    said = record(ready.backbone, heads, ready.rows, asked, "answers")
    some = dict(ready.rows.take(asked[: max(BATCHES)]))
    return Recorded(
        {metric: said.confidence(temperatures, metric) for metric in METRICS},
        said.classes() == said.backbone_classes[:, None],
        said.regret(),
        np.column_stack([said.classes(), said.backbone_classes]) == task.labels[asked][:, None],
        len(task.score),
        costs(ready.backbone, heads),
        stage_times(ready.backbone, heads, temperatures, some, threads),
        threads,
    )


def write_file(name: str, kept: Recorded) -> None:
    """What `read` reads."""
    arrays: dict[str, Any] = {
        "agrees": kept.agrees,
        "regret": kept.regret,
        "right": kept.right,
        "seen": np.array(kept.seen),
        "segment_flops": kept.costs.segment,
        "head_flops": kept.costs.head,
        "sizes": np.array(kept.times.sizes),
        "silent_ms": kept.times.silent,
        "asked_ms": kept.times.asked,
        "gather_ms": kept.times.gather,
        "threads": np.array(kept.threads),
        **kept.confidence,
    }
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


def stage_times(
    backbone: Backbone,
    heads: tuple[Head, ...],
    temperatures: tuple[float, ...],
    rows: dict[str, np.ndarray],
    threads: int,
) -> StageTimes:
    """Every stage of the program with an exit at each head."""
    exits = tuple(PlannedExit(h.candidate.name, t, 0.5) for h, t in zip(heads, temperatures, strict=True))
    program = build_program(backbone, ExitPlan(exits), {h.candidate.name: h.module for h in heads})
    folder = WORK / f"all-exits-{backbone.name}"
    write(program, ("onnx-segments",), folder)
    return measure_stages(open_artifact(folder), max(BATCHES), threads, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["resnet20", "resnet56", "sst2"])
    parser.add_argument("--kind", choices=KINDS, default="searched")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.tasks:
        task = TASKS[name](args.seed)
        options = options_of(task, args.kind, seed=args.seed, threads=args.threads)
        ready = made_ready(task, options)
        heads = heads_of(task, ready, options, args.kind)
        write_file(name, observe(task, ready, heads, args.threads))


if __name__ == "__main__":
    main()
