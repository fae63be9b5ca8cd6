"""What the runtime adds to numpy and onnxruntime: seconds to import, bytes to install.

    python -m benchmarks.footprint [--rounds 21]

Every round starts a fresh process that imports numpy and onnxruntime, and one that imports the runtime too, the order
turned every second time; the clock runs inside, around the imports alone. Writes benchmarks/results/footprint.json and
the README's line.

Bytes are those of the wheel's own files, of the bytecode that pip makes of them unless told `--no-compile`, and of both
of what `offramp[cpu]` installs beside numpy and onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import os
import py_compile
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import files
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import offramp.runtime
from benchmarks.tables import replace_block
from offramp.compiler.measure import machine, versions

RESULTS = Path(__file__).parent / "results" / "footprint.json"
ROOMS = ("compiler", "passes", "runtime")
BESIDE = ("tqdm",)  # what the extra `cpu` asks for, but for onnxruntime
IMPORTS = {
    "theirs": "import numpy, onnxruntime",
    "ours": "import numpy, onnxruntime, offramp.runtime",
}
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def seconds(imports: str) -> float:
    """That a fresh process takes for some imports."""
    done = subprocess.run([sys.executable, "-c", TIMED.format(imports)], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def measured(rounds: int) -> dict[str, Any]:
    """Import times and their difference, and the size of the installation."""
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for index in range(-1, rounds):
        for name in IMPORTS if index % 2 else reversed(IMPORTS):
            took = seconds(IMPORTS[name])
            if index >= 0:
                taken[name].append(took)
    more = [ours - theirs for ours, theirs in zip(taken["ours"], taken["theirs"], strict=True)]
    house = Path(offramp.runtime.__file__).parents[1]
    ours = [path for name in ROOMS for path in (house / name).rglob("*") if path.is_file()]
    beside = [Path(file.locate()) for name in BESIDE for file in files(name) or ()]
    return {
        **{f"{name}_s": median(values) for name, values in taken.items()},
        "more_s": median(more),
        "more_quartiles_s": [quantiles(more, n=4)[0], quantiles(more, n=4)[2]],
        **{f"{kind}bytes": size for kind, size in installed(ours).items()},
        **{f"{kind}bytes_beside": size for kind, size in installed(beside).items()},
        "rounds": rounds,
    }


def installed(paths: Iterable[Path]) -> dict[str, int]:
    """Bytes of the files, "", and of their bytecode, "code_"; what Python has compiled already is compiled anew."""
    sources = [path for path in paths if path.suffix != ".pyc" and path.is_file()]
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "code.pyc"
        for path in sources:
            if path.suffix == ".py":
                py_compile.compile(str(path), cfile=str(made), doraise=True)
                code += made.stat().st_size
    return {"": sum(path.stat().st_size for path in sources), "code_": code}


def line(told: Mapping[str, Any]) -> str:
    """The README's sentence."""
    low, high = (f"{value * 1e3:.0f}" for value in told["more_quartiles_s"])
    size, code, beside, code_beside = (
        f"{told[name] / 1e6:.2f} MB" for name in ("bytes", "code_bytes", "bytes_beside", "code_bytes_beside")
    )
    return (
        f"Importing the runtime takes {told['more_s'] * 1e3:.0f} ms ({low} to {high}) more than numpy's and "
        f"onnxruntime's own {told['theirs_s'] * 1e3:.0f} ms. Beside these two, `offramp[cpu]` installs {size} of "
        f"Offramp's files, compiler and server among them, and {beside} of {' and '.join(BESIDE)}; the bytecode that "
        f"pip makes of them, unless told `--no-compile`, takes {code} and {code_beside} more."
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
