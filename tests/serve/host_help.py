"""Copies of the tiny artifact, loadings of given sizes that can be held up or made to fail, and what a host told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tiny import write_tiny

from offramp.runtime.artifact import Artifact
from offramp.runtime.execution import Stage
from offramp.runtime.serve.loader import Loaded, Loader
from offramp.runtime.serve.work import Hosted, Silent

PATIENCE = 30.0  # seconds after which a test gives up
STAGES = 3  # of the tiny artifact
K = 2000  # bytes, more than its files have
CPU = ["CPUExecutionProvider"]


def write_models(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """A tiny artifact for each name -> their paths."""
    return {name: str(write_tiny(folder / name).path) for name in names}


class Loads:
    """Loads as `Loader` does, and says it took `sizes` [stages] times `K` bytes."""

    def __init__(self, sizes: Sequence[int], seconds: float = 0.01) -> None:
        self.sizes, self.seconds = [size * K for size in sizes], seconds
        self.calls: list[tuple[str, int]] = []
        self.failures: dict[tuple[str, int], Exception] = {}  # raised by the next loading
        self.open = threading.Event()
        self.open.set()
        self._load = Loader(1, CPU)

    def __call__(self, artifact: Artifact, index: int) -> Loaded:
        key = (artifact.path.name, index)
        self.calls.append(key)
        assert self.open.wait(PATIENCE)
        failure = self.failures.pop(key, None)
        if failure is not None:
            raise failure
        return Loaded(self._load(artifact, index).stage, self.sizes[index], self.seconds)


class Told(Silent):
    """Keeps what a host tells its observer."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []

    def loaded(self, model: str, stage: int, seconds: float, bytes: int) -> None:
        self.events.append(("loaded", model, stage))

    def evicted(self, model: str, stage: int) -> None:
        self.events.append(("evicted", model, stage))

    def of(self, kind: str) -> list[tuple[str, int]]:
        return [(model, stage) for what, model, stage in list(self.events) if what == kind]


def until(true: Callable[[], bool]) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def taken(version: Hosted, stage: int) -> Stage:
    """A stage, once it is in memory."""
    end = time.monotonic() + PATIENCE
    while (found := version.take(stage)) is None:
        assert time.monotonic() < end, f"stage {stage} of {version.name} was never loaded"
        time.sleep(0.001)
    return found


def used(version: Hosted, *stages: int) -> None:
    """Take and give back each."""
    for stage in stages:
        taken(version, stage)
        version.give(stage)
