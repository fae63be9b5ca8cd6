"""What the parts are worth: the papers' ablation (Appendix D of early-exit.txt) on a trained ResNet-20.

    python -m benchmarks.ablation [--epochs 30] [--tolerance 0.01]

    searched heads, chosen exits       what a search finds, the exits that pay
    default heads, chosen exits        no search
    default heads, all candidates      every candidate asks every row: thresholds by Eq. 3 with equal budgets
    1, 2, 3 more dense layers          default heads with so many layers before the last, exits chosen

For every row one artifact: accuracy and compute on its test rows, parameters the exits add, milliseconds per row.
Heads of all kinds learn from the same rows with the same seeds; exits are chosen by `joint`. Writes
results/ablation.json and the README's table.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.tables import log, markdown, replace_block
from benchmarks.tasks import TASKS
from offramp.compiler import (
    Costs,
    Family,
    Head,
    HeadConfig,
    Options,
    Ready,
    Records,
    RowSplits,
    Selection,
    Training,
    default_heads,
    distil,
    finish,
    prepare,
    register_family,
    train,
)
from offramp.compiler.heads import build_head
from offramp.compiler.measure import machine, versions
from offramp.compiler.search import Search
from offramp.compiler.thresholds import disagreement, equation_3_threshold, expected_cost
from offramp.runtime.manifest import Certificate
from offramp.runtime.table import percent

RESULTS = Path(__file__).parent / "results" / "ablation.json"
WORK = Path("build") / "benchmarks"
WIDTH = 64  # of an added dense layer
HEAD = (
    "ResNet-20", "exits", "compute", "disagreement", "accuracy, points", "parameters added", "time, batch 1",
    "time, batch 32",
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
    all_stay: bool = False


def every_candidate(
    recorded: Mapping[str, Records], price: Costs, options: Options
) -> tuple[Selection, Certificate | None]:
    """All candidates as exits, each with an equal part of the tolerance by Eq. 3 over the rows that come to it."""
    kept = recorded["select"]
    chosen = tuple(range(kept.candidates))
    stay = np.ones(kept.rows, np.bool_)
    thresholds = []
    for index in chosen:
        confidence, agrees = kept.confidence[stay, index], kept.agrees[stay, index]
        budget = min(1.0, options.tolerance / len(chosen) * kept.rows / max(1, stay.sum()))
        thresholds.append(equation_3_threshold(confidence, agrees, budget))
        stay &= ~(kept.confidence[:, index] >= np.float32(thresholds[-1]))
    plan = chosen, tuple(thresholds)
    told = expected_cost(kept, price, *plan), disagreement(kept, *plan)
    return Selection(*plan, "all candidates", options.tolerance, *told), None


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


def plain(ready: Ready, options: Options, folder: Path) -> tuple[Head, ...]:
    """Default heads."""
    return train(ready, options, folder, log)


VARIANTS = (
    Variant("searched heads, chosen exits", "heads-resnet20-searched", searched),
    Variant("default heads, chosen exits", "heads-resnet20-default", plain),
    Variant("default heads, all candidates", "heads-resnet20-default", plain, all_stay=True),
    *(Variant(f"{n} more dense layers, chosen exits", f"ablation-{n}-more", deeper(n)) for n in (1, 2, 3)),
)


def examined(variant: Variant, options: Options, seed: int) -> dict[str, Any]:
    """Compile one variant -> what the table says of it."""
    task = TASKS["resnet20"](seed)
    certify, test = np.array_split(task.judged, 2)
    splits = RowSplits(seed, task.learn, task.validate, task.score, certify, test)
    ready = prepare(task.model, task.rows, options=options, splits=splits, name=task.name)
    heads = variant.heads(ready, options, WORK / f"{variant.work}.work")
    out = WORK / f"ablation-{variant.name.replace(', ', '-').replace(' ', '-')}"
    manifest = finish(ready, heads, out, options, log, every_candidate if variant.all_stay else None)
    seen = manifest.evaluation
    return {
        "variant": variant.name,
        "exits": len(manifest.exits) - 1,
        "flops_share": seen.flops / seen.flops_backbone,
        "disagreement": seen.disagreement,
        "accuracy": seen.accuracy,
        "accuracy_backbone": seen.accuracy_backbone,
        "parameters": sum(e.parameters for e in manifest.exits),
        "parameters_backbone": manifest.backbone.parameters,
        "timings": [asdict(timing) for timing in manifest.measured.timings],
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's table; the plain backbone is 100 % everywhere."""
    rows = [
        [
            r["variant"], str(r["exits"]), percent(r["flops_share"]), percent(r["disagreement"], 2),
            f"{(r['accuracy'] - r['accuracy_backbone']) * 100:+.2f}",
            percent(r["parameters"] / r["parameters_backbone"]), *(percent(t["ratio"]) for t in r["timings"]),
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
    register_family(
        "deeper",
        Family(
            rank=4,
            build=Deeper,
            default=lambda shape, width: {},
            describe=lambda settings: f"{HeadConfig('conv', _own(settings)).describe()}, {settings['layers']} dense",
        ),
    )
    options = Options(
        tolerance=args.tolerance, policy="joint", seed=args.seed, threads=args.threads,
        training=Training(epochs=args.epochs), targets=("onnx-segments",),
    )  # fmt: skip
    results = [examined(variant, options, args.seed) for variant in VARIANTS]
    told = {
        "command": "python -m benchmarks.ablation", "machine": machine(), "versions": versions(), "seed": args.seed,
        "epochs": args.epochs, "tolerance": args.tolerance, "threads": args.threads, "results": results,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    replace_block("ablation", table(results))


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "layers"}


if __name__ == "__main__":
    main()
