"""Exits at work: rows of a batch to (rows, exit, probabilities, confidence), shallowest exit first.

Three executors give the same answers. `Segments` runs one model per stage and compacts between them: rows that
left are dropped from every value a later stage reads, so an answered row costs nothing more and can be handed
over at once. Where the manifest says that dropping so few does not pay, they are carried along unread until it does.
`SingleFile` runs `model.onnx`, which compacts inside; it answers all rows together. The third, `OnDevice`, has a file
of its own: it does what `Segments` does with values that stay on a GPU.

A row leaves at the first exit with confidence >= threshold, both float32; an exit whose threshold is infinite
never answers. Thresholds are the batch's or, as an array, each row's own. All are read-only after
construction, so threads may share them.

Refused at construction: a stage whose model does not read and give what the manifest says, a value no earlier
stage gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from .engine import EngineSession
from .errors import ArtifactError
from .inputs import Arrays
from .manifest import Manifest, StageSpec

V = TypeVar("V")  # a value, wherever it lies

Thresholds = tuple[float, ...]  # [exits - 1] float32 values
_NEVER = float("inf")
PROBABILITIES = "probabilities"
CONFIDENCE = "confidence"
ASK = "offramp.ask"  # input of a stage whose head may be left unasked
_YES, _NO = np.array(True), np.array(False)
_NOBODY = np.empty(0, np.int64)
_LARGE = 1 << 25  # bytes; glibc maps every larger piece of memory anew, page by page, whatever was freed before
_FEW = 64  # rows; a loop over them in Python takes less than numpy's three calls


def _margin(probabilities: np.ndarray) -> np.ndarray:
    two = np.partition(probabilities, -2, axis=1)[:, -2:]
    return np.asarray(two[:, 1] - two[:, 0])


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    known = (probabilities * np.log(np.maximum(probabilities, _TINY))).sum(axis=1)
    return np.asarray(np.clip(1 + known / np.float32(math.log(probabilities.shape[1])), 0, 1))


_TINY = np.float32(1e-30)
# [rows, K] -> [rows], as the stages compute it; the single file gives probabilities only.
METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "max_probability": lambda probabilities: np.asarray(probabilities.max(axis=1)),
    "margin": _margin,
    "entropy": _entropy,
}


class ExitRows(NamedTuple):
    """Rows that leave at an exit, with its answers."""

    exit: int
    rows: np.ndarray | None  # [n] int64, indices into the batch; None: the whole batch
    probabilities: np.ndarray  # [n, K] float32
    confidence: np.ndarray  # [n] float32


class WholeBatch(NamedTuple):
    """All rows of a batch in their order, however they left."""

    probabilities: np.ndarray  # [B, K] float32
    confidence: np.ndarray  # [B] float32
    exits: np.ndarray  # [B] int64


def joined(parts: Sequence[ExitRows], rows: int) -> WholeBatch:
    """All rows of a batch, each of which is in one of the parts."""
    first = parts[0]
    exits = _alike(first.exit, rows)
    if first.rows is None:
        return WholeBatch(first.probabilities, first.confidence, exits)
    probabilities, confidence = (
        np.empty((rows, *known.shape[1:]), np.float32) for known in (first.probabilities, first.confidence)
    )
    for part in parts:
        probabilities[part.rows], confidence[part.rows] = part.probabilities, part.confidence
        exits[part.rows] = part.exit
    return WholeBatch(probabilities, confidence, exits)


def written(
    said: WholeBatch | None, rows: np.ndarray | None, index: int, probabilities: np.ndarray, confidence: np.ndarray
) -> WholeBatch:
    """What was said so far, an exit's answers for `rows` of the batch written over it; the first speaks for all."""
    if said is None:
        return WholeBatch(probabilities, confidence, _alike(index, len(confidence)))
    said.probabilities[rows], said.confidence[rows], said.exits[rows] = probabilities, confidence, index
    return said


def _alike(exit_: int, rows: int) -> np.ndarray:
    exits = np.zeros(rows, np.int64)
    if exit_:
        exits.fill(exit_)
    return exits


