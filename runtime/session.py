"""A loaded artifact: batches in, answers out, each row from the first exit that is confident enough.

`load` opens and checks an artifact and builds its ONNX Runtime sessions; `Session` answers with `run`,
`stream` and `run_all`. Batches hold any number of rows from 0 up. A session keeps no state between calls, so
several threads may use one at the same time.

Refused: what `open_artifact`, `engine` and `inputs` refuse, thresholds that do not match the exits, a form of
the artifact that is not in it, a session that was closed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .always_asked import always_asked
from .artifact import Artifact, open_artifact
from .engine import CUDA, EngineSession, choose_providers, device_of, start_sessions
from .errors import ProviderError, UsageError
from .execution import Executor, ExitRows, Segments, SingleFile, Thresholds, WholeBatch, joined
from .inputs import Batch, Known, check_batch, check_tolerance, remember
from .manifest import Manifest, Plan, TensorSpec
from .on_device import OnDevice
from .process import check_threads
from .replayed import Replayed

SINGLE_FILE = "model.onnx"


@dataclass(frozen=True)
class Answers:
    """One answer per row, from the exit it left at."""

    classes: np.ndarray  # [B] int64
    probabilities: np.ndarray  # [B, K] float32
    exits: np.ndarray  # [B] int64; 0 is the shallowest, the last is the backbone's own output
    confidence: np.ndarray  # [B] float32


@dataclass(frozen=True)
class AllAnswers:
    """Every exit's answer for every row."""

    classes: np.ndarray  # [E, B] int64
    probabilities: np.ndarray  # [E, B, K] float32
    confidence: np.ndarray  # [E, B] float32


OnExit = Callable[[np.ndarray, Answers], None]


def load(
    path: str | os.PathLike[str],
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    executor: Literal["segments", "single-file"] | None = None,
    tolerance: float | None = None,
    cuda_graphs: bool = False,
) -> Session:
    """Check the artifact at `path` and make it ready to answer.

    `providers` are ONNX Runtime's, in order of preference; None takes CUDA where it is there, then the CPU, and warns
    with `ProviderWarning` where CUDA is there but does not start. Those given by name must all start.
    `threads` is the number of threads a stage may use; None is ONNX Runtime's own, the physical cores, and
    right where they are free. Where others compute too, 1 is several times faster.
    `executor` picks a form where the artifact holds both; None prefers its stages.
    `tolerance` turns the dial: the boldest of the artifact's plans that is within it answers; 0 gives the backbone's
    own answers, None the plan it was compiled for.
    `cuda_graphs` has CUDA capture every stage at every size that batches are padded to, and replay it: for small models
    on a GPU. Memory for each size stays taken, threads take turns, and heads are asked whether the plan wants them or
    not. What cannot be captured runs without, with a `ProviderWarning`.
    """
    check_threads(threads)
    if executor not in (None, "segments", "single-file"):
        raise UsageError(f"executor is {executor!r}; give 'segments', 'single-file' or None")
    chosen = choose_providers(providers)
    artifact = open_artifact(path)
    manifest = artifact.manifest
    manifest.plan(tolerance)  # refuses a wrong tolerance before models are read
    if not manifest.stages and SINGLE_FILE not in manifest.files:
        raise UsageError(
            f"{path}: holds TorchScript only, which torch and libtorch run and this runtime does not; "
            "compile with target onnx-segments or onnx too"
        )
    staged = bool(manifest.stages) if executor is None else executor == "segments"
    files = [stage.file for stage in manifest.stages] if staged else [SINGLE_FILE]
    if not files or not all(name in manifest.files for name in files):
        raise UsageError(f"{path}: holds no {executor} form; leave executor out or compile with that target")
    models = ((f"{path}/{name}", artifact.model(name)) for name in files)
    if cuda_graphs:
        _check_graphs(manifest, staged, chosen)
        models = ((name, always_asked(model, name)) for name, model in models)
    sessions = start_sessions(models, chosen, threads, strict=providers is not None, graphs=cuda_graphs)
    return Session(artifact, _executor(manifest, sessions, staged, cuda_graphs), tolerance)


