"""Many models in one budget of memory: which policy answers soonest, segment by segment or a model as a whole.

    python -m benchmarks.cache_trace [--artifacts A B C] [--models 12] [--share 3] [--requests 2000] [--exponent 1.0]

Models m00, m01, ... are copies of a few artifacts, in a budget that holds a third of the bytes that all of them were
measured to take. Requests of one row are drawn by Zipf's law, which model is how popular by the seed, and served in
turn by walking the stages through `ModelHost`: real test rows, real thresholds, a row that leaves early needs no deeper
stage. A stage that is not in memory is waited for. The clock runs from asking to the answer.

Each seed gives one trace, which every policy and unit serves in a host of its own, the order turned by one. Serving
begins when the host has filled its budget. Files are in the system's cache, so loading is parsing and laying out
weights, not the disk. Without --artifacts those of --tasks are compiled with the heads that `benchmarks.heads` has
trained. Writes benchmarks/results/cache_trace.json and the README's table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np

from benchmarks.tables import log, markdown, replace_block
from benchmarks.tasks import TASKS, save_rows
from benchmarks.trained import WORK, heads_of, made_ready, options_of
from offramp.compiler import finish
from offramp.compiler.measure import machine, versions
from offramp.runtime import load, open_artifact
from offramp.runtime.execution import ASK, carry
from offramp.runtime.serve.host import ModelHost, PolicyName, Unit
from offramp.runtime.serve.work import Silent
from offramp.runtime.table import percent

RESULTS = Path(__file__).parent / "results" / "cache_trace.json"
ROWS = 256  # of each task, among which requests choose
QUIET = 1.0  # seconds without a loading after which a host has filled its budget
PROVIDERS = ["CPUExecutionProvider"]
HEAD = (
    "loaded by", "policy", "served without waiting", "mean ms", "median ms", "p95 ms", "stages loaded", "MiB loaded",
)  # fmt: skip
FIGURES = ("hit_rate", "mean_ms", "median_ms", "p95_ms", "stages", "bytes")
_YES = np.array(True)


@dataclass(frozen=True)
class Served:
    """One artifact, rows to ask it about, and the exits they leave at."""

    path: str
    rows: dict[str, np.ndarray]  # by input, [ROWS, ...]
    exits: np.ndarray  # [ROWS]


class Loadings(Silent):
    """Counts what is loaded."""

    def __init__(self) -> None:
        self.stages = self.bytes = 0

    def loaded(self, model: str, stage: int, seconds: float, bytes: int) -> None:
        self.stages += 1
        self.bytes += bytes


def compiled(name: str, seed: int, threads: int) -> Path:
    """The task's artifact of stages; made of the heads trained before, unless it is there."""
    out = WORK / f"cache-{name}"
    if out.exists():
        return out
    task = TASKS[name](seed)
    options = options_of(task, "searched", seed=seed, threads=threads, batches=(), targets=("onnx-segments",))
    ready = made_ready(task, options)
    finish(ready, heads_of(task, ready, options, "searched"), out, options, log)
    return out


def some_rows(name: str, seed: int) -> dict[str, np.ndarray]:
    """Rows of a task that its artifact's heads have not learned from, kept in a file: some tasks take long to read."""
    file = WORK / f"cache-rows-{name}-{seed}.npz"
    if not file.exists():
        task = TASKS[name](seed)
        picked = np.random.default_rng([seed, 5]).choice(task.judged, ROWS, replace=len(task.judged) < ROWS)
        save_rows(file, task.rows.take(picked))
    with np.load(file) as kept:
        return {key: kept[key] for key in kept.files}


def served(path: Path, seed: int) -> Served:
    """An artifact with rows of the task it was compiled for, which its backbone is named after."""
    rows = some_rows(open_artifact(path).manifest.backbone.name, seed)
    with load(path, providers=PROVIDERS, threads=1) as session:
        exits = [session.run({key: values[at : at + 1] for key, values in rows.items()}).exits for at in range(ROWS)]
    return Served(str(path), rows, np.concatenate(exits))


