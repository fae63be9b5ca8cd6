"""What the runtime adds to numpy and onnxruntime: seconds to import, bytes to install.

    python -m benchmarks.footprint [--rounds 21]

Both are of the published wheel (`make wheels`), installed into an empty folder as `pip install 'offramp[cpu]'` does,
but for numpy and onnxruntime themselves. Every round starts a fresh process that imports numpy and onnxruntime, and one
that imports the runtime too, the order turned every second time; the clock runs inside, around the imports alone.
Writes benchmarks/results/footprint.json and the README's line.

Bytes are those of all installed files, and of the bytecode among them, that pip makes unless told `--no-compile`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.tables import replace_block
from benchmarks.wheels import build, install, needs
from offramp.compiler.measure import machine, versions

RESULTS = Path(__file__).parent / "results" / "footprint.json"
IMPORTS = {
    "theirs": "import numpy, onnxruntime",
    "ours": "import numpy, onnxruntime, offramp.runtime",
}
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def install_published(site: Path) -> None:
    """`offramp[cpu]` from its wheel, without numpy and onnxruntime: it must not ask for more than these."""
    with tempfile.TemporaryDirectory() as wheels:
        build(Path(wheels))
        install(site, Path(wheels), "offramp")
    [found] = importlib.metadata.distributions(path=[str(site)])
    asked = {need.name for need in needs(found, "cpu")}
    if asked != {"numpy", "onnxruntime"}:
        raise SystemExit(f"offramp[cpu] installs {', '.join(sorted(asked))}: this benchmark counts its own files alone")


def seconds(imports: str, site: Path) -> float:
    """That a fresh process takes for some imports."""
    command = [sys.executable, "-c", TIMED.format(imports)]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def measured(rounds: int) -> dict[str, Any]:
    """Import times and their difference, and the size of the installation."""
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        install_published(site)
        sizes = {path: path.stat().st_size for path in site.rglob("*") if path.is_file()}
        for index in range(-1, rounds):
            for name in IMPORTS if index % 2 else reversed(IMPORTS):
                took = seconds(IMPORTS[name], site)
                if index >= 0:
                    taken[name].append(took)
    more = [ours - theirs for ours, theirs in zip(taken["ours"], taken["theirs"], strict=True)]
    return {
        **{f"{name}_s": median(values) for name, values in taken.items()},
        "more_s": median(more),
        "more_quartiles_s": [quantiles(more, n=4)[0], quantiles(more, n=4)[2]],
        "bytes": sum(sizes.values()),
        "bytecode_bytes": sum(size for path, size in sizes.items() if path.suffix == ".pyc"),
        "rounds": rounds,
    }


def line(told: Mapping[str, Any]) -> str:
    """The README's sentence."""
    low, high = (f"{value * 1e3:.0f}" for value in told["more_quartiles_s"])
    size, code = (f"{told[name] / 1e6:.2f} MB" for name in ("bytes", "bytecode_bytes"))
    return (
        f"Importing the runtime takes {told['more_s'] * 1e3:.0f} ms ({low} to {high}) more than numpy's and "
        f"onnxruntime's own {told['theirs_s'] * 1e3:.0f} ms. Beside these two, `offramp[cpu]` installs {size}, {code} "
        f"of it bytecode that pip makes unless told `--no-compile`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    told = {
        "command": "python -m benchmarks.footprint", "machine": machine(), "versions": versions(),
        "load": os.getloadavg()[0], **measured(args.rounds),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    replace_block("footprint", line(told))


if __name__ == "__main__":
    main()
