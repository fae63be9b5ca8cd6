"""CIFAR-10: the trained ResNet-20 and ResNet-56, compiled from unlabelled test images.

    python -m benchmarks.cifar10_resnet [--models resnet20 resnet56] [--tolerances 0.01 0.02]

The papers' protocol: the 10,000 test images are the inference traffic, the training set is not used; labels
are used in the report only; every figure is on the rows held out as `test`. Heads are distilled once per
model, then exits are chosen, emitted and measured at each tolerance. Writes results/cifar10_resnet.json and
the README's table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.cifar import data_dir, load_images, resnet20, resnet56
from benchmarks.tables import markdown, replace_block
from offramp.compiler import ALL_POLICIES, Options, Training, compile, load_weights
from offramp.compiler.measure import machine, versions
from offramp.runtime.manifest import Manifest
from offramp.runtime.table import percent, render

MODELS = {"resnet20": resnet20, "resnet56": resnet56}
RESULTS = Path(__file__).parent / "results" / "cifar10_resnet.json"
ARTIFACTS = Path("build") / "benchmarks"


def run(model: str, options: Options) -> Manifest:
    """Compile one model; heads trained for earlier options are taken up again."""
    images, labels = load_images()
    backbone = MODELS[model]()
    load_weights(backbone, data_dir() / "cifar10" / f"{model}.safetensors")
    out, work = ARTIFACTS / f"{model}-{options.policy}-{options.tolerance:g}", ARTIFACTS / f"{model}.work"
    return compile(backbone, images, out, labels=labels, options=options, name=model, work=work, say=_log)


def summary(model: str, manifest: Manifest) -> dict[str, Any]:
    """What the JSON keeps of one artifact."""
    seen = manifest.evaluation
    return {
        "model": model,
        "policy": manifest.plans[0].policy,
        "tolerance": manifest.plans[0].tolerance,
        "certificate": None if manifest.plans[0].certificate is None else asdict(manifest.plans[0].certificate),
        "exits": [
            {"place": e.place, "head": e.head, "head_flops": e.head_flops, **asdict(v)}
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
    """The README's table, from what the JSON keeps."""
    rows = []
    for result in results:
        low, high = result["disagreement_interval"]
        cells = [
            f"{result['model']}, {result['policy']} {percent(result['tolerance'], 0)}",
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


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tolerances", nargs="+", type=float, default=[0.01, 0.02])
    parser.add_argument("--policies", nargs="+", choices=ALL_POLICIES, default=["certified", "joint"])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: list[dict[str, Any]] = []
    for model in args.models:
        for tolerance in args.tolerances:
            for policy in args.policies:
                options = Options(
                    tolerance=tolerance,
                    policy=policy,
                    seed=args.seed,
                    threads=args.threads,
                    training=Training(epochs=args.epochs),
                )
                manifest = run(model, options)
                _log(render(manifest))
                results.append(summary(model, manifest))
    result = {
        "command": "python -m benchmarks.cifar10_resnet",
        "machine": machine(),
        "versions": versions(),
        "seed": args.seed,
        "epochs": args.epochs,
        "results": results,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    replace_block("cifar10_resnet", table(results))


if __name__ == "__main__":
    main()