def trace(models: int, requests: int, exponent: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """-> the model and the row of every request, [requests] each."""
    draw = np.random.default_rng(seed)
    shares = 1 / np.arange(1, models + 1) ** exponent
    ranked = draw.permutation(models)
    return ranked[draw.choice(models, requests, p=shares / shares.sum())], draw.integers(0, ROWS, requests)


def settle(loadings: Loadings) -> None:
    """Wait until the host loads nothing more of its own."""
    before = -1
    while before != loadings.stages:
        before = loadings.stages
        time.sleep(QUIET)


def total_bytes(paths: Mapping[str, str]) -> int:
    """What all stages of all models take together."""
    loadings = Loadings()
    host = ModelHost(paths, providers=PROVIDERS, observer=loadings)
    while not all(state.loaded for state in host.segments()):
        time.sleep(QUIET)
    size = host.memory()
    host.close()
    return size


class Client:
    """Asks a host about one row at a time, and waits for what it has to load."""

    def __init__(self, host: ModelHost) -> None:
        self._host = host
        self._changed = threading.Event()
        host.listen(self._changed.set)

    def ask(self, name: str, row: Mapping[str, np.ndarray]) -> tuple[int, bool]:
        """A model and a row [1, ...] by input -> the exit it leaves at, and whether a stage was waited for."""
        version = self._host.hold(name)
        limits = (*version.manifest.thresholds(), -math.inf)
        live, waited = dict(row), False
        for index, limit in enumerate(limits):
            stage = version.take(index)
            while stage is None:
                self._changed.wait()
                self._changed.clear()  # before it is tried, or what happens between the two is missed
                stage, waited = version.take(index), True
            feed = {key: live[key] for key in stage.inputs}
            if stage.asks:
                feed[ASK] = _YES
            values = stage.session.run(stage.fetched, feed)
            version.give(index)
            if values[-1].item() >= limit:
                version.release()
                return index, waited
            live = carry(stage, live, values[:-2])
        raise AssertionError("the last exit answers every row")


def run(
    models: Mapping[str, Served], budget: int, policy: PolicyName, unit: Unit, requests: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """One trace served by one policy."""
    loadings, names = Loadings(), list(models)
    paths = {name: model.path for name, model in models.items()}
    host = ModelHost(paths, budget=budget, policy=policy, unit=unit, providers=PROVIDERS, observer=loadings)
    settle(loadings)
    before, client = (loadings.stages, loadings.bytes), Client(host)
    seconds, waits = [], 0
    for which, row in zip(*requests, strict=True):
        model = models[names[which]]
        batch = {key: values[row : row + 1] for key, values in model.rows.items()}
        start = time.perf_counter()
        exit_, waited = client.ask(names[which], batch)
        seconds.append(time.perf_counter() - start)
        waits += waited
        if exit_ != model.exits[row]:
            raise AssertionError(f"{names[which]}: row {row} left at exit {exit_}, elsewhere at {model.exits[row]}")
    host.close()
    each = np.array(seconds) * 1e3
    return {
        "policy": policy, "unit": unit, "hit_rate": 1 - waits / len(each), "mean_ms": float(each.mean()),
        "median_ms": float(np.median(each)), "p95_ms": float(np.quantile(each, 0.95)),
        "stages": loadings.stages - before[0], "bytes": loadings.bytes - before[1],
    }  # fmt: skip


def measured(artifacts: Sequence[Path], args: argparse.Namespace) -> dict[str, Any]:
    """All policies and units on the traces of all seeds."""
    kinds = [served(path, args.seeds[0]) for path in artifacts]
    models = {f"m{index:02d}": kinds[index % len(kinds)] for index in range(args.models)}
    total = total_bytes({name: model.path for name, model in models.items()})
    told: dict[str, Any] = {
        "command": "python -m benchmarks.cache_trace", "machine": machine(), "versions": versions(),
        "artifacts": [path.name for path in artifacts], "models": args.models, "bytes": total,
        "budget": total // args.share, "requests": args.requests, "exponent": args.exponent, "seeds": args.seeds,
        "exit_shares": [(np.bincount(kind.exits) / ROWS).tolist() for kind in kinds],
    }  # fmt: skip
    sides = list(itertools.product(get_args(Unit), get_args(PolicyName)))
    runs = []
    for turn, seed in enumerate(args.seeds):
        requests = trace(args.models, args.requests, args.exponent, seed)
        for side in np.roll(np.arange(len(sides)), turn):
            unit, policy = sides[side]
            runs.append({"seed": seed, **run(models, told["budget"], policy, unit, requests)})
            log(f"seed {seed}, {unit}, {policy}: {runs[-1]}")
    told["sides"] = [summary(unit, policy, runs) for unit, policy in sides]
    return {**told, "runs": runs, "load": os.getloadavg()[2]}


def summary(unit: str, policy: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over seeds, and the least and the most."""
    own = [one for one in runs if one["unit"] == unit and one["policy"] == policy]
    told: dict[str, Any] = {"unit": unit, "policy": policy}
    for figure in FIGURES:
        values = [one[figure] for one in own]
        told |= {figure: median(values), f"{figure}_spread": [min(values), max(values)]}
    return told


def table(told: Mapping[str, Any]) -> str:
    """The README's table and the sentence before it."""
    rows = [
        (
            side["unit"], side["policy"], _spread(side, "hit_rate", percent),
            *(_spread(side, f"{name}_ms", lambda value: f"{value:.1f}") for name in ("mean", "median", "p95")),
            f"{side['stages']:.0f}", f"{side['bytes'] / 2**20:.0f}",
        )
        for side in told["sides"]
    ]  # fmt: skip
    copies = ", ".join(name.removeprefix("cache-") for name in told["artifacts"])
    return (
        f"{told['models']} models, copies of {copies}, which take {told['bytes'] / 2**20:.0f} MiB, in a budget of "
        f"{told['budget'] / 2**20:.0f} MiB; {told['requests']} requests of one row, Zipf {told['exponent']:g}; medians "
        f"over {len(told['seeds'])} seeds (least to most):\n\n{markdown(HEAD, rows)}"
    )


def _spread(side: Mapping[str, Any], figure: str, said: Callable[[float], str]) -> str:
    low, high = side[f"{figure}_spread"]
    return f"{said(side[figure])} ({said(low)} to {said(high)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", nargs="+", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["resnet20", "resnet56", "sst2"])
    parser.add_argument("--models", type=int, default=12)
    parser.add_argument("--share", type=int, default=3, help="the budget holds one in so many bytes")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    artifacts = args.artifacts or [compiled(name, 0, threads=1) for name in args.tasks]
    told = measured(artifacts, args)
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    replace_block("cache_trace", table(told))


if __name__ == "__main__":
    main()
