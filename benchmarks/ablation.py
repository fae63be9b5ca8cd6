"""What the parts are worth: the papers' ablation (Appendix D of early-exit.txt) on a trained ResNet-20.

    python -m benchmarks.ablation [--epochs 30] [--tolerance 0.01]

    searched heads, chosen exits       what a search finds, the exits that pay
    default heads, chosen exits        no search
    default heads, all candidates      every candidate asks every row: thresholds by Eq. 3 with equal budgets
    1, 2, 3 more dense layers          default heads with so many layers before the last, exits chosen

Heads of all kinds learn from the same rows with the same seeds; exits are chosen by `joint` and judged over 20 random
splits of rows no head has learned from. Size is the parameters exits add. Time is expected: the rows that reach a stage
times what the stage takes at that many rows. Writes results/ablation.json and the README's table.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.recorded import BATCHES, Recorded, observe
from benchmarks.resplits import deal
from benchmarks.tables import log, markdown, replace_block
from benchmarks.tasks import TASKS
from benchmarks.thresholds import time_saved
from benchmarks.trained import WORK, made_ready
from offramp.compiler import (
    Costs,
    Family,
    Head,
    HeadConfig,
    Options,
    Ready,
    Records,
    Selection,
    Training,
    default_heads,
    distil,
    joint,
    register_family,
    train,
)
from offramp.compiler.heads import build_head
from offramp.compiler.measure import machine, versions
from offramp.compiler.search import Search
from offramp.runtime.selection import disagreement, equation_3_threshold, exits_taken, expected_cost
from offramp.runtime.table import percent

RESULTS = Path(__file__).parent / "results" / "ablation.json"
TASK = "resnet20"
WIDTH = 64  # of an added dense layer
SPLITS = 20
HEAD = (
    TASK, "exits", "compute", "time, batch 1", "time, batch 32", "parameters added", "disagreement",
    "accuracy, points",
)  # fmt: skip


class Deeper(nn.Module):
    """A default head whose last dense layer has others before it."""

    def __init__(self, shape: tuple[int, ...], classes: int, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.head = build_head(HeadConfig("conv", _own(settings)), shape, classes)
        last = self.head.classify
        assert isinstance(last, nn.Linear)
        sizes = [last.in_features, *[WIDTH] * int(settings["layers"])]
        dense = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        self.head.classify = nn.Sequential(*dense, nn.Linear(sizes[-1], classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, K]."""
        logits: torch.Tensor = self.head(x)
        return logits


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    work: str  # where its heads are kept; those of benchmarks.heads are taken up if they are there
    heads: Callable[[Ready, Options, Path], tuple[Head, ...]]
    choose: Callable[[Records, Costs, float], Selection] = joint


def every_candidate(kept: Records, price: Costs, tolerance: float) -> Selection:
    """All candidates as exits, each with an equal part of the tolerance by Eq. 3 over the rows that come to it."""
    chosen = tuple(range(kept.candidates))
    stay = np.ones(kept.rows, np.bool_)
    thresholds = []
    for index in chosen:
        confidence, agrees = kept.confidence[stay, index], kept.agrees[stay, index]
        budget = min(1.0, tolerance / len(chosen) * kept.rows / max(1, stay.sum()))
        thresholds.append(equation_3_threshold(confidence, agrees, budget) if stay.any() else float("inf"))
        stay &= ~(kept.confidence[:, index] >= np.float32(thresholds[-1]))
    plan = chosen, tuple(thresholds)
    return Selection(*plan, "all", tolerance, expected_cost(kept, price, *plan), disagreement(kept, *plan))


def deeper(layers: int) -> Callable[[Ready, Options, Path], tuple[Head, ...]]:
    """Default heads with so many more dense layers, trained."""

    def heads(ready: Ready, options: Options, folder: Path) -> tuple[Head, ...]:
        configs = {
            name: HeadConfig("deeper", {**config.settings, "layers": layers})
            for name, config in default_heads(ready.backbone, ready.candidates).items()
        }
        return distil(
            ready.backbone, ready.candidates, configs, ready.rows, learn=ready.splits.distil,
            validate=ready.splits.calibrate, training=options.training, seed=options.seed, folder=folder, report=log,
        )  # fmt: skip

    return heads


