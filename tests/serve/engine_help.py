"""Shared by the engine's tests: a host of tiny's stages whose memory, gates and failures a test commands.

And who collects what is delivered, reported and recorded, and the fixtures that start an engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
from tiny import THRESHOLDS, Tiny, batch, reference, write_tiny

from offramp.runtime.engine import EngineSession
from offramp.runtime.errors import OfframpError, UnknownModelError
from offramp.runtime.execution import ASK, Stage, stage_of
from offramp.runtime.manifest import Manifest
from offramp.runtime.process import CPU
from offramp.runtime.serve.engine import BatchingEngine
from offramp.runtime.serve.work import Asked, Leaving, Sample, SegmentState

PLAIN = Asked()
Start = Callable[..., BatchingEngine]
PATIENCE = 30.0  # seconds; what takes longer never comes


def rows_of(rows: dict[str, np.ndarray], which: np.ndarray) -> dict[str, np.ndarray]:
    return {name: value[which] for name, value in rows.items()}


def rows_at(exit: int, count: int, thresholds: tuple[float, ...] = THRESHOLDS) -> dict[str, np.ndarray]:
    """Rows that leave at one exit."""
    many = batch(2000, seed=3)
    return rows_of(many, np.flatnonzero(reference(many, thresholds)[1] == exit)[:count])


def bytes_of(rows: dict[str, np.ndarray]) -> int:
    return sum(value.nbytes for value in rows.values())


class Watched:
    """An `EngineSession` that notes its calls, and can be held up and made to fail."""

    def __init__(self, session: Any, gate: threading.Event, entered: threading.Semaphore) -> None:
        self._session, self._gate, self._entered = session, gate, entered
        self.name = "tiny"
        self.calls: list[tuple[int, list[str], bool | None]] = []  # rows, values fetched, whether the head was asked
        self.check: Callable[[Mapping[str, np.ndarray]], None] = lambda feed: None  # raises to fail a call

    def run(self, outputs: list[str], feed: dict[str, Any]) -> list[Any]:
        values = {name: value for name, value in feed.items() if name != ASK}
        asked = bool(feed[ASK]) if ASK in feed else None
        self.calls.append((len(next(iter(values.values()))), list(outputs), asked))
        self._entered.release()
        assert self._gate.wait(PATIENCE)
        self.check(values)
        return cast("list[Any]", self._session.run(outputs, values))


class FakeHosted:
    """One version, whose stages are in memory as the test says."""

    def __init__(self, host: FakeHost, name: str, manifest: Manifest, stages: list[Stage], digest: str) -> None:
        self.name, self.manifest, self.digest = name, manifest, digest
        self.stages = stages
        self.memory = set(range(len(stages)))
        self.failures: dict[int, BaseException] = {}  # raised by the next take
        self.taken = [0] * len(stages)
        self.asked_for: list[int] = []  # stages that were missing
        self.holders = 0
        self._host = host

    def session(self, stage: int) -> Watched:
        return cast("Watched", self.stages[stage].session)

    def take(self, stage: int) -> Stage | None:
        with self._host.lock:
            assert self.holders > 0, "taken from a version nobody holds"
            failure = self.failures.pop(stage, None)
            if failure is not None:
                raise failure
            if stage not in self.memory:
                self.asked_for.append(stage)
                self._host.missed.release()
                return None
            self.taken[stage] += 1
            return self.stages[stage]

    def give(self, stage: int) -> None:
        with self._host.lock:
            assert self.holders > 0, "given back to a version nobody holds"
            self.taken[stage] -= 1
            assert self.taken[stage] >= 0

    def hold(self) -> None:
        with self._host.lock:
            assert self.holders > 0, "held by nobody, so it may be gone"
            self.holders += 1

    def release(self) -> None:
        with self._host.lock:
            self.holders -= 1
            assert self.holders >= 0

    def load(self, *stages: int) -> None:
        with self._host.lock:
            self.memory |= set(stages)
        self._host.changed()

    def evict(self, *stages: int) -> None:
        with self._host.lock:
            self.memory -= set(stages)


class FakeHost:
    """Models a, b, ... of the same stages, all behind one gate."""

    def __init__(self, tiny: Tiny, names: str = "a", asks: bool = False) -> None:
        self.lock = threading.Lock()
        self.gate = threading.Event()  # stages run while it is set
        self.gate.set()
        self.entered = threading.Semaphore(0)  # released as a stage begins to run
        self.missed = threading.Semaphore(0)  # released as a take finds nothing
        self.listeners: list[Callable[[], None]] = []
        self.models: dict[str, FakeHosted] = {}
        for name in names:
            stages = []
            for index, spec in enumerate(tiny.manifest.stages):
                session = EngineSession(tiny.files[spec.file], spec.file, [CPU], 1, True)
                stage = stage_of(tiny.manifest, index, session)
                held = cast("EngineSession", Watched(session, self.gate, self.entered))
                stages.append(replace(stage, session=held, asks=asks))
            self.models[name] = FakeHosted(self, name, tiny.manifest, stages, f"digest {name}")

    def hold(self, name: str) -> FakeHosted:
        if name not in self.models:
            raise UnknownModelError(f"no model {name!r} here")
        with self.lock:
            self.models[name].holders += 1
        return self.models[name]

    def names(self) -> list[str]:
        return list(self.models)

    def swap(self, name: str) -> None:
        raise NotImplementedError

    def listen(self, changed: Callable[[], None]) -> None:
        self.listeners.append(changed)

    def changed(self) -> None:
        for listener in self.listeners:
            listener()

    def segments(self) -> list[SegmentState]:
        return []

    def close(self) -> None: ...

    def at_rest(self) -> None:
        """Nothing is held or taken."""
        for model in self.models.values():
            assert model.holders == 0, model.name
            assert not any(model.taken), model.name


@dataclass
class Got:
    """What one row was answered."""

    exit: int
    probabilities: np.ndarray  # [K]
    confidence: float
    short: bool


class Receiver:
    """A request's `deliver`: every row once, or the test fails."""

    def __init__(self, rows: int) -> None:
        self.rows: dict[int, Got] = {}
        self.errors: dict[int, OfframpError] = {}
        self.wrong: list[str] = []
        self.leavings: list[Leaving] = []
        self._lock = threading.Lock()
        self._expected = rows
        self.all = threading.Event()
        self.some = threading.Semaphore(0)
        if not rows:
            self.all.set()

    def __call__(self, leaving: Leaving) -> None:
        with self._lock:
            self.leavings.append(leaving)
            for place, row in enumerate(leaving.rows.tolist()):
                if row in self.rows or row in self.errors or not 0 <= row < self._expected:
                    self.wrong.append(f"row {row} again or out of range")
                elif leaving.error is not None:
                    self.errors[row] = leaving.error
                else:
                    shares = leaving.probabilities[place].copy()
                    self.rows[row] = Got(leaving.exit, shares, float(leaving.confidence[place]), leaving.short)
            done = len(self.rows) + len(self.errors) == self._expected
        self.some.release()
        if done:
            self.all.set()

    def wait(self) -> Receiver:
        """Until every row has its answer or error."""
        assert self.all.wait(PATIENCE), f"{len(self.rows)} answers, {len(self.errors)} errors of {self._expected}"
        assert not self.wrong, self.wrong
        return self

    def wait_some(self) -> None:
        """Until something more is delivered."""
        assert self.some.acquire(timeout=PATIENCE)

    def exits(self) -> list[int]:
        return [self.rows[row].exit for row in sorted(self.rows)]


