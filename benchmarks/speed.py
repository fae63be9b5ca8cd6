"""How long an artifact takes in each of its forms, against the plain backbone and whatever else a person could run.

    python -m benchmarks.speed [--tasks resnet20 resnet56 resnet56_long resnet50 sst2] [--batches 1 2 4 8 16 32 64 128]
        [--kind searched] [--epochs 30] [--earlyon DIR] [--lite DIR] [--own-pools] [--unpadded]
        [--add | --smaller]

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
    smaller      another model in ONNX Runtime in the backbone's place, see `benchmarks.smaller`, which says what DIR is
    cut short    the backbone ended, for all rows, at the first place whose head is right nearly as often; see there too

Artifacts are compiled at 1 % with the heads `benchmarks.heads` has trained, exits chosen for speed: by `--cost time
--cost-batch 1`, on this machine. All variants run in one process with the same number of threads; all ONNX Runtime
sessions on one pool of them, as `share_threads` makes it, or with --own-pools each on its own, as without that call.
Sentences are padded to 64 tokens, or with --unpadded to the longest of their batch, which is what takes the time told.
In every round each answers the same batches of test rows, the order turned by one and every second time backwards, each
after a rest and a small batch that is not counted, until every row's class is known; ratios are taken within a round,
those to the ideal too. There are at least 30 rounds, and at most 300 or six minutes: after two minutes, once we know
whether a batch that nothing leaves costs 2 % beyond the heads, or what it costs to 1 %. After every ten all of ours and
ONNX Runtime's are made anew: one that was unlucky with where its memory lies stays some percent slower, so what the
rounds can tell is worked out from these tens. The README shows some batches, the JSON file and the plot all. Every
variant's disagreement with the backbone, change in accuracy and exits over all test rows stand beside its times. Peak
memory is that of a fresh process which loads one form and answers batches of 32, above numpy, onnxruntime and the rows;
"weights beside" is `model.onnx` saved again by `onnx.save_model(..., save_as_external_data=True)`, in a plain session.
Writes benchmarks/results/speed.json after each batch size, keeping tasks that are not asked for, the README's tables
and docs/speed.svg. With --add and with --unpadded the artifacts that the last run compiled are taken up; with --add
only the batch sizes asked for are timed, beside or in place of those it timed; with --smaller the smaller models alone,
beside plain, in rounds of their own.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.smaller import smaller_models
from benchmarks.speed_memory import memory
from benchmarks.speed_rivals import PROVIDERS, Answered, Batch, Variant, called, eager, earlyon, in_onnxruntime
from benchmarks.speed_rounds import timed
from benchmarks.speed_tables import plot, tables, title
from benchmarks.tables import log, replace_block
from benchmarks.tasks import TASKS, Task, unpadded
from benchmarks.trained import KINDS, WORK, heads_of, made_ready, options_of
from offramp.compiler import ALL_TARGETS, Head, Options, Ready, Training, finish
from offramp.compiler.costs import FLOPS, TIME
from offramp.compiler.emit import SCRIPT, SEGMENTS, backbone_model
from offramp.compiler.measure import Bench, machine, versions
from offramp.runtime import Answers, load, share_threads
from offramp.runtime.artifact import Artifact, open_artifact
from offramp.runtime.engine import ModelBytes
from offramp.runtime.execution import ASK, CONFIDENCE, PROBABILITIES
from offramp.runtime.manifest import Manifest

RESULTS = Path(__file__).parent / "results" / "speed.json"
RIVALLED = ("resnet20", "resnet56", "resnet56_long")  # by earlyon
WIDER = 0.02  # a tolerance, beside earlyon
JUDGED = 32  # rows at a time where the batch does not matter


def compiled(task: Task, args: argparse.Namespace) -> tuple[Ready, tuple[Head, ...], Artifact, Artifact]:
    """The task's heads, taken up where they were trained before; its artifact in all forms, and one chosen by FLOPs."""
    options = options_of(
        task, args.kind, args.epochs, seed=args.seed, threads=args.threads, targets=ALL_TARGETS, rounds=1, cost=TIME
    )
    ready = made_ready(task, options)
    out = WORK / f"speed-{task.name}-{args.kind}"
    by_flops = out.with_name(f"{out.name}-flops")
    heads = heads_of(task, ready, options, args.kind)
    if not (args.add or args.unpadded):
        finish(ready, heads, out, options, log)
        finish(ready, heads, by_flops, replace(options, cost=FLOPS, targets=(SEGMENTS,)), log)
    return ready, heads, open_artifact(out), open_artifact(by_flops)


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


