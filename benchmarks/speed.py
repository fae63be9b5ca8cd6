"""How long an artifact takes in each of its forms, against the plain backbone and whatever else a person could run.

    python -m benchmarks.speed [--tasks resnet20 resnet56 sst2 resnet50] [--batches 1 2 4 8 16 32 64 128]
        [--kind searched] [--epochs 30] [--earlyon DIR] [--own-pools] [--add]

    plain        the backbone in ONNX Runtime: what all others are divided by
    rewritten    the same, without exits, written for ONNX Runtime as our stages are: no early exit's merit
    segments     the artifact, one model per stage
    single file  the artifact's `model.onnx`, in the same session class
    TorchScript  the artifact's `model.ts`, in PyTorch
    by FLOPs     segments of an artifact whose exits were chosen by FLOPs, the compiler's default, instead
    ideal        the sum over stages of the stage's own time on the rows that reach it; answers nothing
    no exit      segments with infinite thresholds: no row leaves, and heads that need not be asked are not
    none leaves  segments with thresholds above 1: every head is asked and no row leaves
    heads alone  what the heads take of that: all stages in turn asked for their answers, less all not asked
    eager        the backbone in PyTorch
    earlyon      see `benchmarks.speed_rivals`; DIR is what `pip install --no-deps --target DIR earlyon==0.3.0` filled
    at 2 %       segments at that tolerance instead, and earlyon asked for as much loss
    smaller      ResNet-20 in ONNX Runtime in place of ResNet-56

Artifacts are compiled at 1 % with the heads `benchmarks.heads` has trained, exits chosen for speed: by `--cost time
--cost-batch 1`, on this machine. All variants run in one process with the same number of threads; all ONNX Runtime
sessions on one pool of them, as `share_threads` makes it, or with --own-pools each on its own, as without that call. In
every round each answers the same batches of test rows, the order turned by one and every second time backwards, each
after a rest and a small batch that is not counted, until every row's class is known; ratios are taken within a round,
those to the ideal too. There are at least 30 rounds, and at most 300 or six minutes: after two minutes, once we know
whether a batch that nothing leaves costs 2 % beyond the heads, or what it costs to 1 %. After every ten all of ours and
ONNX Runtime's are made anew: one that was unlucky with where its memory lies stays some percent slower, so what the
rounds can tell is worked out from these tens. The README shows some batches, the JSON file and the plot all. Every
variant's disagreement with the backbone, change in accuracy and exits over all test rows stand beside its times. Peak
memory is that of a fresh process which loads one form and answers batches of 32, above numpy, onnxruntime and the rows;
"weights beside" is `model.onnx` saved again by `onnx.save_model(..., save_as_external_data=True)`, in a plain session.
Writes benchmarks/results/speed.json after each batch size, keeping tasks that are not asked for, the README's tables
and docs/speed.svg. With --add the artifacts that the last run compiled are taken up, and only the batch sizes asked for
are timed, beside or in place of those it timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cifar10_resnet import backbone_of
from benchmarks.speed_memory import memory
from benchmarks.speed_rivals import PROVIDERS, Answered, Batch, Variant, called, eager, earlyon, in_onnxruntime
from benchmarks.speed_tables import plot, tables, title
from benchmarks.tables import log, replace_block
from benchmarks.tasks import TASKS, Task
from benchmarks.trained import KINDS, WORK, heads_of, made_ready, options_of
from offramp.compiler import ALL_TARGETS, Ready, Training, capture, finish
from offramp.compiler.costs import FLOPS, TIME
from offramp.compiler.emit import SCRIPT, SEGMENTS, backbone_model
from offramp.compiler.measure import Bench, machine, versions
from offramp.compiler.stream import tensors
from offramp.runtime import Answers, load, share_threads
from offramp.runtime.artifact import Artifact, open_artifact
from offramp.runtime.engine import ModelBytes
from offramp.runtime.execution import ASK, CONFIDENCE, PROBABILITIES

Opened = Callable[[], dict[str, Variant]]

RESULTS = Path(__file__).parent / "results" / "speed.json"
RIVALLED = ("resnet20", "resnet56", "resnet56_long")  # by earlyon
SMALLER = {"resnet56": "resnet20", "resnet56_long": "resnet20"}
TOGETHER, WARM = 10, 2  # rounds with the same sessions, and those before them that are not counted
REST = 0.01  # seconds; PyTorch's threads wait for more work as long, on the cores of whoever comes next
WARM_ROWS = 8  # that each answers before its time is taken, for its weights and threads to be at hand
SECONDS = 0.05  # of the plain backbone in a round, or more for so many calls, or one call
CALLS, MORE_SECONDS = 4, 0.3
LONG, LONGEST = 120, 360  # seconds of rounds: before we ask whether they are enough, and at most
MORE_ROUNDS = 10  # at most so many times the least
WIDER = 0.02  # a tolerance, beside earlyon
WANTED, SURE = 1.02, 0.01  # of the plain backbone's time, when nothing leaves and heads are taken off
DRAWS = 2000  # of the bootstrap
JUDGED = 32  # rows at a time where the batch does not matter


def compiled(task: Task, args: argparse.Namespace) -> tuple[Ready, Artifact, Artifact]:
    """The task's artifact in all forms, and one chosen by FLOPs; heads trained before are taken up."""
    options = options_of(
        task, args.kind, args.epochs, seed=args.seed, threads=args.threads, targets=ALL_TARGETS, rounds=1, cost=TIME
    )
    ready = made_ready(task, options)
    out = WORK / f"speed-{task.name}-{args.kind}"
    by_flops = out.with_name(f"{out.name}-flops")
    if not args.add:
        heads = heads_of(task, ready, options, args.kind)
        finish(ready, heads, out, options, log)
        finish(ready, heads, by_flops, replace(options, cost=FLOPS, targets=(SEGMENTS,)), log)
    return ready, open_artifact(out), open_artifact(by_flops)


