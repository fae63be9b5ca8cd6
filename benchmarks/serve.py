"""Latency and throughput of `offramp serve` under rising load: an artifact against its plain backbone.

    python -m benchmarks.serve [--tasks resnet56_long sst2] [--rounds 3] [--seconds 10] [--batch 1]
        [--server-core 0] [--client-core 1]

One server process holds both models: ours, compiled with the heads `benchmarks.heads` has trained, and the plain
backbone as an artifact of one stage, so that both run behind the same sockets, queues and batching. The server has one
core (`--workers 1 --threads 1`), its web side included; `benchmarks.load_generator` has the other.

A closed loop finds the plain model's capacity; the rates are multiples of it. At each rate both models are measured,
one right after the other, the order turned every second round. A rate is sustained where in every round no row was
refused and 99 % were answered within half a second; saturation is the highest rate up to which all are. Throughput
under overload, at the highest rate, is beside it, for it depends on no such choice. Batches per stage are those of the
server's own metrics. Medians over rounds; what is spread stands beside them.

Writes benchmarks/results/serve.json after each task, keeping tasks that are not asked for and requests of other sizes,
the README's tables and docs/serve.svg.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.tables import folded, log, markdown, replace_block
from benchmarks.tasks import TASKS, Task, save_rows
from benchmarks.trained import KINDS, WORK, heads_of, made_ready, options_of
from benchmarks.zoo.program import write
from offramp.compiler import finish
from offramp.compiler.emit import SEGMENTS
from offramp.compiler.measure import machine, versions
from offramp.passes import ExitPlan, build_program
from offramp.runtime.artifact import Artifact, open_artifact
from offramp.runtime.table import percent

RESULTS = Path(__file__).parent / "results" / "serve.json"
FIGURE = Path(__file__).parents[1] / "docs" / "serve.svg"
ROOT = Path(__file__).parents[1]
TOLERANCES = {"resnet56": 0.08, "resnet56_long": 0.04, "sst2": 0.01}  # at which about half of the compute is saved
OURS, PLAIN = "ours", "plain"
MULTIPLES = (0.25, 0.5, 0.75, 0.9, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.3, 2.6)  # of the plain model's capacity
QUEUE = 512  # rows of a model that may wait: about a second's, so that a refusal shows within a run
UNDER_WAY = 64  # requests of the closed loop
HALF = 0.5  # of plain's capacity, where latency by exit is shown
ENOUGH = 0.99  # of the rows, answered in time
SERVING = "serving at "


def artifacts(task: Task, kind: str, seed: int) -> tuple[Path, Path]:
    """Ours and the plain backbone, made once and then taken up again; so are heads trained before."""
    ours, plain = (WORK / f"serve-{task.name}-{kind}-{model}" for model in (OURS, PLAIN))
    if ours.is_dir() and plain.is_dir():
        return ours, plain
    options = options_of(task, kind, seed=seed, targets=(SEGMENTS,), rounds=1)
    ready = made_ready(task, options)
    heads = heads_of(task, ready, options, kind)
    # Only now: heads searched for at another tolerance are others.
    finish(ready, heads, ours, replace(options, tolerance=TOLERANCES[task.name]), log)
    write(build_program(ready.backbone, ExitPlan(()), {}), (SEGMENTS,), plain)
    return ours, plain


@contextlib.contextmanager
def serving(models: Mapping[str, Path], core: int, said: Path) -> Iterator[str]:
    """A server on one core, in a process of its own, its stderr in the file `said` -> its URL."""
    named = [f"{name}={path}" for name, path in models.items()]
    command = ["taskset", "-c", str(core), sys.executable, "-m", "offramp.runtime", "serve", *named, "--port", "0"]
    command += ["--workers", "1", "--threads", "1", "--queue-rows", str(QUEUE)]
    with (
        said.open("w") as errors,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            url = next((line for line in process.stdout if line.startswith(SERVING)), None)
            if url is None:
                raise RuntimeError(f"the server did not start: {said.read_text()}")
            yield url.removeprefix(SERVING).strip()
        finally:
            process.terminate()


def loaded(url: str, core: int, rows: Path, model: str, **more: Any) -> dict[str, Any]:
    """One run of the load generator on its own core -> what it says."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "told.json"
        given = [f"--{name}={value}" for name, value in {"url": url, "model": model, "rows-file": rows, **more}.items()]
        command = ["taskset", "-c", str(core), sys.executable, "-m", "benchmarks.load_generator", *given]
        subprocess.run([*command, f"--out={out}"], check=True, cwd=ROOT)
        told: dict[str, Any] = json.loads(out.read_text())
    return told


