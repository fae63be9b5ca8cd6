"""Policies, risks and metrics on real records: what each promises, what it keeps, what it saves.

    python -m benchmarks.thresholds [--tasks resnet20 resnet56 sst2] [--splits 20]

Works on the files of `benchmarks.recorded`: rows are dealt anew into select, certify and test, exits are chosen on the
first two and judged on the third, over many splits. Time is expected time: the rows that reach a stage times what that
stage takes at that many rows, measured when the records were made. Writes benchmarks/results/thresholds.json and the
README's tables; tasks that are not asked for keep their rows there.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks.recorded import BATCHES, FOLDER, Recorded, read
from benchmarks.resplits import deal
from benchmarks.tables import log, markdown, replace_block
from offramp.compiler.measure import machine, versions
from offramp.runtime.errors import InputError
from offramp.runtime.process import usable_cores
from offramp.runtime.selection import (
    CERTIFIED,
    DISAGREEMENT,
    REGRET,
    Records,
    Selection,
    certified,
    disagreement,
    exits_taken,
    expected_cost,
    realised_risk,
    select,
)
from offramp.runtime.table import percent
from offramp.runtime.tune import Objective

RESULTS = Path(__file__).parent / "results" / "thresholds.json"
TOLERANCES = (0.005, 0.01, 0.02, 0.03)
SWEEP = (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05)
DELTA = 0.05
LEAST, MOST = 1e-5, 0.03  # risk
HEAD = (
    "task, policy, tolerance", "compute saved", "time saved, batch 1 / 32", "disagreement",
    "over tolerance, test / all", "accuracy, points",
)  # fmt: skip
EQUAL_HEAD = ("task, tolerance of geometric", "risk realised", "geometric saves", "joint saves there")


@dataclass(frozen=True)
class Choice:
    """How exits are chosen."""

    policy: str
    tolerance: float
    kind: str = DISAGREEMENT  # of risk
    metric: str = "max_probability"

    def describe(self) -> str:
        """One phrase."""
        parts = [self.policy]
        parts += [self.metric] if self.metric != "max_probability" else []
        parts += [f"of {self.kind}"] if self.kind != DISAGREEMENT else []
        return ", ".join(parts)


CHOICES = [
    *(Choice(p, t) for p, t in itertools.product(("geometric", "equal", "joint", CERTIFIED), TOLERANCES)),
    *(Choice(p, t, kind=REGRET) for p, t in itertools.product(("joint", CERTIFIED), TOLERANCES)),
    *(Choice("joint", t, metric=m) for m, t in itertools.product(("margin", "entropy"), (0.01, 0.02))),
    *(Choice(p, t) for p, t in itertools.product(("geometric", "joint"), SWEEP) if t not in TOLERANCES),
]


def judged(name: str, choice: Choice, split: int) -> dict[str, float] | None:
    """One split: what the plan does on its test rows; None when there are too few rows for a certificate."""
    kept = read(name)
    every = replace(kept.records(choice.metric), kind=choice.kind)
    parts = deal(every.rows, split, kept.seen)
    selected, held_out, test = (every.of(parts[p]) for p in ("select", "certify", "test"))
    try:
        found = _chosen(choice, selected, held_out, kept)
    except InputError:
        return None
    plan = found.chosen, found.thresholds
    # Certification rows are drawn from these: whether a promise is broken is told by all of them, test rows alone are
    # the harder the luckier that draw was.
    rest = every.of(np.concatenate([parts["certify"], parts["test"]]))
    taken = exits_taken(test, *plan)
    correct = kept.right[parts["test"]][:, [*found.chosen, -1]]
    accuracy = correct[np.arange(len(taken)), taken].mean() - correct[:, -1].mean()
    return {
        "saved": 1 - expected_cost(test, kept.costs, *plan) / float(kept.costs.reach[-1]),
        **{f"time_saved_{batch}": time_saved(kept, found, taken, batch) for batch in BATCHES},
        "disagreement": disagreement(test, *plan),
        "risk": realised_risk(test, *plan),
        "risk_of_rest": realised_risk(rest, *plan),
        "saved_of_rest": 1 - expected_cost(rest, kept.costs, *plan) / float(kept.costs.reach[-1]),
        "accuracy_change": float(accuracy),
        "exits": float(len(found.chosen)),
    }


def _chosen(choice: Choice, selected: Records, held_out: Records, kept: Recorded) -> Selection:
    if choice.policy == CERTIFIED:
        return certified(selected, held_out, kept.costs, choice.tolerance, DELTA).selection
    return select(choice.policy, selected, kept.costs, choice.tolerance)


def time_saved(kept: Recorded, found: Selection, taken: np.ndarray, batch: int) -> float:
    """Against the same stages with every exit silent."""
    last = len(kept.costs.head)
    stage = np.array([*found.chosen, last])[taken]
    objective = Objective(batch)
    asked = [index in found.chosen for index in range(last)]
    whole = objective.of(np.full(len(stage), last), (), kept.times)
    return 1 - objective.of(stage, asked, kept.times) / whole


def compared(name: str, splits: int) -> dict[str, Any]:
    """Every choice over many splits of one task's records."""
    jobs = [(name, choice, split) for choice in CHOICES for split in range(splits)]
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("spawn")) as pool:
        outcomes = list(pool.map(judged, *zip(*jobs, strict=True), chunksize=splits))
    rows = []
    for index, choice in enumerate(CHOICES):
        some = [o for o in outcomes[index * splits : (index + 1) * splits] if o is not None]
        told: dict[str, Any] = {**asdict(choice), "splits": len(some)}
        if some:
            told["over_tolerance"] = sum(o["risk"] > choice.tolerance for o in some)
            told["over_tolerance_rest"] = sum(o["risk_of_rest"] > choice.tolerance for o in some)
            told |= {k: {"mean": mean(o[k] for o in some), "sd": stdev(o[k] for o in some)} for k in some[0]}
        rows.append(told)
    return {"task": name, "rows": int(read(name).agrees.shape[0]), "splits": splits, "choices": rows}


