"""CIFAR-10: the trained ResNet-20 and ResNet-56, compiled from unlabelled test images.

    python -m benchmarks.cifar10_resnet [--models resnet20 resnet56] [--tolerances 0.005 0.01 0.02]

The papers' protocol: test images are the inference traffic, the training set is not used; labels are used in the
report only. The 10,000 images are halved: heads learn from the half that was looked at while Offramp's defaults
were picked, exits are chosen, certified and judged on the other (`cifar.report_splits`).

Per model, tolerance and policy: one artifact, compiled and timed, and the same choice over 10 random splits of the
recorded rows for each training seed. Writes results/cifar10_resnet.json and the README's three tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cifar import data_dir, load_images, report_splits, resnet20, resnet56, untouched_rows
from benchmarks.resplits import Answers, judge_all
from benchmarks.tables import log, markdown, replace_block
from offramp.compiler import (
    ALL_POLICIES,
    Options,
    Training,
    calibrate,
    compile,
    costs,
    load_weights,
    prepare,
    record,
    train,
)
from offramp.compiler.measure import machine, versions
from offramp.runtime.manifest import Manifest
from offramp.runtime.selection import CERTIFIED
from offramp.runtime.table import percent, render

MODELS = {"resnet20": resnet20, "resnet56": resnet56}
RESULTS = Path(__file__).parent / "results" / "cifar10_resnet.json"
ARTIFACTS = Path("build") / "benchmarks"


def backbone_of(model: str) -> torch.nn.Module:
    """The trained network."""
    network = MODELS[model]()
    load_weights(network, data_dir() / "cifar10" / f"{model}.safetensors")
    return network


def work_of(model: str, seed: int) -> Path:
    """Where a model's trained heads are kept between compiles."""
    return ARTIFACTS / f"{model}-{seed}.work"


def run(model: str, options: Options) -> Manifest:
    """Compile one model; heads trained for earlier options are taken up again."""
    images, labels = load_images()
    out = ARTIFACTS / f"{model}-{options.policy}-{options.tolerance:g}"
    return compile(
        backbone_of(model), images, out, labels=labels, options=options, splits=report_splits(options.seed),
        name=model, work=work_of(model, options.seed), say=log,
    )  # fmt: skip


def recorded(model: str, training: Training, seed: int) -> Answers:
    """The steps of `compile` up to the recording, over the whole untouched half."""
    images, labels = load_images()
    options = Options(training=training, seed=seed)
    ready = prepare(backbone_of(model), images, options=options, splits=report_splits(seed), name=model)
    heads = train(ready, options, work_of(model, seed), log)
    backbone, rows = ready.backbone, ready.rows
    temperatures = calibrate(record(backbone, heads, rows, ready.splits.calibrate, "calibrate"))
    fresh = np.sort(untouched_rows()[1])
    return Answers(record(backbone, heads, rows, fresh, "answers"), temperatures, labels[fresh], costs(backbone, heads))


def summary(model: str, manifest: Manifest) -> dict[str, Any]:
    """What the JSON keeps of one artifact."""
    seen, plan = manifest.evaluation, manifest.plans[manifest.default_plan]
    return {
        "model": model,
        "policy": plan.policy,
        "tolerance": plan.tolerance,
        "certificate": None if plan.certificate is None else asdict(plan.certificate),
        "exits": [
            {
                "place": e.place,
                "head": e.head,
                "head_flops": e.head_flops,
                "segment_flops": e.segment_flops,
                **asdict(v),
            }
            for e, v in zip(manifest.exits, seen.exits, strict=True)
        ],
        **{key: value for key, value in asdict(seen).items() if key != "exits"},
        "saved": 1 - seen.flops / seen.flops_backbone,
        "oracle_saved": 1 - seen.oracle_flops / seen.flops_backbone,
        "timings": [asdict(t) for t in manifest.measured.timings],
    }