def ours(
    models: Mapping[str, ModelBytes], artifact: Artifact, by_flops: Artifact, threads: int, wider: bool
) -> dict[str, Variant]:
    """Models without exits, the artifact in its forms, their ideal, segments that nothing leaves, those by FLOPs.

    If `wider`, segments at a wider tolerance too.
    """
    bench = Bench(artifact, models["plain"], threads)
    other = load(by_flops.path, providers=PROVIDERS, threads=threads)
    whole = load(artifact.path, providers=PROVIDERS, threads=threads, executor="single-file")
    script = torch.jit.load(str(artifact.path / SCRIPT))  # type: ignore[no-untyped-call]
    never, asked = ([limit] * (len(artifact.manifest.exits) - 1) for limit in (math.inf, 2.0))
    names = [spec.name for spec in artifact.manifest.inputs]

    def scripted(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            probabilities, exits = script(*(torch.from_numpy(batch[name]) for name in names))
        return probabilities.numpy(), exits.numpy()

    def read(answers: Answers) -> Answered:
        return answers.classes, answers.exits

    return {
        **{name: in_onnxruntime(model, name, threads) for name, model in models.items()},
        "segments": called(bench.session.run, read),
        **({"wider": called(lambda batch: bench.session.run(batch, tolerance=WIDER), read)} if wider else {}),
        "by_flops": called(other.run, read),
        "single_file": called(whole.run, read),
        "torchscript": called(scripted, lambda given: (given[0].argmax(1), given[1])),
        "ideal": Variant(lambda work: sum(bench.stages_alone(work))),
        "no_exit": called(lambda batch: bench.session.run(batch, thresholds=never), read),
        "none_leaves": called(lambda batch: bench.session.run(batch, thresholds=asked), read),
        "heads_alone": Variant(lambda work: sum(heads_alone(bench, batch) for batch in work)),
    }


def without_exits(name: str, ready: Ready) -> dict[str, ModelBytes]:
    """The plain backbone as exported, the same rewritten as stages are, and the smaller one where there is one."""
    assert ready.plain is not None
    models = {"plain": ready.plain, "rewritten": backbone_model(ready.backbone, blocks=True)}
    if name in SMALLER:
        example = tensors(ready.rows, ready.splits.test[:8])
        models["smaller"] = backbone_model(capture(backbone_of(SMALLER[name]), example, name=SMALLER[name]))
    return models


def heads_alone(bench: Bench, batch: Batch) -> float:
    """Seconds of all heads on all rows: the chain of stages asked, less the chain not asked.

    Not stage by stage, the same one twice: the second time it finds its weights and values in the caches, as no batch
    that is answered does.
    """
    return _chain(bench, batch, ask=True) - _chain(bench, batch, ask=False)


def _chain(bench: Bench, batch: Batch, ask: bool) -> float:
    """Seconds of all stages with an exit of their own but the last, every row going through all of them."""
    seconds, live = 0.0, batch
    for session, spec in zip(bench.stages[:-1], bench.specs, strict=False):
        kept = [name for name in spec.outputs if name in spec.carries]
        outputs = [*kept, PROBABILITIES, CONFIDENCE] if ask else kept
        feed = {name: live[name] for name in session.inputs if name != ASK}
        if ASK in session.inputs:
            feed[ASK] = np.array(ask)
        start = time.perf_counter()
        values = session.run(outputs, feed) if outputs else []
        seconds += time.perf_counter() - start
        known = {**live, **dict(zip(kept, values, strict=False))}
        live = {name: known[name] for name in spec.carries}
    return seconds


def answered(variant: Variant, ready: Ready, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes and exits of all test rows, `batch` at a time."""
    assert variant.answer is not None
    test = ready.splits.test
    given = [variant.answer(ready.rows.take(test[at : at + batch])) for at in range(0, len(test), batch)]
    exits = [np.broadcast_to(exits, len(classes)) for classes, exits in given]
    return np.concatenate([classes for classes, _ in given]), np.concatenate(exits)


def judged(variant: Variant, ready: Ready, batch: int, truth: np.ndarray) -> dict[str, Any]:
    """What it answers on the test rows, where the backbone answers `truth`."""
    classes, exits = answered(variant, ready, batch)
    assert ready.rows.labels is not None
    labels = ready.rows.labels[ready.splits.test]
    return {
        "disagreement": float((classes != truth).mean()),
        "accuracy_change": float((classes == labels).mean() - (truth == labels).mean()),
        "exit_shares": (np.bincount(exits) / len(exits)).tolist(),
    }


def timed(opened: Opened, ready: Ready, batch: int, rounds: int, seed: int) -> dict[str, Any]:
    """All variants at one batch size: milliseconds per row and ratios to plain, medians and quartiles over rounds."""
    generator, test = np.random.default_rng([seed, batch]), ready.splits.test

    def draw(calls: int) -> list[Batch]:
        picked = [generator.choice(test, batch, replace=len(test) < batch) for _ in range(calls)]
        return [dict(ready.rows.take(rows)) for rows in picked]

    calls = _calls(opened()["plain"], draw(3))
    told = _rounds(opened, lambda: draw(calls), rounds)
    of = _by_variant(told)
    variants = {
        name: {**_spread("ms", taken * 1e3 / (calls * batch)), **_spread("ratio", taken / of["plain"])}
        for name, taken in of.items()
    }
    limits = {name: ("over_ideal", of[name] / of["ideal"]) for name in ("segments", "single_file")}
    for name, (key, values) in {**limits, "none_leaves": ("beyond_heads", _beyond_heads(of))}.items():
        variants[name] |= {**_spread(key, values), f"{key}_error": error(values)}
    return {"batch": batch, "calls": calls, "rounds": len(told), "variants": variants}


def _calls(plain: Variant, some: Sequence[Batch]) -> int:
    """In a round."""
    plain.seconds(some)
    each = plain.seconds(some) / len(some)
    return int(np.clip(SECONDS / each, max(1, min(CALLS, MORE_SECONDS / each)), 256))


def _rounds(opened: Opened, draw: Callable[[], list[Batch]], rounds: int) -> list[dict[str, float]]:
    """Seconds of each variant, round by round: at least so many, and more until what nobody's leaving costs is sure."""
    start, told = time.monotonic(), list[dict[str, float]]()
    while True:
        told += _rounds_of(opened(), draw, len(told))
        spent = time.monotonic() - start
        sure = spent > LONG and _is_sure(_beyond_heads(_by_variant(told)))
        if len(told) >= rounds and (sure or spent > LONGEST or len(told) >= rounds * MORE_ROUNDS):
            return told


def _rounds_of(variants: Mapping[str, Variant], draw: Callable[[], list[Batch]], first: int) -> list[dict[str, float]]:
    """The same of some that were opened together, the `first` round and those after it."""
    told, names = [], list(variants)
    for index in range(first - WARM, first + TOGETHER):
        work = draw()
        few = [{name: values[:WARM_ROWS] for name, values in work[0].items()}]
        seconds = {}
        turned = names[index % len(names) :] + names[: index % len(names)]
        for name in turned if index % 2 else reversed(turned):
            time.sleep(REST)
            variants[name].seconds(few)
            seconds[name] = variants[name].seconds(work)
        told.append(seconds)
    return told[WARM:]


def _by_variant(told: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([seconds[name] for seconds in told]) for name in told[0]}


def _beyond_heads(of: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a batch that nothing leaves takes less the heads, over the plain backbone, round by round."""
    beyond: np.ndarray = (of["none_leaves"] - of["heads_alone"]) / of["plain"]
    return beyond


def _is_sure(beyond: np.ndarray) -> bool:
    """Whether we know of what is wanted below `WANTED` that it is, that it is not, or what it is to `SURE`."""
    unsure = error(beyond)
    return unsure <= SURE or abs(float(np.median(beyond)) - WANTED) > unsure


def error(values: np.ndarray) -> float:
    """Half of what holds 95 % of the medians, were other sessions drawn: rounds of the same sessions are no new ones.

    The bootstrap over those that were opened together [Efron 1979, "Bootstrap methods: another look at the jackknife"].
    """
    opened = values.reshape(-1, TOGETHER)
    drawn = np.random.default_rng(0).integers(len(opened), size=(DRAWS, len(opened)))
    low, high = np.quantile(np.median(opened[drawn].reshape(DRAWS, -1), axis=1), (0.025, 0.975))
    return float(high - low) / 2


def _spread(name: str, values: np.ndarray) -> dict[str, Any]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {name: middle, f"{name}_quartiles": [low, high]}


def measured(name: str, args: argparse.Namespace, before: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One task: compile, judge, time; its result after every batch size. `before` are results by their titles."""
    task = TASKS[name](args.seed)
    ready, artifact, by_flops = compiled(task, args)
    manifest = artifact.manifest
    rivalled = name in RIVALLED and args.earlyon is not None and len(manifest.exits) > 1
    opened = functools.partial(ours, without_exits(name, ready), artifact, by_flops, args.threads, rivalled)
    variants = opened()
    truth, _ = answered(variants["plain"], ready, JUDGED)
    told: dict[str, Any] = {
        "task": name, "kind": args.kind, "own_pools": args.own_pools, "machine": machine(), "versions": versions(),
        "seed": args.seed, "threads": args.threads, "rounds": args.rounds, "test_rows": len(truth),
        "plan": json.loads(json.dumps(asdict(manifest.plans[manifest.default_plan]))),  # as a result before has it
        "exits": [spec.place for spec in manifest.exits],
        "exits_by_flops": [spec.place for spec in by_flops.manifest.exits],
        "accuracy_backbone": manifest.evaluation.accuracy_backbone,
    }  # fmt: skip
    kept = _same(told, before.get(title(told))) if args.add else None
    lasting = {"eager": eager(task.model)}
    if rivalled:
        of_ours = [judged(variants[key], ready, JUDGED, truth) for key in ("segments", "wider")]
        losses = [max(0.0, -seen["accuracy_change"]) for seen in of_ours]
        given = earlyon(args.earlyon, task, ready, manifest, losses, args.earlyon_epochs, args.seed)
        for key, (variant, how) in zip(("earlyon", "earlyon_wider"), given, strict=True):
            lasting[key], told[key] = variant, how
    elif name in RIVALLED:
        log(f"{name}: earlyon is left out; it needs --earlyon DIR and an artifact with exits")
    variants |= lasting
    alone = {key: v for key, v in variants.items() if v.answer is not None and not v.together}
    answers: Mapping[str, Any] = {} if kept is None else kept["answers"]
    told["answers"] = {key: answers.get(key) or judged(variant, ready, JUDGED, truth) for key, variant in alone.items()}
    told["memory"] = memory(ready, artifact, args.threads) if kept is None else kept["memory"]
    del variants  # their sessions
    sizes = {one["batch"]: one for one in kept["batches"]} if kept is not None else {}
    for batch in args.batches:
        log(f"{name}, batch {batch}")
        one = timed(lambda: opened() | lasting, ready, batch, args.rounds, args.seed)
        for key in (key for key, variant in lasting.items() if variant.together):
            one["variants"][key] |= judged(lasting[key], ready, batch, truth)
        sizes[batch] = {**one, "load": os.getloadavg()[2]}
        yield {**told, "batches": [sizes[size] for size in sorted(sizes)]}


def _same(told: Mapping[str, Any], before: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The result before, if it is of the same artifact under the same conditions."""
    if before is None:
        raise SystemExit(f"{title(told)}: no result to add to; leave --add out")
    differ = [key for key in told if told[key] != before.get(key)]
    if differ:
        raise SystemExit(f"{title(told)}: another {', '.join(differ)} than in the result before; leave --add out")
    return before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["resnet20", "resnet56", "sst2", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--kind", choices=KINDS, default="searched")
    parser.add_argument("--rounds", type=int, default=30, help="at least, and at most ten times as many")
    parser.add_argument("--epochs", type=int, default=Training.epochs, help="that the heads were trained for")
    parser.add_argument("--earlyon", type=Path, metavar="DIR", help="where earlyon is installed")
    parser.add_argument("--earlyon-epochs", type=int, default=Training.epochs)
    parser.add_argument("--own-pools", action="store_true", help="leave every session a pool of threads of its own")
    parser.add_argument("--add", action="store_true", help="time these batch sizes beside those of the result before")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else []
    results = {title(result): result for result in before}
    if not args.own_pools:
        share_threads(args.threads)
    for name in args.tasks:
        for told in measured(name, args, results):
            results[title(told)] = told
            write(results.values())


def write(results: Iterable[dict[str, Any]]) -> None:
    """JSON, tables and plot of all results."""
    ordered = sorted(results, key=lambda r: (list(TASKS).index(r["task"]), r["own_pools"], r["threads"]))
    RESULTS.write_text(json.dumps({"command": "python -m benchmarks.speed", "results": ordered}, indent=1) + "\n")
    replace_block("speed", tables(ordered))
    plot([result for result in ordered if not result["own_pools"]] or ordered)


if __name__ == "__main__":
    main()
