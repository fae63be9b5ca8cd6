"""A session that lives long: many threads, many calls, steady memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny import Tiny

from offramp.runtime import load

CALLS, WARM, THREADS = 100_000, 20_000, 4

# Prints the process's resident bytes after WARM and after CALLS further calls, from all threads at once.
SOAK = f"""
import sys, threading
from pathlib import Path
import numpy as np
from offramp.runtime import load

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024

rng = np.random.default_rng(0)
batches = [
    {{"x": rng.standard_normal((n, 6)).astype(np.float32), "side": rng.standard_normal((n, 3)).astype(np.float32)}}
    for n in range(1, 9)
]
session = load(sys.argv[1], threads=1, executor=sys.argv[2])
wanted = [session.run(batch).classes for batch in batches]
wrong = []

def calls(count):
    for index in range(count):
        which = index % len(batches)
        if not np.array_equal(session.run(batches[which]).classes, wanted[which]):
            wrong.append(which)

def soak(count):
    workers = [threading.Thread(target=calls, args=(count // {THREADS},)) for _ in range({THREADS})]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return resident()

before = soak({WARM})
print(len(wrong), before, soak({CALLS}))
session.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("executor", ["segments", "single-file"])
def test_a_hundred_thousand_calls_from_four_threads_leave_memory_as_it_was(tiny: Tiny, executor: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SOAK, str(tiny.path), executor], capture_output=True, text=True, check=True
    )
    wrong, before, after = map(int, done.stdout.split())
    assert wrong == 0
    assert after - before < CALLS * 8, "eight bytes a call would show"


# Prints by how many bytes the process grew when the first of some sessions ran, and when all others had too.
ARENAS = """
from pathlib import Path
import numpy as np
from onnx import TensorProto, helper
from offramp.runtime.engine import EngineSession

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024

value = helper.make_tensor_value_info
nodes = [helper.make_node("Exp", ["x"], ["y"]), helper.make_node("ReduceMax", ["y"], ["z"], keepdims=0)]
graph = helper.make_graph(
    nodes, "large", [value("x", TensorProto.FLOAT, ["n"])], [value("z", TensorProto.FLOAT, [])]
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
sessions = [EngineSession(model, "large", ["CPUExecutionProvider"], 1, strict=True) for _ in range(6)]
rows = {"x": np.ones(8 << 20, np.float32)}
sizes = [resident()]
for session in sessions:
    session.run(["z"], rows)
    sizes.append(resident())
print(sizes[1] - sizes[0], sizes[-1] - sizes[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_sessions_share_their_memory() -> None:
    done = subprocess.run([sys.executable, "-c", ARENAS], capture_output=True, text=True, check=True)
    one, others = map(int, done.stdout.split())
    assert one > 30 << 20, "the value between the two operators"
    assert others < one, "five more sessions of their own arenas would take five times as much"


# Prints the threads of the process before and after sessions were made, with one pool or pools of their own.
POOLS = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime as ort
from offramp.runtime import load, share_threads

def threads():
    return len(list(Path("/proc/self/task").iterdir()))

seen, sessions = [threads()], []
if sys.argv[2] == "ours":
    share_threads(3)
elif sys.argv[2] == "theirs":
    ort.set_global_thread_pool_sizes(3, 1)
batch = {"x": np.ones((4, 6), np.float32), "side": np.ones((4, 3), np.float32)}
for _ in range(3):
    sessions.append(load(sys.argv[1], threads=3))
    sessions[-1].run(batch)
    seen.append(threads())
print(*seen)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("pool", ["ours", "theirs", "none"])
def test_sessions_run_on_the_pool_that_the_process_has(tiny: Tiny, pool: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", POOLS, str(tiny.path), pool], capture_output=True, text=True, check=True
    )
    before, first, *others = map(int, done.stdout.split())
    stages = len(load(tiny.path).manifest.stages)
    assert first - before == (2 * stages if pool == "none" else 2)
    assert others == ([first + 2 * stages, first + 4 * stages] if pool == "none" else [first, first])


SHARED = """
import sys
from offramp.runtime import UsageError, load, share_threads

said = []
share_threads(2)
for wrong in (lambda: share_threads(2), lambda: load(sys.argv[1], threads=1), lambda: share_threads(0)):
    try:
        wrong()
    except UsageError as error:
        said.append(str(error))
print("\\n".join(said))
"""


def test_a_shared_pool_has_one_size_for_good(tiny: Tiny) -> None:
    done = subprocess.run([sys.executable, "-c", SHARED, str(tiny.path)], capture_output=True, text=True, check=True)
    again, other, none = done.stdout.splitlines()
    assert "call share_threads once" in again
    assert "threads is 1, but this process shares its threads" in other
    assert "threads is 0" in none


# Prints what is said of wrong bounds, of a batch beyond the bound, of a second bound; and answers to a batch within.
BOUNDED = """
import sys
import numpy as np
from offramp.runtime import OfframpError, limit_memory, load

def rows(count):
    return {"x": np.ones((count, 6), np.float32), "side": np.ones((count, 3), np.float32)}

def said(call):
    try:
        return call()
    except OfframpError as error:
        return f"{type(error).__name__}: {error}"

print(said(lambda: limit_memory(0)))
limit_memory(4 << 20)
session = load(sys.argv[1], threads=1)
print(said(lambda: session.run(rows(1 << 20))))
print(len(session.run(rows(64)).classes))
print(said(lambda: limit_memory(1 << 30)))
"""


ON_DEVICE = """
import sys
import numpy as np
from offramp.runtime import open_artifact, share_threads
from offramp.runtime.engine import start_sessions
from offramp.runtime.on_device import OnDevice

share_threads(2)
artifact = open_artifact(sys.argv[1])
models = [(stage.file, artifact.model(stage.file)) for stage in artifact.manifest.stages]
executor = OnDevice(artifact.manifest, start_sessions(models, ["CPUExecutionProvider"], 2, strict=True), "cpu")
rows = {"x": np.ones((5, 6), np.float32), "side": np.ones((5, 3), np.float32)}
print(sum(len(leaving.confidence) for leaving in executor.answer(rows, (0.55, 0.5))))
"""


def test_compaction_on_a_device_shares_the_pool_too(tiny: Tiny) -> None:
    done = subprocess.run([sys.executable, "-c", ON_DEVICE, str(tiny.path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["5"]


def test_memory_has_the_bound_that_the_application_sets(tiny: Tiny) -> None:
    done = subprocess.run([sys.executable, "-c", BOUNDED, str(tiny.path)], capture_output=True, text=True, check=True)
    none, beyond, within, again = done.stdout.splitlines()
    assert none.startswith("UsageError: a memory bound of 0 bytes")
    assert beyond.startswith("InputError: ")
    assert "take a smaller batch" in beyond
    assert within == "64"
    assert again.startswith("UsageError: memory is taken already")