HEAD = (
    "model, policy and tolerance", "exits", "compute saved", "oracle", "disagreement (95 %)", "accuracy",
    "ms per row, batch 1", "saved", "over ideal", "ms per row, batch 32", "saved", "over ideal",
)  # fmt: skip


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's table of artifacts, from what the JSON keeps."""
    rows = []
    for result in results:
        low, high = result["disagreement_interval"]
        cells = [
            f"{result['model']}, {result['policy']} {percent(result['tolerance'])}",
            str(len(result["exits"]) - 1),
            percent(result["saved"]),
            percent(result["oracle_saved"]),
            f"{percent(result['disagreement'], 2)} ({low * 100:.1f} to {high * 100:.1f})",
            f"{result['accuracy_backbone'] * 100:.2f} → {result['accuracy'] * 100:.2f}",
        ]
        for timing in result["timings"]:
            times = f"{timing['backbone_ms']:.3f} → {timing['offramp_ms']:.3f}"
            cells += [times, percent(1 - timing["ratio"]), f"{timing['ideal_over']:.2f}"]
        rows.append(cells)
    return markdown(HEAD, rows)


STAGE_HEAD = ("model, policy and tolerance", "stage up to", "rows", "compute", "time, batch 1", "time, batch 32")


def stage_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's table of stages: compute and time of each in percent of the whole backbone's."""
    rows = []
    for result in results:
        reach = 1.0
        for index, stage in enumerate(result["exits"]):
            name = f"{result['model']}, {result['policy']} {percent(result['tolerance'])}" if index == 0 else ""
            compute = reach * (stage["segment_flops"] + stage["head_flops"]) / result["flops_backbone"]
            times = [percent(t["stage_ms"][index] / t["backbone_ms"]) for t in result["timings"]]
            rows.append([name, stage["place"], percent(reach), percent(compute), *times])
            reach = max(0.0, reach - stage["exit_rate"])
        whole = [percent(t["ratio"]) for t in result["timings"]]
        rows.append(["", "whole, with what lies between", "", percent(1 - result["saved"]), *whole])
    return markdown(STAGE_HEAD, rows)


SPREAD_HEAD = (
    "model, policy and tolerance", "splits", "compute saved", "disagreement", "over tolerance", "accuracy, points",
)  # fmt: skip


def spread_table(spreads: Sequence[Mapping[str, Any]]) -> str:
    """The README's table over many splits: mean ± standard deviation."""
    rows = []
    for spread in spreads:

        def cell(key: str, digits: int, spread: Mapping[str, Any] = spread) -> str:
            return f"{spread[key]['mean'] * 100:.{digits}f} ± {spread[key]['sd'] * 100:.{digits}f}"

        rows.append(
            [
                f"{spread['model']}, {spread['policy']} {percent(spread['tolerance'])}",
                str(spread["splits"]),
                f"{cell('saved', 1)} %",
                f"{cell('disagreement', 2)} %",
                str(spread["over_tolerance"]),
                cell("accuracy_change", 2),
            ]
        )
    return markdown(SPREAD_HEAD, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tolerances", nargs="+", type=float, default=[0.005, 0.01, 0.02])
    parser.add_argument("--policies", nargs="+", choices=ALL_POLICIES, default=["certified", "joint"])
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of training; artifacts are the first's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    training = Training(epochs=args.epochs)
    results: list[dict[str, Any]] = []
    spreads: list[dict[str, Any]] = []
    for model in args.models:
        answers = [recorded(model, training, seed) for seed in args.seeds]
        for tolerance in args.tolerances:
            for policy in args.policies:
                options = Options(
                    tolerance=tolerance, policy=policy, seed=args.seeds[0], threads=args.threads, training=training
                )
                named = {"model": model, "policy": policy, "tolerance": tolerance}
                spreads.append({**named, **judge_all(answers, options)})
                manifest = run(model, options)
                log(render(manifest))
                results.append(summary(model, manifest))
    result = {
        "command": "python -m benchmarks.cifar10_resnet",
        "machine": machine(),
        "versions": versions(),
        "seeds": args.seeds,
        "epochs": args.epochs,
        "results": results,
        "splits": spreads,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    replace_block("cifar10_resnet", table(results))
    replace_block("cifar10_splits", spread_table(spreads))
    replace_block("cifar10_stages", stage_table([r for r in results if r["policy"] == CERTIFIED]))


if __name__ == "__main__":
    main()
