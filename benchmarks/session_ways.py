"""Ways to make ONNX Runtime's sessions, each in a process of its own; `benchmarks.sessions` starts and asks them.

    python -m benchmarks.session_ways WAY FOLDER THREADS

Reads a request a line, `{"whole": whether it is of the whole model, "batches": rows of each batch}`, and answers with
what they took and the memory at the peak so far, above what there was before any session. The folder holds what
`benchmarks.sessions.emitted` wrote. Needs numpy and onnxruntime alone, as the runtime does.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from offramp.runtime import process, share_threads
from offramp.runtime.engine import EngineSession
from offramp.runtime.execution import PROBABILITIES, Stage
from offramp.runtime.manifest import StageSpec

PROVIDERS = ["CPUExecutionProvider"]
WHOLE, SPECS, ROWS = "whole.onnx", "stages.json", "rows.npz"
WARM_ROWS = 8  # answered before the time is taken, for weights and threads to be at hand

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Way:
    """What differs from how we make sessions where threads are shared."""

    what: str
    shared: bool = True  # one pool of threads
    threads: int | None = None  # None: as many as asked for
    entries: Mapping[str, str] = field(default_factory=dict)  # of a session's configuration
    patterns: bool = False  # a plan of memory for every number of rows
    fused: tuple[str, ...] = ()  # by ONNX Runtime, which we keep from it


OURS = "ours"
_OWN_ARENAS = {"session.use_env_allocators": "0"}
WAYS = {
    OURS: Way("with `share_threads`"),
    "own": Way("without it: threads sleep between stages", shared=False),
    "spinning": Way(
        "a pool that waits for work in every session", shared=False, entries={"session.force_spinning_stop": "0"}
    ),
    "one": Way("one thread", shared=False, threads=1),
    "arenas": Way("an arena in every session, and plans of it", entries=_OWN_ARENAS, patterns=True),
    "plans": Way("one arena, and plans of it", patterns=True),
    "normed": Way("a sum and its LayerNormalization fused", fused=("SkipLayerNormFusion",)),
    "gelu": Way("a bias and its GELU fused", fused=("BiasGeluFusion",)),
}


def session_maker(way: Way, threads: int) -> Callable[[Path], EngineSession]:
    """What opens a model in this way; to be called once in a process."""
    if way.shared:
        share_threads(threads)
    own = None if way.shared else way.threads or threads

    def options(ort: Any, count: int | None) -> Any:
        made = process.session_options(ort, count)
        for key, value in way.entries.items():
            made.add_session_config_entry(key, value)
        made.enable_mem_pattern = way.patterns
        return made

    mock.patch("offramp.runtime.engine.session_options", options).start()
    for name in way.fused:
        process.SLOWER_FUSED.remove(name)
    return lambda file: EngineSession(file.read_bytes(), file.name, PROVIDERS, own, strict=True)


def stages_of(folder: Path, opened: Callable[[Path], EngineSession]) -> list[Stage]:
    """The stages in their order, none of whose heads is asked; the last, which has no other output, for its answer."""
    specs = [StageSpec(**told) for told in json.loads((folder / SPECS).read_text())]
    stages = [Stage.of(spec, opened(folder / spec.file)) for spec in specs]
    return [*stages[:-1], replace(stages[-1], kept=[PROBABILITIES])]


def through(stages: Sequence[Stage], batch: Batch) -> None:
    """All rows through all stages."""
    live = batch
    for stage in stages:
        live = stage.go_through(live)


def peak() -> float:
    """MiB that this process has taken at most."""
    with Path("/proc/self/status").open() as file:
        return int(next(line for line in file if line.startswith("VmHWM:")).split()[1]) / 1024


def main() -> None:
    way, folder, threads = WAYS[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3])
    process.find_onnxruntime().set_default_logger_severity(3)  # it warns of every entry that we overwrite
    rows: Batch = dict(np.load(folder / ROWS))
    before = peak()
    opened = session_maker(way, threads)
    runs: dict[bool, Callable[[Batch], object]] = {False: functools.partial(through, stages_of(folder, opened))}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["whole"] not in runs:  # opened late: the first peak is told of the stages alone
            runs[True] = functools.partial(opened(folder / WHOLE).run, [PROBABILITIES])
        run = runs[asked["whole"]]
        work = [{name: values[picked] for name, values in rows.items()} for picked in asked["batches"]]
        run({name: values[:WARM_ROWS] for name, values in work[0].items()})
        start = time.perf_counter()
        for batch in work:
            run(batch)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "mib": peak() - before}), flush=True)


if __name__ == "__main__":
    main()