def stages(url: str, model: str) -> dict[int, np.ndarray]:
    """By stage: [3] calls so far, their rows, and the seconds they took."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    wanted = {"offramp_batch_rows_count": 0, "offramp_batch_rows_sum": 1, "offramp_stage_seconds_sum": 2}
    found: dict[int, np.ndarray] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name in wanted and one.labels["model"] == model:
                found.setdefault(int(one.labels["stage"]), np.zeros(3))[wanted[one.name]] = one.value
    return dict(sorted(found.items()))


def point(url: str, core: int, rows: Path, model: str, **more: Any) -> dict[str, Any]:
    """One model under one load, with what its stages did meanwhile."""
    before = stages(url, model)
    told = loaded(url, core, rows, model, **more)
    did = {index: now - before.get(index, np.zeros(3)) for index, now in stages(url, model).items()}
    whole = told["warm"] + told["seconds"]
    told["mean_batch"] = [float(rows_ / calls) if calls else 0.0 for calls, rows_, _ in did.values()]
    told["stage_share"] = float(sum(seconds for _, _, seconds in did.values())) / whole  # of the core's time
    return told


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One task: artifacts, capacity, then all rates in rounds."""
    task = TASKS[name](args.seed)
    paths = dict(zip((OURS, PLAIN), artifacts(task, args.kind, args.seed), strict=True))
    test = np.array_split(task.judged, 2)[1]  # as `made_ready` parts them
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npz"
        save_rows(rows, task.rows.take(test))
        with serving(paths, args.server_core, Path(folder) / "said.txt") as url:
            common = {"batch": args.batch, "seconds": args.seconds}
            found = {
                model: loaded(url, args.client_core, rows, model, closed=UNDER_WAY, **common)["throughput"]
                for model in (PLAIN, OURS)
            }
            log(f"{name}: closed loop {found[PLAIN]:.0f} rows a second plain, {found[OURS]:.0f} ours")
            rates = [found[PLAIN] * multiple / args.batch for multiple in args.multiples]
            points = []
            for index in range(args.rounds):
                for rate, multiple in zip(rates, args.multiples, strict=True):
                    for model in (PLAIN, OURS) if index % 2 else (OURS, PLAIN):
                        one = point(url, args.client_core, rows, model, rate=rate, seed=args.seed + index, **common)
                        points.append({"round": index, "multiple": multiple, **one})
                    log(f"{name}, round {index}: {multiple} times {found[PLAIN]:.0f} rows a second")
    return {
        "task": name, "kind": args.kind, "machine": machine(), "versions": versions(), "seed": args.seed,
        "rounds": args.rounds, "batch": args.batch, "cores": {"server": args.server_core, "client": args.client_core},
        "under_way": UNDER_WAY, "queue_rows": QUEUE, "closed_loop": found, **described(open_artifact(paths[OURS])),
        "points": points, "load": os.getloadavg()[2],
    }  # fmt: skip


def described(artifact: Artifact) -> dict[str, Any]:
    """What is said of an artifact beside its times."""
    manifest = artifact.manifest
    evaluation, plan = manifest.evaluation, manifest.plans[manifest.default_plan]
    return {
        "tolerance": plan.tolerance,
        "thresholds": plan.thresholds,
        "flops_saved": 1 - evaluation.flops / evaluation.flops_backbone,
        "exit_rates": [exit_.exit_rate for exit_ in evaluation.exits],
        "disagreement": evaluation.disagreement,
    }