class Executor(Protocol):
    """What a session asks of either form of the artifact. Batches are checked and hold at least one row."""

    def answer(self, arrays: Arrays, thresholds: Thresholds | np.ndarray) -> Iterator[ExitRows]:
        """Rows as they leave; a later exit is computed only when its rows are asked for."""

    def answer_together(self, arrays: Arrays, thresholds: Thresholds | np.ndarray) -> WholeBatch:
        """The same, where nobody waits for the first."""

    def answer_all(self, arrays: Arrays) -> Iterator[ExitRows]:
        """The whole batch from every exit in turn."""


@dataclass(frozen=True)
class Stage:
    """One model, and what is asked of it."""

    session: EngineSession
    inputs: tuple[str, ...]  # values
    asks: bool  # whether its head may be left unasked
    kept: list[str]  # outputs a later stage reads; the others are not even fetched
    fetched: list[str]  # kept, then probabilities and confidence
    passes_on: list[str]  # what later stages read and this one does not make

    @staticmethod
    def of(spec: StageSpec, session: EngineSession) -> Stage:
        """The stage that a session runs, as the manifest says of it."""
        kept = [name for name in spec.outputs if name in spec.carries]
        passes_on = [name for name in spec.carries if name not in kept]
        reads = tuple(name for name in session.inputs if name != ASK)
        return Stage(session, reads, ASK in session.inputs, kept, [*kept, PROBABILITIES, CONFIDENCE], passes_on)

    def ask(self, live: Arrays) -> list[np.ndarray]:
        """Run it -> the values kept, probabilities, confidence."""
        feed = {name: live[name] for name in self.inputs}
        if self.asks:
            feed[ASK] = _YES
        return self.session.run(self.fetched, feed)

    def go_through(self, live: Arrays) -> Arrays:
        """Run it for what it passes on, its head unasked -> live values after it."""
        feed = {name: live[name] for name in self.inputs}
        if self.asks:
            feed[ASK] = _NO
        return carry(self, live, self.session.run(self.kept, feed) if self.kept else [])


class Staged:
    """One model per stage: the rows that leave, exit by exit, to whoever wants them one after the other or together."""

    def _partings(
        self, arrays: Arrays, thresholds: Thresholds | np.ndarray
    ) -> Iterator[tuple[WholeBatch, int, np.ndarray]]:
        """Every exit that rows leave at: all that was said so far, the exit, and which of the batch's rows go on.

        Those that go on have this exit's answers until a later one writes its own over them.
        """
        raise NotImplementedError

    def answer(self, arrays: Arrays, thresholds: Thresholds | np.ndarray) -> Iterator[ExitRows]:
        for (probabilities, confidence, exits), index, on in self._partings(arrays, thresholds):
            leaves = exits == index
            leaves[on] = False
            gone = leaves.nonzero()[0]
            if len(gone) == len(exits):
                yield ExitRows(index, None, probabilities, confidence)
            else:
                yield ExitRows(index, gone, probabilities.take(gone, axis=0), confidence.take(gone))

    def answer_together(self, arrays: Arrays, thresholds: Thresholds | np.ndarray) -> WholeBatch:
        said, _, _ = list(self._partings(arrays, thresholds))[-1]
        return said