def searched(ready: Ready, options: Options, folder: Path) -> tuple[Head, ...]:
    """Heads by a search with its defaults."""
    return train(ready, replace(options, search=Search(engine="tpe")), folder, log)


VARIANTS = (
    Variant("searched heads, chosen exits", f"heads-{TASK}-searched", searched),
    Variant("default heads, chosen exits", f"heads-{TASK}-default", lambda r, o, f: train(r, o, f, log)),
    Variant(
        "default heads, all candidates", f"heads-{TASK}-default", lambda r, o, f: train(r, o, f, log), every_candidate
    ),
    *(Variant(f"{n} more dense layers, chosen exits", f"ablation-{n}-more", deeper(n)) for n in (1, 2, 3)),
)


def examined(variant: Variant, options: Options, tolerance: float) -> dict[str, Any]:
    """Train one variant's heads -> what the table says of it."""
    task = TASKS[TASK](options.seed)
    ready = made_ready(task, options)
    heads = variant.heads(ready, options, WORK / f"{variant.work}.work")
    kept = observe(task, ready, heads, options.threads or 1)
    sizes = [head.parameters() for head in heads]
    outcomes = [judged(kept, variant, tolerance, sizes, split) for split in range(SPLITS)]
    told = {key: {"mean": mean(o[key] for o in outcomes), "sd": stdev(o[key] for o in outcomes)} for key in outcomes[0]}
    return {"variant": variant.name, "parameters_backbone": ready.backbone.parameters(), **told}


def judged(kept: Recorded, variant: Variant, tolerance: float, sizes: Sequence[int], split: int) -> dict[str, float]:
    """One split, as in `benchmarks.thresholds`."""
    every = kept.records()
    parts = deal(every.rows, split, kept.seen)
    found = variant.choose(every.of(parts["select"]), kept.costs, tolerance)
    test = every.of(parts["test"])
    taken = exits_taken(test, found.chosen, found.thresholds)
    correct = kept.right[parts["test"]][:, [*found.chosen, -1]]
    return {
        "exits": float(len(found.chosen)),
        "compute": expected_cost(test, kept.costs, found.chosen, found.thresholds) / float(kept.costs.reach[-1]),
        **{f"time_{batch}": 1 - time_saved(kept, found, taken, batch) for batch in BATCHES},
        "parameters": float(sum(sizes[i] for i in found.chosen)),
        "disagreement": disagreement(test, found.chosen, found.thresholds),
        "accuracy_change": float(correct[np.arange(len(taken)), taken].mean() - correct[:, -1].mean()),
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's table; the plain backbone is 100 % everywhere."""
    rows = [
        [
            r["variant"], f"{r['exits']['mean']:.1f}", percent(r["compute"]["mean"]),
            *(percent(r[f"time_{batch}"]["mean"]) for batch in BATCHES),
            percent(r["parameters"]["mean"] / r["parameters_backbone"]), percent(r["disagreement"]["mean"], 2),
            f"{r['accuracy_change']['mean'] * 100:+.2f} ± {r['accuracy_change']['sd'] * 100:.2f}",
        ]
        for r in results
    ]  # fmt: skip
    return markdown(HEAD, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    described = "{}, {} more dense"
    register_family(
        "deeper",
        Family(
            rank=4,
            build=Deeper,
            default=lambda shape, width: {},
            describe=lambda given: described.format(HeadConfig("conv", _own(given)).describe(), given["layers"]),
        ),
    )
    options = Options(seed=args.seed, threads=args.threads, training=Training(epochs=args.epochs))
    results = [examined(variant, options, args.tolerance) for variant in VARIANTS]
    told = {
        "command": "python -m benchmarks.ablation", "machine": machine(), "versions": versions(), "seed": args.seed,
        "epochs": args.epochs, "tolerance": args.tolerance, "threads": args.threads, "splits": SPLITS,
        "results": results,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    replace_block("ablation", table(results))


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "layers"}


if __name__ == "__main__":
    main()