def title(result: Mapping[str, Any]) -> str:
    """What the tables call it."""
    each = result["batch"]
    return result["task"] if each == 1 else f"{result['task']}, {each} rows a request"


def at_rate(result: Mapping[str, Any], model: str, multiple: float) -> list[Mapping[str, Any]]:
    """One model's points at one rate, one of each round."""
    return [one for one in result["points"] if one["model"] == model and one["multiple"] == multiple]


def multiples(result: Mapping[str, Any]) -> list[float]:
    """The rates, ascending."""
    return sorted({one["multiple"] for one in result["points"]})


def sustained(points: Sequence[Mapping[str, Any]]) -> bool:
    """Whether in every round none was refused or failed, and enough were answered in time."""
    return all(one["in_time"] >= ENOUGH * one["rows"] and not one["refused"] and not one["failed"] for one in points)


def saturation(result: Mapping[str, Any], model: str) -> float:
    """Rows a second offered at the highest rate up to which all are sustained; 0 where none is."""
    best = 0.0
    for multiple in multiples(result):
        points = at_rate(result, model, multiple)
        if not sustained(points):
            break
        best = median(one["offered"] for one in points)
    return best


def overload(result: Mapping[str, Any], model: str) -> list[float]:
    """Answers a second at the highest rate, one number for each round."""
    return [one["throughput"] for one in at_rate(result, model, multiples(result)[-1])]


def saturation_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Rows a second that each sustains, and answers under overload, median and range over rounds."""
    lines = []
    for result in results:
        best = {model: saturation(result, model) for model in (PLAIN, OURS)}
        over = {model: overload(result, model) for model in (PLAIN, OURS)}
        ratios = [ours / plain for ours, plain in zip(over[OURS], over[PLAIN], strict=True)]
        lines.append([
            title(result), percent(result["tolerance"]), percent(result["flops_saved"]),
            *(f"{best[model]:.0f}" for model in (PLAIN, OURS)),
            f"{best[OURS] / best[PLAIN]:.2f}" if best[PLAIN] else "",
            *(f"{median(over[model]):.0f}" for model in (PLAIN, OURS)),
            f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        ])  # fmt: skip
    head = (
        "task", "tolerance", "FLOPs saved", "plain sustains", "ours sustains", "ratio", "plain, overload",
        "ours, overload", "ratio",
    )  # fmt: skip
    return markdown(head, lines)


def latency_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds at each rate, and rows in a stage's batch, medians over rounds."""
    lines = []
    for result in results:
        for multiple in multiples(result):
            plain, ours = (at_rate(result, model, multiple) for model in (PLAIN, OURS))
            lines.append([
                f"{title(result)}, {multiple:g}", f"{median(one['offered'] for one in plain):.0f}",
                *(across(one["latency_ms"] for one in points) for points in (plain, ours)),
                across(one["exits"].get("0", {}) for one in ours),
                *(f"{median(one['refused'] / one['rows'] for one in points):.0%}" for points in (plain, ours)),
                *(batches(points) for points in (plain, ours)),
            ])  # fmt: skip
    head = (
        "task, times plain's capacity", "rows/s", "plain p50 / p95 / p99", "ours p50 / p95 / p99",
        "ours, rows of the first exit", "plain refused", "ours refused", "plain batch", "ours batch by stage",
    )  # fmt: skip
    return markdown(head, lines)


def exit_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds to the rows of each exit at half of the plain model's capacity, medians over rounds."""
    lines = []
    for result in results:
        quiet = min(multiples(result), key=lambda multiple: abs(multiple - HALF))
        plain, ours = (at_rate(result, model, quiet) for model in (PLAIN, OURS))
        for index, rate in enumerate(result["exit_rates"]):
            seen = across(one["exits"].get(str(index), {}) for one in ours)
            lines.append([f"{title(result)}, exit {index}", percent(rate), seen])
        lines.append([f"{title(result)}, plain", "", across(one["latency_ms"] for one in plain)])
    return markdown(("answered by, at half of plain's capacity", "of the test rows", "p50 / p95 / p99"), lines)