class Segments(Staged):
    """One model per stage, compaction between them."""

    def __init__(self, manifest: Manifest, sessions: Sequence[EngineSession]) -> None:
        self._stages = chain(manifest, sessions)
        # Never for all rows: a batch that is answered whole goes no further anyway.
        self._worth = manifest.measured.worth_dropping or (0.0,) * len(self._stages)

    def _partings(
        self, arrays: Arrays, thresholds: Thresholds | np.ndarray
    ) -> Iterator[tuple[WholeBatch, int, np.ndarray]]:
        # Between two stages the caches are ONNX Runtime's: every Python step here costs several times what it
        # costs in a loop of its own, at batch 1 a twentieth of a small model in all.
        live = arrays
        on: np.ndarray | None = None  # rows of the batch not answered yet, ascending; None: all
        waiting: np.ndarray | None = None  # where they are among the live rows; None: they are the live rows
        said: WholeBatch | None = None
        last = len(self._stages) - 1
        each = thresholds if isinstance(thresholds, np.ndarray) else None  # [rows, exits - 1]
        for index, stage in enumerate(self._stages):
            limit: float | np.ndarray = -_NEVER
            if index < last:
                limit = thresholds[index] if each is None else limits_of(each, on, index)
            if type(limit) is float and limit == _NEVER:
                live = stage.go_through(live)
                continue
            values = stage.ask(live)
            confidence, probabilities = values.pop(), values.pop()
            count = len(confidence)
            if waiting is not None:
                confidence, probabilities = confidence.take(waiting), probabilities.take(waiting, axis=0)
            stays = staying(confidence, limit) if index < last else _NOBODY
            if stays is None:
                live = carry(stage, live, values)
                continue
            said = written(said, on, index, probabilities, confidence)
            on = stays if on is None else on.take(stays)
            yield said, index, on
            if not len(on):
                return
            live = carry(stage, live, values)
            waiting = stays if waiting is None else waiting.take(stays)
            if 1 - len(on) / count >= self._worth[index]:
                live, waiting = _taken(live, waiting, arrays), None

    def answer_all(self, arrays: Arrays) -> Iterator[ExitRows]:
        live = arrays
        for index, stage in enumerate(self._stages):
            values = stage.ask(live)
            confidence, probabilities = values.pop(), values.pop()
            yield ExitRows(index, None, probabilities, confidence)
            live = carry(stage, live, values)