def measured(name: str, args: argparse.Namespace, before: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One task: compile, judge, time; its result after every batch size. `before` are results by their titles."""
    task = TASKS[name](args.seed)
    ready, heads, artifact, by_flops = compiled(task, args)
    manifest = artifact.manifest
    rivalled = name in RIVALLED and args.earlyon is not None and len(manifest.exits) > 1
    smaller = smaller_models(name, ready, heads, Options.tolerance, args.lite)
    assert ready.plain is not None
    rewritten = backbone_model(ready.backbone, rewritten=True)
    models = {"plain": ready.plain, "rewritten": rewritten, **{key: one.model for key, one in smaller.items()}}
    opened = functools.partial(ours, models, artifact, by_flops, args.threads, rivalled)
    variants = opened()
    truth, _ = answered(variants["plain"], ready, JUDGED)
    told: dict[str, Any] = {
        **under(name, args), "rounds": args.rounds, "test_rows": len(truth),
        "plan": json.loads(json.dumps(asdict(manifest.plans[manifest.default_plan]))),  # as a result before has it
        "exits": [spec.place for spec in manifest.exits],
        "exits_by_flops": [spec.place for spec in by_flops.manifest.exits],
        "accuracy_backbone": manifest.evaluation.accuracy_backbone,
    }  # fmt: skip
    kept = _same(told, before.get(title(told))) if args.add else None
    lasting = {"eager": eager(task.model)}
    if rivalled:
        rivals, how = against_earlyon(task, ready, manifest, variants, truth, args)
        lasting, told = lasting | rivals, told | how
    elif name in RIVALLED:
        log(f"{name}: earlyon is left out; it needs --earlyon DIR and an artifact with exits")
    variants |= lasting
    alone = {key: v for key, v in variants.items() if v.answer is not None and not v.together}
    answers: Mapping[str, Any] = {} if kept is None else kept["answers"]
    new = {key: judged(variant, ready, JUDGED, truth) for key, variant in alone.items() if key not in answers}
    told["answers"] = {**answers, **new}
    known = {} if kept is None else kept.get("smaller", {})  # of one that is not at hand this time too
    told["smaller"] = {**known, **{key: one.what for key, one in smaller.items()}}
    told["memory"] = memory(ready, artifact, args.threads) if kept is None else kept["memory"]
    del variants  # their sessions
    sizes = {one["batch"]: one for one in kept["batches"]} if kept is not None else {}
    for batch in args.batches:
        log(f"{name}, batch {batch}")
        one = timed(lambda: opened() | lasting, ready, batch, args.rounds, args.seed, handed_over(args))
        for key in (key for key, variant in lasting.items() if variant.together):
            one["variants"][key] |= judged(lasting[key], ready, batch, truth)
        sizes[batch] = {**one, "load": os.getloadavg()[2]}
        yield {**told, "batches": [sizes[size] for size in sorted(sizes)]}


def under(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a result was measured under."""
    return {
        "task": name, "kind": args.kind, "own_pools": args.own_pools, "unpadded": args.unpadded, "machine": machine(),
        "versions": versions(), "seed": args.seed, "threads": args.threads,
    }  # fmt: skip


def against_earlyon(
    task: Task, ready: Ready, manifest: Manifest, variants: Mapping[str, Variant], truth: np.ndarray,
    args: argparse.Namespace,
) -> tuple[dict[str, Variant], dict[str, Any]]:  # fmt: skip
    """earlyon, asked for the accuracy that segments lose, at both tolerances; and how it came to what it does."""
    of_ours = [judged(variants[key], ready, JUDGED, truth) for key in ("segments", "wider")]
    losses = [max(0.0, -seen["accuracy_change"]) for seen in of_ours]
    given = earlyon(args.earlyon, task, ready, manifest, losses, args.earlyon_epochs, args.seed)
    named = dict(zip(("earlyon", "earlyon_wider"), given, strict=True))
    return {key: variant for key, (variant, _) in named.items()}, {key: how for key, (_, how) in named.items()}


def with_smaller(
    name: str, args: argparse.Namespace, before: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The task's result before, with smaller models timed beside plain alone; again after every batch size."""
    conditions = under(name, args)
    kept = _same(conditions, before.get(title(conditions)))
    task = TASKS[name](args.seed)
    options = options_of(task, args.kind, args.epochs, seed=args.seed, threads=args.threads)
    ready = made_ready(task, options)
    smaller = smaller_models(name, ready, heads_of(task, ready, options, args.kind), Options.tolerance, args.lite)
    assert ready.plain is not None
    models = {"plain": ready.plain, **{key: one.model for key, one in smaller.items()}}

    def opened() -> dict[str, Variant]:
        return {key: in_onnxruntime(model, key, args.threads) for key, model in models.items()}

    variants = opened()
    truth, _ = answered(variants["plain"], ready, JUDGED)
    seen = {key: judged(variants[key], ready, JUDGED, truth) for key in smaller}
    what = {key: one.what for key, one in smaller.items()}
    told = {**kept, "smaller": kept.get("smaller", {}) | what, "answers": kept["answers"] | seen}
    for one in told["batches"] if smaller else []:
        if one["batch"] in args.batches:
            log(f"{name}, {' and '.join(smaller)}, batch {one['batch']}")
            found = timed(opened, ready, one["batch"], args.rounds, args.seed, handed_over(args))
            one["variants"] |= {key: {**found["variants"][key], "rounds": found["rounds"]} for key in smaller}
            yield told


def handed_over(args: argparse.Namespace) -> Callable[[Mapping[str, np.ndarray]], Batch]:
    """What becomes of rows before they are answered."""
    return unpadded if args.unpadded else dict


def _same(told: Mapping[str, Any], before: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The result before, if it is of the same artifact under the same conditions."""
    if before is None:
        raise SystemExit(f"{title(told)}: no result to add to; leave --add and --smaller out")
    differ = [key for key in told if told[key] != before.get(key)]
    if differ:
        raise SystemExit(
            f"{title(told)}: another {', '.join(differ)} than in the result before; leave --add and --smaller out"
        )
    return before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--kind", choices=KINDS, default="searched")
    parser.add_argument("--rounds", type=int, default=30, help="at least, and at most ten times as many")
    parser.add_argument("--epochs", type=int, default=Training.epochs, help="that the heads were trained for")
    parser.add_argument("--earlyon", type=Path, metavar="DIR", help="where earlyon is installed")
    parser.add_argument("--earlyon-epochs", type=int, default=Training.epochs)
    parser.add_argument("--lite", type=Path, metavar="DIR", help="where EfficientNet-Lite is installed")
    parser.add_argument("--own-pools", action="store_true", help="leave every session a pool of threads of its own")
    parser.add_argument("--unpadded", action="store_true", help="cut sentences to the longest of their batch")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--add", action="store_true", help="time these batch sizes beside those of the result before")
    again.add_argument("--smaller", action="store_true", help="time the smaller models alone, for the result before")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else []
    results = {title(result): result for result in before}
    if not args.own_pools:
        share_threads(args.threads)
    for name in args.tasks:
        for told in (with_smaller if args.smaller else measured)(name, args, results):
            results[title(told)] = told
            write(results.values())


def write(results: Iterable[dict[str, Any]]) -> None:
    """JSON, tables and plot of all results."""
    ordered = sorted(results, key=lambda r: (list(TASKS).index(r["task"]), r["own_pools"], r["unpadded"], r["threads"]))
    RESULTS.write_text(json.dumps({"command": "python -m benchmarks.speed", "results": ordered}, indent=1) + "\n")
    replace_block("speed", tables(ordered))
    plot([result for result in ordered if not result["own_pools"]] or ordered)


if __name__ == "__main__":
    main()