def across(latencies: Iterable[Mapping[str, float]]) -> str:
    """Quantiles of latency, medians over rounds; nothing where no row was answered."""
    seen = [each for each in latencies if "p50" in each]
    return " / ".join(f"{median(each[q] for each in seen):.1f}" for q in ("p50", "p95", "p99")) if seen else ""


def batches(points: Sequence[Mapping[str, Any]]) -> str:
    """Mean rows in a batch by stage, medians over rounds; a stage that no row reached in a round is left out there."""
    depth = max(len(one["mean_batch"]) for one in points)
    each = [[one["mean_batch"][i] for one in points if i < len(one["mean_batch"])] for i in range(depth)]
    return " / ".join(f"{median(values):.1f}" for values in each)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's block."""
    exits = folded("Latency by exit, milliseconds", exit_table(results))
    rates = folded("Latency, refusals and batch sizes at every rate of requests", latency_table(results))
    return f"{saturation_table(results)}\n\n{exits}\n\n{rates}"


def plot(results: Sequence[Mapping[str, Any]]) -> None:
    """Latency, and answers a second, over the rate offered."""
    matplotlib.rcParams["svg.hashsalt"] = "serve"  # the same figures, the same file
    figure, panels = plt.subplots(2, len(results), figsize=(5 * len(results), 6), squeeze=False, layout="constrained")
    for column, result in enumerate(results):
        above, below = panels[:, column]
        for color, model in zip(("C7", "C0"), (PLAIN, OURS), strict=True):
            points = [at_rate(result, model, multiple) for multiple in multiples(result)]
            offered = [median(one["offered"] for one in each) for each in points]
            for quantile, style in (("p50", "-"), ("p99", ":")):
                curve(above, offered, [[one["latency_ms"].get(quantile, np.nan) for one in each] for each in points],
                      f"{model}, {quantile}", style, color)  # fmt: skip
            if model == OURS:
                early = [[one["exits"].get("0", {}).get("p50", np.nan) for one in each] for each in points]
                curve(above, offered, early, "ours, first exit, p50", "--", "C2")
            curve(below, offered, [[one["throughput"] for one in each] for each in points], model, "-", color)
        above.set_yscale("log")
        above.set_title(f"{title(result)}, {percent(result['flops_saved'])} of the FLOPs saved")
        below.set_xlabel("rows offered a second")
    panels[0, 0].set_ylabel("latency, ms")
    panels[1, 0].set_ylabel("answers a second")
    panels[0, 0].legend(frameon=False)
    figure.savefig(FIGURE, metadata={"Date": None})
    plt.close(figure)


def curve(
    axes: Any, offered: Sequence[float], seen: Sequence[Sequence[float]], label: str, style: str, color: str
) -> None:
    """Medians over rounds, with their range behind."""
    axes.plot(offered, [median(each) for each in seen], style, marker=".", color=color, label=label)
    axes.fill_between(offered, [min(each) for each in seen], [max(each) for each in seen], color=color, alpha=0.15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TOLERANCES), default=list(TOLERANCES))
    parser.add_argument("--kind", choices=KINDS, default="searched")
    parser.add_argument("--multiples", nargs="+", type=float, default=list(MULTIPLES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--batch", type=int, default=1, help="rows of a request")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    before = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else []
    results = {title(result): result for result in before}
    for name in args.tasks:
        result = measured(name, args)
        results[title(result)] = result
        ordered = sorted(results.values(), key=lambda result: (list(TASKS).index(result["task"]), result["batch"]))
        RESULTS.write_text(json.dumps({"command": "python -m benchmarks.serve", "results": ordered}, indent=1) + "\n")
        replace_block("serve", table(ordered))
        plot(ordered)


if __name__ == "__main__":
    main()
