"""CIFAR-10: the trained ResNet-20 and ResNet-56, compiled from unlabelled test images.

    python -m benchmarks.cifar10_resnet [--models resnet20 resnet56] [--tolerances 0.005 0.01 0.02]

The papers' protocol: the 10,000 test images are the inference traffic, the training set is not used; labels
are used in the report only; every figure is on the rows held out as `test`. Heads are distilled once per
model, then exits are chosen, emitted and measured at each tolerance. Writes results/cifar10_resnet.json and
the README's table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.cifar import data_dir, load_images, resnet20, resnet56
from benchmarks.tables import markdown, replace_block
from offramp.compiler import Options, Training, compile, load_weights
from offramp.compiler.measure import machine, versions
from offramp.runtime.manifest import Manifest
from offramp.runtime.table import percent, render

MODELS = {"resnet20": resnet20, "resnet56": resnet56}
RESULTS = Path(__file__).parent / "results" / "cifar10_resnet.json"
ARTIFACTS = Path("build") / "benchmarks"


def run(model: str, tolerance: float, epochs: int, threads: int, seed: int) -> Manifest:
    """Compile one model at one tolerance; heads trained for an earlier tolerance are taken up again."""
    images, labels = load_images()
    backbone = MODELS[model]()
    load_weights(backbone, data_dir() / "cifar10" / f"{model}.safetensors")
    out, work = ARTIFACTS / f"{model}-{tolerance:g}", ARTIFACTS / f"{model}.work"
    options = Options(tolerance=tolerance, seed=seed, threads=threads, training=Training(epochs=epochs))
    return compile(backbone, images, out, labels=labels, options=options, name=model, work=work, say=_log)


def summary(model: str, manifest: Manifest) -> dict[str, object]:
    """What the JSON keeps of one artifact."""
    seen = manifest.evaluation
    assert seen.accuracy is not None and seen.accuracy_backbone is not None
    return {
        "model": model,
        "tolerance": manifest.plans[0].tolerance,
        "exits": [
            {"place": e.place, "head": e.head, "head_flops": e.head_flops, **asdict(v)}
            for e, v in zip(manifest.exits, seen.exits, strict=True)
        ],
        "rows": seen.rows,
        "disagreement": seen.disagreement,
        "disagreement_interval": seen.disagreement_interval,
        "accuracy_backbone": seen.accuracy_backbone,
        "accuracy": seen.accuracy,
        "flops_backbone": seen.flops_backbone,
        "flops": seen.flops,
        "saved": 1 - seen.flops / seen.flops_backbone,
        "oracle_saved": 1 - seen.oracle_flops / seen.flops_backbone,
        "timings": [asdict(t) for t in manifest.measured.timings],
    }


HEAD = (
    "model, tolerance", "exits", "compute saved", "oracle", "disagreement (95 %)", "accuracy",
    "ms per row, batch 1", "saved", "over ideal", "ms per row, batch 32", "saved", "over ideal",
)  # fmt: skip


def table(manifests: Sequence[tuple[str, Manifest]]) -> str:
    """The README's table."""
    rows = []
    for model, manifest in manifests:
        seen = manifest.evaluation
        assert seen.accuracy is not None and seen.accuracy_backbone is not None
        low, high = seen.disagreement_interval
        cells = [
            f"{model}, {percent(manifest.plans[0].tolerance)}",
            str(len(manifest.exits) - 1),
            percent(1 - seen.flops / seen.flops_backbone),
            percent(1 - seen.oracle_flops / seen.flops_backbone),
            f"{percent(seen.disagreement)} ({low * 100:.1f} - {high * 100:.1f})",
            f"{seen.accuracy_backbone * 100:.2f} → {seen.accuracy * 100:.2f}",
        ]
        for timing in manifest.measured.timings:
            over = "-" if timing.ideal_over is None else f"{timing.ideal_over:.2f}"
            cells += [f"{timing.backbone_ms:.3f} → {timing.offramp_ms:.3f}", percent(1 - timing.ratio), over]
        rows.append(cells)
    return markdown(HEAD, rows)


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tolerances", nargs="+", type=float, default=[0.005, 0.01, 0.02])
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    manifests: list[tuple[str, Manifest]] = []
    for model in args.models:
        for tolerance in args.tolerances:
            manifests.append((model, run(model, tolerance, args.epochs, args.threads, args.seed)))
            _log(render(manifests[-1][1]))
    result = {
        "command": "python -m benchmarks.cifar10_resnet",
        "machine": machine(),
        "versions": versions(),
        "seed": args.seed,
        "epochs": args.epochs,
        "results": [summary(model, manifest) for model, manifest in manifests],
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    replace_block("cifar10_resnet", table(manifests))


if __name__ == "__main__":
    main()
