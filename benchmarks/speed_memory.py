"""Peak memory of an artifact's forms, as `benchmarks.speed` tells it: each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import onnx

from benchmarks.speed_tables import MEMORY_BATCH
from benchmarks.tasks import save_rows
from offramp.compiler import Ready
from offramp.compiler.emit import WHOLE
from offramp.runtime.artifact import Artifact

MEMORY_CALLS, MEMORY_RUNS = 8, 3
MEMORY = """
import sys
import numpy as np
import onnxruntime as ort
def peak():  # KiB
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM:")).split()[1])
form, path, rows, threads, size = *sys.argv[1:3], dict(np.load(sys.argv[3])), *map(int, sys.argv[4:])
count = len(next(iter(rows.values())))
work = [{name: values[at : at + size] for name, values in rows.items()} for at in range(0, count, size)]
before = peak()
if form in ("plain", "beside"):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    answer = lambda batch: session.run(["probabilities"], batch)
else:
    from offramp.runtime import load
    answer = load(path, providers=["CPUExecutionProvider"], threads=threads, executor=form).run
for batch in work:
    answer(batch)
print((peak() - before) / 1024, before / 1024)
"""


def memory(ready: Ready, artifact: Artifact, threads: int) -> dict[str, float]:
    """MiB at the peak above what numpy and onnxruntime take, medians over fresh processes."""
    assert ready.plain is not None
    assert not ready.plain.external, "a model with its weights in other files needs them written too"
    test = ready.splits.test
    picked = test[np.arange(MEMORY_BATCH * MEMORY_CALLS) % len(test)]
    told: dict[str, list[float]] = {"plain": [], "segments": [], "single-file": [], "beside": [], "base": []}
    with tempfile.TemporaryDirectory() as folder:
        files = {form: Path(folder) / f"{form}.onnx" for form in ("plain", "beside")}
        rows = Path(folder) / "rows.npz"
        files["plain"].write_bytes(ready.plain.proto)
        onnx.save_model(onnx.load(artifact.path / WHOLE), files["beside"], save_as_external_data=True)
        save_rows(rows, ready.rows.take(picked))
        for form in [name for name in told if name != "base"] * MEMORY_RUNS:
            given = map(str, (form, files.get(form, artifact.path), rows, threads, MEMORY_BATCH))
            said = subprocess.run([sys.executable, "-c", MEMORY, *given], check=True, stdout=subprocess.PIPE, text=True)
            peak, base = map(float, said.stdout.split())
            told[form].append(peak)
            told["base"].append(base)
    return {f"{form.replace('-', '_')}_mib": median(values) for form, values in told.items()}
