"""Selection over many random splits of the same recorded rows: what a policy promises against what it keeps.

Heads are trained once and asked once; then rows are dealt anew into select, certify and test, exits are chosen
on the first two and judged on the third. One split's 1,500 test rows say little about half a percent; twenty
splits say what to expect, and how far a single compile may stray from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import mean, stdev
from typing import Any

import numpy as np

from offramp.compiler import Costs, Options, Recording
from offramp.compiler.choose import choose_exits, records
from offramp.runtime.process import usable_cores
from offramp.runtime.selection import disagreement, exits_taken, expected_cost

SPLITS = 10  # per training seed
SHARES = (0.4, 0.7)  # ends of select and certify: 40 % select, 30 % certify, 30 % test


@dataclass(frozen=True, eq=False)
class Answers:
    """What heads and backbone said of some rows, with labels to judge by."""

    recording: Recording
    temperatures: tuple[float, ...]
    labels: np.ndarray  # [rows] int64
    costs: Costs

    def at(self, some: Sequence[int]) -> Answers:
        """Those of some candidates only."""
        recording = Recording(self.recording.logits[list(some)], self.recording.backbone)
        return Answers(recording, tuple(self.temperatures[i] for i in some), self.labels, self.costs.among(some))


def deal(rows: int, seed: int, seen: int = 0) -> dict[str, np.ndarray]:
    """Row indices of select, certify and test; the first `seen`, on which a choice was scored, are always select's."""
    order = np.random.default_rng([seed, rows]).permutation(np.arange(seen, rows))
    select, certify, test = np.split(order, [round(share * len(order)) for share in SHARES])
    return {"select": np.concatenate([np.arange(seen), select]), "certify": certify, "test": test}


def judge(answers: Answers, options: Options, seed: int, seen: int = 0) -> dict[str, float]:
    """One split: compute saved, disagreement and accuracy on its test rows. `seen` as for `deal`."""
    every = records(answers.recording, answers.temperatures)
    parts = deal(every.rows, seed, seen)
    dealt = {name: every.of(rows) for name, rows in parts.items()}
    selection, *_ = choose_exits(dealt, answers.costs, options)
    rows, test = parts["test"], dealt["test"]
    plan = selection.chosen, selection.thresholds
    taken = exits_taken(test, *plan)
    classes = np.column_stack([answers.recording.classes()[rows], answers.recording.backbone_classes[rows]])
    exit_classes = classes[np.arange(len(rows)), np.append(np.array(selection.chosen, np.int64), -1)[taken]]
    labels = answers.labels[rows]
    return {
        "saved": 1 - expected_cost(test, answers.costs, *plan) / float(answers.costs.reach[-1]),
        "disagreement": disagreement(test, *plan),
        "accuracy_backbone": float((classes[:, -1] == labels).mean()),
        "accuracy": float((exit_classes == labels).mean()),
        "exits": float(len(selection.chosen)),
    }


def judge_all(answers: Sequence[Answers], options: Options, seen: int = 0) -> dict[str, Any]:
    """One choice of options over `SPLITS` splits of each training seed's answers."""
    jobs = [(one, options, split, seen) for one in answers for split in range(SPLITS)]
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("spawn")) as pool:
        return summarise(list(pool.map(judge, *zip(*jobs, strict=True))), options.tolerance)


def summarise(outcomes: Sequence[dict[str, float]], tolerance: float) -> dict[str, Any]:
    """Mean and standard deviation of every figure over the splits, and how many split's risk exceeds the tolerance."""
    change = [o["accuracy"] - o["accuracy_backbone"] for o in outcomes]
    columns = {key: [o[key] for o in outcomes] for key in outcomes[0]} | {"accuracy_change": change}
    return {
        "splits": len(outcomes),
        "over_tolerance": sum(o["disagreement"] > tolerance for o in outcomes),
        **{key: {"mean": mean(values), "sd": stdev(values)} for key, values in columns.items()},
    }