class SingleFile:
    """`model.onnx`: the same program in one graph, thresholds as one of its inputs."""

    def __init__(self, manifest: Manifest, session: EngineSession) -> None:
        if manifest.confidence not in METRICS:
            raise ArtifactError(
                f"{session.name}: gives no confidence {manifest.confidence!r} per row; "
                "load the artifact with executor='segments'"
            )
        self._confidence = METRICS[manifest.confidence]
        self._exits = len(manifest.exits)
        names = {spec.name for spec in manifest.inputs}
        # With nothing but the backbone there is no threshold, and the file need not have the input.
        self._threshold_feed = self._exits > 1
        wanted = names | ({"thresholds"} if self._threshold_feed else set())
        missing = wanted - {*session.inputs, *session.overridable}
        missing |= {PROBABILITIES, "exit"} - {*session.outputs}
        if missing:
            raise ArtifactError(f"{session.name}: has no {sorted(missing)[0]!r}; compile the model again")
        self._session = session

    def answer(self, arrays: Arrays, thresholds: Thresholds | np.ndarray) -> Iterator[ExitRows]:
        batch = self.answer_together(arrays, thresholds)
        for index, count in enumerate(np.bincount(batch.exits).tolist()):
            if count == len(batch.exits):
                yield ExitRows(index, None, batch.probabilities, batch.confidence)
            elif count:
                rows = np.flatnonzero(batch.exits == index)
                yield ExitRows(index, rows, batch.probabilities[rows], batch.confidence[rows])

    def answer_together(self, arrays: Arrays, thresholds: Thresholds | np.ndarray) -> WholeBatch:
        if isinstance(thresholds, np.ndarray):
            probabilities, exits = self._row_by_row(arrays, thresholds)
        else:
            probabilities, exits = self._run(arrays, thresholds)
        return WholeBatch(probabilities, self._confidence(probabilities), exits)

    def _run(self, arrays: Arrays, thresholds: Thresholds | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        feed = {**arrays, "thresholds": np.array(thresholds, np.float32)} if self._threshold_feed else arrays
        probabilities, exits = self._session.run([PROBABILITIES, "exit"], feed)
        return probabilities, exits

    def _row_by_row(self, arrays: Arrays, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The file takes one set of thresholds, so rows that share theirs go together."""
        kinds, which = np.unique(thresholds, axis=0, return_inverse=True)
        groups = [np.flatnonzero(which.reshape(-1) == kind) for kind in range(len(kinds))]
        parts = [
            self._run({name: value[rows] for name, value in arrays.items()}, kind)
            for kind, rows in zip(kinds, groups, strict=True)
        ]
        back = np.argsort(np.concatenate(groups), kind="stable")
        probabilities, exits = (np.concatenate(values)[back] for values in zip(*parts, strict=True))
        return probabilities, exits

    def answer_all(self, arrays: Arrays) -> Iterator[ExitRows]:
        for index in range(self._exits):
            alone = tuple(-_NEVER if exit_ == index else _NEVER for exit_ in range(self._exits - 1))
            probabilities, confidence, exits = self.answer_together(arrays, alone)
            # A confidence that is no number is above no threshold: the row went on, and what it got is another exit's.
            unsure = exits != index
            probabilities[unsure], confidence[unsure] = np.nan, np.nan
            yield ExitRows(index, None, probabilities, confidence)


def chain(manifest: Manifest, sessions: Sequence[EngineSession]) -> list[Stage]:
    """The stages in their order. Raises `ArtifactError` where a model and the manifest differ."""
    return [stage_of(manifest, index, session) for index, session in enumerate(sessions)]


def stage_of(manifest: Manifest, index: int, session: EngineSession) -> Stage:
    """One stage alone. Raises `ArtifactError` where its model and the manifest differ."""
    spec = manifest.stages[index]
    known = {*manifest.stages[index - 1].carries} if index else {value.name for value in manifest.inputs}
    _check_stage(spec, session, known)
    return Stage.of(spec, session)


def staying(confidence: np.ndarray, limit: float | np.ndarray) -> np.ndarray | None:
    """Which rows do not leave, ascending; None: nobody leaves."""
    if type(limit) is float and len(confidence) <= _FEW:
        if len(confidence) == 1:
            return _NOBODY if confidence.item() >= limit else None
        scores = confidence.tolist()  # a Python float holds a float32 exactly
        if max(scores) < limit:  # not so where it is NaN
            return None
        stay = [row for row, score in enumerate(scores) if not score >= limit]
        if not stay:
            return _NOBODY
        return np.array(stay, np.int64) if len(stay) < len(scores) else None
    stays = (~(confidence >= limit)).nonzero()[0]
    return stays if len(stays) < len(confidence) else None


def _taken(live: Arrays, rows: np.ndarray, theirs: Arrays) -> Arrays:
    """The live values' `rows` [n], ascending, in place of all; what bears a name of `theirs` is left as it is."""
    first, after = rows.item(0), rows.item(-1) + 1
    if after - first == len(rows):  # they lie side by side
        return {name: value[first:after] for name, value in live.items()}
    return {
        name: _moved_up(value, rows) if _is_large(value) and name not in theirs else value.take(rows, axis=0)
        for name, value in live.items()
    }


def _is_large(value: np.ndarray) -> bool:
    return value.nbytes >= _LARGE and value.flags.writeable


def _moved_up(value: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A value's `rows`, over the memory of those before them: to get as much anew takes several times as long."""
    for to, at in enumerate(rows.tolist()):
        if to != at:
            value[to] = value[at]
    return value[: len(rows)]


def rows_of(arrays: Arrays) -> int:
    """B, the number of rows."""
    return len(next(iter(arrays.values())))


def limits_of(each: np.ndarray, rows: np.ndarray | None, index: int) -> float | np.ndarray:
    """These rows' own thresholds; where they are all the same, that one."""
    limits = each[:, index] if rows is None else each[rows, index]
    first = limits[0]
    return float(first) if (limits == first).all() else limits


def carry(stage: Stage, live: Mapping[str, V], values: Sequence[V]) -> dict[str, V]:
    """Values a later stage still reads; the rest are forgotten here, and with them their memory."""
    carried = dict(zip(stage.kept, values, strict=True))
    for name in stage.passes_on:
        carried[name] = live[name]
    return carried


def _check_stage(spec: StageSpec, session: EngineSession, known: set[str]) -> None:
    """Check a stage against the manifest and the values known before it."""
    absent = {*spec.inputs} - known | {*spec.carries} - known - {*spec.outputs}
    if absent:
        raise ArtifactError(
            f"{session.name}: needs {sorted(absent)[0]!r}, which no stage before it carries; compile again"
        )
    unnamed = {*session.inputs} - {*spec.inputs, ASK}
    unnamed |= {*spec.outputs, PROBABILITIES, CONFIDENCE} - {*session.outputs}
    if unnamed:
        raise ArtifactError(
            f"{session.name}: model and manifest differ on {sorted(unnamed)[0]!r}; compile the model again"
        )