def curve(result: dict[str, Any], policy: str) -> np.ndarray:
    """[tolerances, 3] risk realised, compute saved, tolerance: means over splits, by rising risk.

    On certification and test rows: these policies choose on neither, and twice the rows tell twice as well.
    """
    rows = [c for c in result["choices"] if _plain(c, policy)]
    return np.array(sorted((c["risk_of_rest"]["mean"], c["saved_of_rest"]["mean"], c["tolerance"]) for c in rows))


def saved_at(points: np.ndarray, risks: float | np.ndarray) -> np.ndarray:
    """What a `curve` saves at some risks: saving rises about linearly with the risk's logarithm.

    Interpolated along the risk itself a curve that bends would lie too low between two tolerances.
    """
    return np.asarray(np.interp(np.log(risks), np.log(np.maximum(points[:, 0], LEAST)), points[:, 1]))


def at_equal_risk(result: dict[str, Any]) -> list[dict[str, float]]:
    """What `joint` saves, by interpolation over its sweep, where it realises the risk that `geometric` realises."""
    points = curve(result, "joint")
    return [
        {"tolerance": tolerance, "risk": risk, "geometric": won, "joint": float(saved_at(points, risk))}
        for risk, won, tolerance in sorted(curve(result, "geometric").tolist(), key=lambda point: point[2])
        if tolerance in TOLERANCES and points[0, 0] <= risk <= points[-1, 0]
    ]


def mean_over_risks(result: dict[str, Any]) -> tuple[float, float, float]:
    """Means of what `geometric` and `joint` save over the risks both realise up to `MOST`, and the least of these."""
    curves = [curve(result, policy) for policy in ("geometric", "joint")]
    risks = np.linspace(max(c[0, 0] for c in curves), min(MOST, *(c[-1, 0] for c in curves)), 200)
    geometric, joint = (float(saved_at(points, risks).mean()) for points in curves)
    return geometric, joint, float(risks[0])


def _plain(choice: dict[str, Any], policy: str) -> bool:
    return (choice["policy"], choice["kind"], choice["metric"]) == (policy, DISAGREEMENT, "max_probability")


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean ± standard deviation over splits."""
    rows = []
    for result in results:
        for told in result["choices"]:
            if told["tolerance"] not in TOLERANCES:
                continue
            choice = Choice(told["policy"], told["tolerance"], told["kind"], told["metric"])
            name = f"{result['task']}, {choice.describe()} {choice.tolerance:.1%}"
            if not told["splits"]:
                rows.append([name, "too few rows", "", "", "", ""])
                continue
            times = " / ".join(_spread(told[f"time_saved_{batch}"], 1) for batch in BATCHES)
            rows.append(
                [
                    name,
                    f"{_spread(told['saved'], 1)} %",
                    f"{times} %",
                    f"{_spread(told['disagreement'], 2)} %",
                    f"{told['over_tolerance']} / {told['over_tolerance_rest']} of {told['splits']}",
                    _spread(told["accuracy_change"], 2),
                ]
            )
    return markdown(HEAD, rows)


def equal_risk_table(results: Sequence[dict[str, Any]]) -> str:
    """Both policies at the risk that `geometric` realises."""
    rows = [
        [f"{result['task']}, {p['tolerance']:.1%}", percent(p["risk"], 2), percent(p["geometric"]), percent(p["joint"])]
        for result in results
        for p in result["at_equal_risk"]
    ]
    for result in results:
        geometric, joint, least = mean_over_risks(result)
        name = f"{result['task']}, mean over risks"
        rows.append([name, f"{least * 100:.2f} to {percent(MOST, 2)}", percent(geometric), percent(joint)])
    return markdown(EQUAL_HEAD, rows)


def _spread(value: dict[str, float], digits: int) -> str:
    return f"{value['mean'] * 100:.{digits}f} ± {value['sd'] * 100:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=sorted(path.stem for path in FOLDER.glob("*.npz")))
    parser.add_argument("--splits", type=int, default=20)
    args = parser.parse_args()
    told = {"command": "python -m benchmarks.thresholds", "delta": DELTA}
    before = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else []
    results = {result["task"]: result for result in before}
    for name in args.tasks:
        log(f"{name}: {len(CHOICES)} choices over {args.splits} splits")
        result = compared(name, args.splits)
        result |= {"at_equal_risk": at_equal_risk(result), "machine": machine(), "versions": versions()}
        results[name] = result
        ordered = [results[task] for task in sorted(results)]
        RESULTS.write_text(json.dumps({**told, "results": ordered}, indent=1) + "\n")
        replace_block("thresholds", table(ordered))
        replace_block("equal_risk", equal_risk_table(ordered))


if __name__ == "__main__":
    main()