def _check_graphs(manifest: Manifest, staged: bool, providers: Sequence[str]) -> None:
    if CUDA not in providers:
        raise ProviderError(f"CUDA graphs need {CUDA}, and providers are {', '.join(providers)}; do without them here")
    if not staged:
        raise UsageError("CUDA graphs are of stages, and the single file is one model with branches; do without them")
    for spec in manifest.inputs:
        if any(isinstance(size, str) for size in spec.shape[1:]):
            raise UsageError(
                f"CUDA graphs are of rows of one size, and those of {spec.name!r} are {spec.shape}; do without them"
            )


def _executor(manifest: Manifest, sessions: list[EngineSession], staged: bool, graphs: bool) -> Executor:
    if not staged:
        return SingleFile(manifest, sessions[0])
    device = device_of(sessions)
    if device is None:
        return Segments(manifest, sessions)
    return Replayed(manifest, sessions, device) if graphs else OnDevice(manifest, sessions, device)


class Session:
    """Answers batches with one artifact; made by `load`."""

    def __init__(self, artifact: Artifact, executor: Executor, tolerance: float | None = None) -> None:
        self._manifest = artifact.manifest
        self._path = artifact.path
        self._executor: Executor | None = executor
        self._plan = self._manifest.plan(tolerance)
        self._thresholds = _floats(np.array(self._manifest.thresholds(tolerance), np.float32))
        # What calls gave lately, and the thresholds it comes to: to work them out takes as long as a small stage.
        self._known: dict[float | tuple[float, ...], Thresholds] = {}
        self._kinds: Known = {}

    @property
    def manifest(self) -> Manifest:
        """What the artifact says of itself."""
        return self._manifest

    @property
    def plan(self) -> Plan | None:
        """The plan that answers where a call states none; None: the backbone alone."""
        return self._plan

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of every input."""
        return self._manifest.inputs

    @property
    def classes(self) -> int:
        """K, the number of classes."""
        return self._manifest.classes

    @property
    def exits(self) -> int:
        """E, the number of exits, the backbone's own output included."""
        return len(self._manifest.exits)

    def run(
        self,
        batch: Batch,
        *,
        tolerance: float | np.ndarray | None = None,
        thresholds: Sequence[float] | None = None,
        on_exit: OnExit | None = None,
    ) -> Answers:
        """One answer per row, in the order of the batch.

        `tolerance` turns the dial for this call, see `load`; an array [B] turns it row by row. `thresholds` [E-1] take
        the place of any plan's; infinity silences an exit. Give one of the two at most.
        `on_exit(rows, answers)` is called with the rows of each exit as soon as they are answered.
        """
        arrays, rows, limits, executor = self._prepare(batch, tolerance, thresholds)
        if not rows:
            return _empty(self.classes)
        if on_exit is None:
            return _whole(executor.answer_together(arrays, limits))
        parts = []
        for leaving in executor.answer(arrays, limits):
            on_exit(_indices(leaving), _answers(leaving))
            parts.append(leaving)
        return _whole(joined(parts, rows))

    def stream(
        self,
        batch: Batch,
        *,
        tolerance: float | np.ndarray | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> Iterator[tuple[np.ndarray, Answers]]:
        """Yield (rows [n] int64, their answers), shallowest exit first; the rest as for `run`.

        A stage runs only when the rows that need it are asked for, so leaving the loop saves the rest. The
        single file answers all rows at once; only their order is kept.
        """
        arrays, rows, limits, executor = self._prepare(batch, tolerance, thresholds)
        # A generator of its own: what is wrong with the batch is said here, not at the first step.
        return _stream(executor.answer(arrays, limits)) if rows else iter(())

    def run_all(self, batch: Batch) -> AllAnswers:
        """Every exit's answer for every row: no row leaves, so this costs more than the backbone."""
        arrays, rows, _, executor = self._prepare(batch, None, None)
        probabilities = np.empty((self.exits, rows, self.classes), np.float32)
        confidence = np.empty((self.exits, rows), np.float32)
        for leaving in executor.answer_all(arrays) if rows else ():
            probabilities[leaving.exit] = leaving.probabilities
            confidence[leaving.exit] = leaving.confidence
        return AllAnswers(probabilities.argmax(axis=2), probabilities, confidence)

    def close(self) -> None:
        """Let go of the models; calls that are running finish."""
        self._executor = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(
        self, batch: Batch, tolerance: float | np.ndarray | None, thresholds: Sequence[float] | None
    ) -> tuple[dict[str, np.ndarray], int, Thresholds | np.ndarray, Executor]:
        executor = self._executor
        if executor is None:
            raise UsageError(f"{self._path}: this session was closed; load the artifact again")
        arrays, rows = check_batch(batch, self._manifest.inputs, self._kinds)
        if tolerance is not None:
            if thresholds is not None:
                raise UsageError("both a tolerance and thresholds are given; give one of them")
            return arrays, rows, self._turned(tolerance, rows), executor
        limits = self._thresholds if thresholds is None else self._limits(thresholds)
        return arrays, rows, limits, executor

    def _turned(self, tolerance: float | np.ndarray, rows: int) -> Thresholds | np.ndarray:
        """Thresholds [E-1] of a tolerance, or [B, E-1] of one for every row."""
        # In one step, for another thread may forget it between two.
        if type(tolerance) is float and (known := self._known.get(tolerance)) is not None:
            return known
        limits = check_tolerance(tolerance, rows, self._manifest)
        if limits.ndim > 1:
            return limits
        return remember(self._known, tolerance, _floats(limits)) if type(tolerance) is float else _floats(limits)

    def _limits(self, thresholds: Sequence[float]) -> Thresholds:
        try:
            return self._known[tuple(thresholds)]
        except (KeyError, TypeError):
            pass  # they are new, or no thresholds at all
        try:
            given = np.asarray(thresholds)
            if given.dtype.kind not in "fiu":
                raise TypeError(f"{given.dtype} is no number")
        except (TypeError, ValueError) as error:
            raise UsageError(f"thresholds {thresholds!r:.80} are not numbers; give {self.exits - 1} of them") from error
        with np.errstate(over="ignore"):
            limits = given.astype(np.float32)
        if limits.shape != (self.exits - 1,) or bool(np.isnan(limits).any()):
            raise UsageError(
                f"thresholds {np.array2string(limits, threshold=8)} do not fit; "
                f"give {self.exits - 1} numbers, one per exit but the last, infinity for never"
            )
        return remember(self._known, tuple(thresholds), _floats(limits))


def _floats(limits: np.ndarray) -> Thresholds:
    """float32 values as Python's floats, which hold them exactly."""
    return tuple(limits.tolist())


def _stream(parts: Iterator[ExitRows]) -> Iterator[tuple[np.ndarray, Answers]]:
    for leaving in parts:
        yield _indices(leaving), _answers(leaving)


def _answers(leaving: ExitRows) -> Answers:
    exits = np.empty(len(leaving.confidence), np.int64)
    exits.fill(leaving.exit)
    return Answers(leaving.probabilities.argmax(axis=1), leaving.probabilities, exits, leaving.confidence)


def _whole(batch: WholeBatch) -> Answers:
    return Answers(batch.probabilities.argmax(axis=1), batch.probabilities, batch.exits, batch.confidence)


def _indices(leaving: ExitRows) -> np.ndarray:
    return np.arange(len(leaving.confidence)) if leaving.rows is None else leaving.rows


def _empty(classes: int) -> Answers:
    return Answers(
        np.empty(0, np.int64), np.empty((0, classes), np.float32), np.empty(0, np.int64), np.empty(0, np.float32)
    )