@dataclass
class Journal:
    """An `Observer` that writes everything down."""

    ran_: list[tuple[str, int, int]] = field(default_factory=list)  # model, stage, rows
    accepted_: list[tuple[str, int]] = field(default_factory=list)
    refused_: list[tuple[str, int, str]] = field(default_factory=list)
    answered_: list[tuple[str, int, int, bool]] = field(default_factory=list)  # model, exit, rows, short
    failed_: list[tuple[str, int]] = field(default_factory=list)
    cancelled_: list[tuple[str, int]] = field(default_factory=list)
    watched_: list[tuple[str, int, bool]] = field(default_factory=list)
    unplaced_: int = 0
    risks_: list[float | None] = field(default_factory=list)  # of the watched

    def accepted(self, model: str, rows: int) -> None:
        self.accepted_.append((model, rows))

    def refused(self, model: str, rows: int, reason: str) -> None:
        self.refused_.append((model, rows, reason))

    def answered(self, model: str, exit: int, seconds: np.ndarray, short: bool) -> None:
        assert (seconds >= 0).all()
        self.answered_.append((model, exit, len(seconds), short))

    def failed(self, model: str, rows: int) -> None:
        self.failed_.append((model, rows))

    def cancelled(self, model: str, rows: int) -> None:
        self.cancelled_.append((model, rows))

    def ran(self, model: str, stage: int, rows: int, seconds: float) -> None:
        assert seconds >= 0
        self.ran_.append((model, stage, rows))

    def loaded(self, model: str, stage: int, seconds: float, bytes: int) -> None: ...

    def evicted(self, model: str, stage: int) -> None: ...

    def watched(self, model: str, version: str, exit: int, agrees: bool, risk: float | None) -> None:
        self.watched_.append((model, exit, agrees))
        self.risks_.append(risk)

    def unplaced(self, rows: int) -> None:
        self.unplaced_ += rows


class Notes:
    """A `Recorder` that chooses a seeded share of the rows."""

    def __init__(self, share: float, seed: int = 0) -> None:
        self._share, self._rng = share, np.random.default_rng(seed)
        self._lock = threading.Lock()
        self.samples: list[Sample] = []
        self.chosen_rows = 0
        self.more = threading.Semaphore(0)

    def chosen(self, model: str, rows: int) -> np.ndarray:
        with self._lock:
            chosen: np.ndarray = self._rng.random(rows) < self._share
            self.chosen_rows += int(chosen.sum())
        return chosen

    def record(self, sample: Sample) -> None:
        with self._lock:
            self.samples.append(sample)
        self.more.release()

    def wait(self, samples: int) -> list[Sample]:
        for _ in range(samples):
            assert self.more.acquire(timeout=PATIENCE), f"{len(self.samples)} of {samples} recorded"
        return self.samples


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "artifact")


@pytest.fixture
def host(tiny: Tiny) -> FakeHost:
    return FakeHost(tiny, "ab")


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def start(host: FakeHost, journal: Journal) -> Iterator[Start]:
    """Engines of one worker that see nothing as urgent, closed when the test ends, with nothing held."""
    engines: list[BatchingEngine] = []

    def make(**options: Any) -> BatchingEngine:
        engines.append(BatchingEngine(host, **{"workers": 1, "latency_budget": 1e6, "observer": journal, **options}))
        return engines[-1]

    yield make
    host.gate.set()
    for engine in engines:
        engine.close(PATIENCE)
    host.at_rest()


def ask(engine: BatchingEngine, rows: dict[str, np.ndarray], asked: Asked = PLAIN, model: str = "a") -> Receiver:
    receiver = Receiver(len(rows["x"]))
    engine.submit(model, rows, asked, receiver)
    return receiver


def until(holds: Callable[[], bool]) -> None:
    """Until something holds that nobody announces."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def missed(host: FakeHost) -> None:
    """Until a stage was asked for that is not in memory."""
    assert host.missed.acquire(timeout=PATIENCE)
