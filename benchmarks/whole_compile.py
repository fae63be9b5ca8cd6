"""The whole `offramp compile` as a person runs it: ResNet-56, 10,000 CIFAR-10 rows, search on, defaults otherwise.

    python -m benchmarks.whole_compile [--threads 2]

The command runs in a process of its own, in an empty folder. Writes benchmarks/results/whole_compile.json and the
README's line. How busy the machine was beside it says `load`: the average of running processes over the last 15
minutes, of which the command itself is `threads`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cifar import data_dir, load_images
from benchmarks.tables import replace_block
from offramp.compiler.measure import machine, versions
from offramp.runtime.artifact import open_artifact
from offramp.runtime.table import percent

RESULTS = Path(__file__).parent / "results" / "whole_compile.json"
COMMAND = "offramp compile benchmarks.cifar:resnet56 --search tpe"


def run(threads: int, folder: Path) -> dict[str, Any]:
    """Compile in `folder` -> what it took, and what the artifact says of its test rows."""
    images, labels = load_images()
    np.savez(folder / "rows.npz", x=images, labels=labels)
    weights = data_dir() / "cifar10" / "resnet56.safetensors"
    given = ["--weights", weights, "--data", folder / "rows.npz", "-o", folder / "artifact", "--threads", threads]
    call = [sys.executable, "-c", "import sys; from offramp.runtime.cli import main; sys.exit(main(sys.argv[1:]))"]
    started = time.perf_counter()
    subprocess.run([*call, *COMMAND.split()[1:], *map(str, given)], check=True)
    took = time.perf_counter() - started
    manifest = open_artifact(folder / "artifact").manifest
    seen = manifest.evaluation
    return {
        "seconds": took,
        "load": os.getloadavg()[2],
        "rows": len(images),
        "test_rows": manifest.splits.test,
        "saved": 1 - seen.flops / seen.flops_backbone,
        "disagreement": seen.disagreement,
        "accuracy": seen.accuracy,
        "accuracy_backbone": seen.accuracy_backbone,
    }


def line(told: Mapping[str, Any]) -> str:
    """The README's sentence."""
    change = (told["accuracy"] - told["accuracy_backbone"]) * 100
    return (
        f"`{COMMAND}` with {told['rows']} rows takes {told['seconds'] / 60:.1f} minutes with {told['threads']} threads "
        f"(once; load of the machine {told['load']:.1f}), and saves {percent(told['saved'])} of the compute at "
        f"{percent(told['disagreement'], 2)} disagreement and {change:+.2f} points of accuracy on its "
        f"{told['test_rows']} test rows."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="offramp-") as folder:
        told = run(args.threads, Path(folder))
    told |= {"command": "python -m benchmarks.whole_compile", "threads": args.threads}
    told |= {"machine": machine(), "versions": versions()}
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    replace_block("whole_compile", line(told))


if __name__ == "__main__":
    main()
