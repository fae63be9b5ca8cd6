"""`OnDevice` with memory that stays where it is, so that a CUDA graph can be captured of every stage and size.

A stage of a small model is some dozens of kernels that take less time than the host needs to start them, one by one.
Captured, they are started at once. What was captured reads and writes the same memory ever after: for every value and
every size that batches are padded to there is one place, the first stage's inputs included. Stage and compaction write
there, and the next stage reads there; no value is copied that `OnDevice` does not copy.

A size is captured when it is first met: its first batch runs three times. Batches are padded to measured sizes and,
beyond, to powers of two, so there are few. Heads are always asked (see `always_asked`): ONNX Runtime captures no `If`.
There is one set of places, and ONNX Runtime lets no two threads run what it captured: batches take turns, and a
batch is answered whole before its first rows are handed over.

Not tried on a GPU yet. The tests run all of it on the host, where nothing is captured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .buckets import Buckets, buckets_for
from .engine import EngineSession, Value, download, room, upload
from .execution import ExitRows, Stage, Thresholds, WholeBatch, carry
from .gather import ROWS
from .inputs import Arrays
from .manifest import Manifest
from .on_device import OnDevice, padded


class _Call(NamedTuple):
    """A stage at one size: what runs it, and where it leaves what it makes."""

    run: Callable[[], None]
    kept: list[Value]
    probabilities: Value  # [size, K]
    confidence: Value  # [size]


class Replayed(OnDevice):
    """One model per stage, each of which always asks its head."""

    def __init__(self, manifest: Manifest, sessions: Sequence[EngineSession], device: str) -> None:
        super().__init__(manifest, sessions, device)
        self._turn = threading.Lock()
        self._places: dict[tuple[str, int], Value] = {}  # by a value's name and rows
        self._calls: dict[tuple[str, int], _Call] = {}  # by a model's name and rows

    def _partings(
        self, arrays: Arrays, thresholds: Thresholds | np.ndarray
    ) -> Iterator[tuple[WholeBatch, int, np.ndarray]]:
        with self._turn:
            parts = list(super()._partings(arrays, thresholds))
        yield from parts

    def answer_all(self, arrays: Arrays) -> Iterator[ExitRows]:
        with self._turn:
            parts = list(super().answer_all(arrays))
        yield from parts

    def _buckets(self, rows: int) -> Buckets:
        """None of a batch's own size, or there would be as many as batches have."""
        return buckets_for(1 << (rows - 1).bit_length(), self._measured)

    def _upload(self, arrays: Arrays, size: int) -> dict[str, Value]:
        live = {}
        for name in self._read_inputs(arrays):
            array = np.ascontiguousarray(padded(arrays[name], size))
            live[name] = self._place(name, array.shape, array.dtype)
            live[name].update_inplace(array)
        return live

    def _pass(self, stage: Stage, live: dict[str, Value]) -> dict[str, Value]:
        return carry(stage, live, self._called(stage, live).kept if stage.kept else [])

    def _ask(self, stage: Stage, live: dict[str, Value]) -> tuple[dict[str, Value], Value, np.ndarray]:
        call = self._called(stage, live)
        return carry(stage, live, call.kept), call.probabilities, self._fetch(call.confidence)

    def _fetch(self, value: Value) -> np.ndarray:
        """A copy: the next batch writes there."""
        return np.array(download(value))

    def _take(self, index: int, live: dict[str, Value], rows: np.ndarray) -> dict[str, Value]:
        taken = {
            name: self._place(name, (len(rows), *value.shape()[1:]), value.element_type())
            for name, value in live.items()
        }
        feed = {f"v{at}": value for at, value in enumerate(live.values())}
        into = {f"g{at}": value for at, value in enumerate(taken.values())}
        self._compaction[index].prepared(into, {ROWS: upload(rows, self._device), **feed})()
        return taken

    def _called(self, stage: Stage, live: dict[str, Value]) -> _Call:
        """Run a stage, which leaves what it makes in its places."""
        feed = {name: live[name] for name in stage.inputs}
        size = next(iter(feed.values())).shape()[0]
        call = self._calls.get((stage.session.name, size))
        if call is None:
            call = self._calls[stage.session.name, size] = self._prepared(stage, feed, size)
        call.run()
        return call

    def _prepared(self, stage: Stage, feed: dict[str, Value], size: int) -> _Call:
        """A first run, that is not captured, says what shapes there are."""
        made = stage.session.run_bound(dict.fromkeys(stage.fetched, self._device), feed)
        names = [*stage.kept, *(f"{stage.session.name}/{name}" for name in stage.fetched[len(stage.kept) :])]
        places = [
            self._place(name, tuple(value.shape()), value.element_type())
            for name, value in zip(names, made, strict=True)
        ]
        run = stage.session.prepared(dict(zip(stage.fetched, places, strict=True)), feed)
        *kept, probabilities, confidence = places
        return _Call(run, kept, probabilities, confidence)

    def _place(self, name: str, shape: tuple[int, ...], element: object) -> Value:
        """Where a value of so many rows lies, from the first time it is asked for."""
        place = self._places.get((name, shape[0]))
        if place is None:
            place = self._places[name, shape[0]] = room(shape, element, self._device)
        return place
