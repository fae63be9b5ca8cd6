"""`Segments` for a GPU: values stay on the device from the input to the answer.

The host sees, at each exit that is asked, the confidence [rows], which it needs to say who leaves and which is
copied in the wait for the stage's own run; and, only where rows leave, the probabilities: the answer. All
probabilities of the exit are read at once then, as one copy of rows times classes takes less than picking rows on
the device first. Compaction is one `Gather` on the device over all live values.

Batches are padded to a few sizes (see `buckets`), by repeating the first row; of what comes out for padding nothing
is read. Dropping rows pays where the next smaller size is reached, and where the manifest says that dropping as many
rows as that does: its `worth_dropping` is a share of the rows that a stage would run on, padding included.

The device is "cuda"; "cpu" runs the same steps on the host and is what the tests use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .buckets import Buckets, buckets_for, measured_sizes
from .engine import HOST, EngineSession, Value, download, upload
from .execution import (
    ASK,
    CONFIDENCE,
    PROBABILITIES,
    ExitRows,
    Stage,
    Staged,
    Thresholds,
    WholeBatch,
    carry,
    chain,
    limits_of,
    rows_of,
    staying,
    written,
)
from .gather import ROWS, gather_model, kind_of
from .inputs import Arrays
from .manifest import Manifest

_NEVER = float("inf")
_NOBODY = np.empty(0, np.int64)


class OnDevice(Staged):
    """One model per stage on a device, compaction there too."""

    def __init__(self, manifest: Manifest, sessions: Sequence[EngineSession], device: str) -> None:
        self._device = device
        self._stages = chain(manifest, sessions)
        self._compaction = _compaction(manifest, self._stages)
        self._worth = manifest.measured.worth_dropping or (0.0,) * len(self._stages)
        self._measured = measured_sizes(manifest)
        self._yes, self._no = upload(np.array(True), HOST), upload(np.array(False), HOST)

    def _partings(
        self, arrays: Arrays, thresholds: Thresholds | np.ndarray
    ) -> Iterator[tuple[WholeBatch, int, np.ndarray]]:
        count = rows_of(arrays)  # live rows, first in every live value; padding follows
        buckets = self._buckets(count)
        size = buckets.fit(count)
        live = self._upload(arrays, size)
        on: np.ndarray | None = None  # rows of the batch not answered yet, ascending; None: all
        waiting: np.ndarray | None = None  # where they are among the live rows; None: they are the live rows
        said: WholeBatch | None = None
        last = len(self._stages) - 1
        each = thresholds if isinstance(thresholds, np.ndarray) else None  # [rows, exits - 1]
        for index, stage in enumerate(self._stages):
            limit: float | np.ndarray = -_NEVER
            if index < last:
                limit = thresholds[index] if each is None else limits_of(each, on, index)
            if isinstance(limit, float) and limit == _NEVER:
                live = self._pass(stage, live)
                continue
            live, answers, scores = self._ask(stage, live)
            confidence = scores[:count] if waiting is None else scores.take(waiting)
            stays = staying(confidence, limit) if index < last else _NOBODY
            if stays is None:
                continue
            probabilities = self._fetch(answers)
            probabilities = probabilities[:count] if waiting is None else probabilities.take(waiting, axis=0)
            said = written(said, on, index, probabilities, confidence)
            on = stays if on is None else on.take(stays)
            yield said, index, on
            if not len(on):
                return
            waiting = stays if waiting is None else waiting.take(stays)
            smaller = buckets.fit(len(on))
            if smaller < size and 1 - smaller / size >= self._worth[index]:
                live = self._take(index, live, padded(waiting, smaller))
                count, size, waiting = len(on), smaller, None

    def answer_all(self, arrays: Arrays) -> Iterator[ExitRows]:
        count = rows_of(arrays)
        live = self._upload(arrays, self._buckets(count).fit(count))
        for index, stage in enumerate(self._stages):
            live, answers, confidence = self._ask(stage, live)
            yield ExitRows(index, None, self._fetch(answers)[:count], confidence[:count])

    def _buckets(self, rows: int) -> Buckets:
        """Sizes for a batch of so many rows."""
        return buckets_for(rows, self._measured)

    def _read_inputs(self, arrays: Arrays) -> list[str]:
        """The inputs that any stage reads."""
        first = self._stages[0]
        return [name for name in arrays if name in first.inputs or name in first.passes_on]

    def _upload(self, arrays: Arrays, size: int) -> dict[str, Value]:
        """What is read of the inputs, padded."""
        return {name: upload(padded(arrays[name], size), self._device) for name in self._read_inputs(arrays)}

    def _pass(self, stage: Stage, live: dict[str, Value]) -> dict[str, Value]:
        """Run a stage for what it passes on -> live values after it."""
        if not stage.kept:
            return carry(stage, live, [])
        return carry(stage, live, stage.session.run_bound(self._devices(stage), self._feed(stage, live, self._no)))

    def _ask(self, stage: Stage, live: dict[str, Value]) -> tuple[dict[str, Value], Value, np.ndarray]:
        """Run a stage and its head -> live values after it, probabilities on the device, confidence [size]."""
        wanted = {**self._devices(stage), PROBABILITIES: self._device, CONFIDENCE: HOST}
        *values, answers, confidence = stage.session.run_bound(wanted, self._feed(stage, live, self._yes))
        return carry(stage, live, values), answers, download(confidence)

    def _fetch(self, value: Value) -> np.ndarray:
        """What the host reads of an answer."""
        return download(value)

    def _devices(self, stage: Stage) -> dict[str, str]:
        return dict.fromkeys(stage.kept, self._device)

    def _feed(self, stage: Stage, live: dict[str, Value], ask: Value) -> dict[str, Value]:
        feed = {name: live[name] for name in stage.inputs}
        return {**feed, ASK: ask} if stage.asks else feed  # on the host, where an `If` reads it

    def _take(self, index: int, live: dict[str, Value], rows: np.ndarray) -> dict[str, Value]:
        """Rows of every live value, on the device."""
        feed = {f"v{at}": value for at, value in enumerate(live.values())}
        outputs = {f"g{at}": self._device for at in range(len(live))}
        taken = self._compaction[index].run_bound(outputs, {ROWS: upload(rows, self._device), **feed})
        return dict(zip(live, taken, strict=True))


def _compaction(manifest: Manifest, stages: Sequence[Stage]) -> list[EngineSession]:
    """Behind each stage but the last, what takes rows of its live values, in the order of `carry`.

    Stages that pass on values of the same kinds share a session: on CUDA each holds libraries' handles and memory.
    """
    known = {spec.name: kind_of(spec) for spec in manifest.inputs}  # a model need not read all its stage is said to
    known |= {name: kind for stage in stages for name, kind in stage.session.kinds.items()}
    passed = [tuple(known[name] for name in (*stage.kept, *stage.passes_on)) for stage in stages[:-1]]
    like = stages[0].session
    made = {
        kinds: EngineSession(gather_model(kinds), "compaction", like.providers, like.threads, strict=True)
        for kinds in dict.fromkeys(passed)
    }
    return [made[kinds] for kinds in passed]


def padded(array: np.ndarray, size: int) -> np.ndarray:
    """[n, ...] -> [size, ...], the first row repeated behind the others."""
    short = size - len(array)
    return np.concatenate([array, np.repeat(array[:1], short, axis=0)]) if short else array
