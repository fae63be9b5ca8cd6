"""What every stage of an artifact takes on this machine, asked for its answer and not, at the sizes batches shrink to.

On a GPU the times are those that `OnDevice` meets: values lie on the device before and after, confidences go to the
host. The clock is the only thing here that differs from run to run; what is made of the times is in `tune`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .artifact import Artifact
from .engine import HOST, EngineSession, ModelBytes, choose_providers, device_of, start_sessions, upload
from .errors import UsageError
from .execution import ASK, CONFIDENCE, PROBABILITIES
from .gather import ROWS, gather_model, kind_of
from .manifest import ANY, StageSpec, TensorSpec

ROUNDS = 15
_SECONDS = 0.01  # of one stage per round: long enough for the clock, short enough to take turns
_FREE = 16  # a size the model leaves open, where no data is given


@dataclass(frozen=True, eq=False)
class StageTimes:
    """Milliseconds per call, medians over rounds."""

    sizes: tuple[int, ...]  # rows, ascending
    silent: np.ndarray  # [stages, sizes] the exit not asked; of the last stage, which has none, the whole
    asked: np.ndarray  # [stages, sizes] the exit asked
    gather: np.ndarray  # [stages] of taking one row of all that the stage passes on; 0 of the last

    def worth_dropping(self) -> tuple[float, ...]:
        """[stages - 1] share of a batch's rows that must be answered for compaction behind a stage to pay.

        Dropping c of n rows costs the gathering of n - c, and saves the next stage c rows' time. Where a stage takes
        no longer for more rows, only a whole batch is worth it.
        """
        shares = []
        for stage in range(len(self.silent) - 1):
            saved = self._of_one_more_row(stage + 1)
            shares.append(float(self.gather[stage] / (self.gather[stage] + saved)) if saved > 0 else 1.0)
        return tuple(shares)

    def _of_one_more_row(self, stage: int) -> float:
        """Milliseconds, at the largest sizes measured; of a single size, its share."""
        times, sizes = self.silent[stage], self.sizes
        if len(sizes) == 1:
            return float(times[0] / sizes[0])
        return float((times[-1] - times[-2]) / (sizes[-1] - sizes[-2]))

    def call(self, stage: int, rows: np.ndarray | float, ask: bool) -> np.ndarray:
        """Milliseconds of one call on so many rows; linear between what was measured, 0 for none."""
        times = (self.asked if ask else self.silent)[stage]
        found = np.interp(rows, self.sizes, times)
        return np.where(np.asarray(rows) > 0, found, 0.0)


def measure_stages(
    artifact: Artifact,
    batch: int,
    threads: int | None,
    rounds: int = ROUNDS,
    rows: Mapping[str, np.ndarray] | None = None,
) -> StageTimes:
    """Time every stage; `rows` are inputs to do so on, the first `batch` of them; zeros where none are given.

    Raises `UsageError` for an artifact without stages.
    """
    manifest = artifact.manifest
    if not manifest.stages:
        raise UsageError(f"{artifact.path}: has no stages to measure; compile with target onnx-segments")
    sizes = tuple(sorted({batch, *(2**power for power in range(batch.bit_length()) if 2**power <= batch)}))
    given = {spec.name: _zeros(spec, batch) for spec in manifest.inputs} if rows is None else rows
    return time_stages(manifest.stages, artifact.model, sizes, threads, rounds, given)


def time_stages(
    stages: Sequence[StageSpec],
    model: Callable[[str], ModelBytes],
    sizes: tuple[int, ...],
    threads: int | None,
    rounds: int,
    rows: Mapping[str, np.ndarray],
) -> StageTimes:
    """Time stages whose models `model` finds by their file names, each on so many of the inputs `rows` in turn."""
    batch = max(sizes)
    calls, gather = [], np.zeros(len(stages))
    models = ((spec.file, model(spec.file)) for spec in stages)
    sessions = start_sessions(models, choose_providers(None), threads, strict=False)
    device = device_of(sessions)
    live = {name: np.ascontiguousarray(values[:batch]) for name, values in rows.items()}
    for spec, session in zip(stages, sessions, strict=True):
        calls.append(_Calls(session, {name: live[name] for name in spec.inputs}, spec.outputs, device))
        known = {**live, **calls[-1].passed()}
        live = {name: known[name] for name in spec.carries}
        gather[len(calls) - 1] = _gathering(live, batch, device, session)
    taken = np.empty((rounds, 2, len(calls), len(sizes)))
    for one in calls:
        one.warm(sizes)
    for turn in range(rounds):
        for ask in (0, 1) if turn % 2 else (1, 0):
            for stage, one in enumerate(calls):
                taken[turn, ask, stage] = [one.milliseconds(size, bool(ask)) for size in sizes]
    silent, asked = np.median(taken, axis=0)
    return StageTimes(sizes, silent, np.maximum(silent, asked), gather)


def _gathering(live: Mapping[str, np.ndarray], batch: int, device: str | None, like: EngineSession) -> float:
    """Milliseconds per row of taking all rows of every value."""
    if not live:
        return 0.0
    take = _taking(live, np.arange(batch), device, like)
    taken = []
    for _ in range(2 * ROUNDS):
        start = time.perf_counter()
        take()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken)) * 1e3 / batch


def _taking(
    live: Mapping[str, np.ndarray], rows: np.ndarray, device: str | None, like: EngineSession
) -> Callable[[], object]:
    """Compaction as the executor does it at worst: rows that lie apart, into new memory."""
    if device is None:
        return lambda: [value.take(rows, axis=0) for value in live.values()]
    kinds = [kind_of(TensorSpec(name, value.dtype.name, value.shape)) for name, value in live.items()]
    session = EngineSession(gather_model(kinds), "compaction", like.providers, like.threads, strict=False)
    placed = {f"v{at}": upload(value, device) for at, value in enumerate(live.values())}
    wanted = {f"g{at}": device for at in range(len(live))}
    return lambda: session.run_bound(wanted, {ROWS: upload(rows, device), **placed})


class _Calls:
    """One stage and a batch for it."""

    def __init__(
        self, session: EngineSession, batch: Mapping[str, np.ndarray], outputs: Sequence[str], device: str | None
    ) -> None:
        self.session, self.batch, self.outputs, self.device = session, batch, list(outputs), device
        self.gated = ASK in session.inputs
        self.often: dict[int, int] = {}  # calls per measurement, by rows

    def passed(self) -> dict[str, np.ndarray]:
        """Values for later stages."""
        values = self.session.run(self.outputs, self._feed(None, False)) if self.outputs else []
        return dict(zip(self.outputs, values, strict=True))

    def warm(self, sizes: Sequence[int]) -> None:
        for size in sizes:
            self.often[size] = 1
            self.milliseconds(size, True)
            self.often[size] = max(1, round(_SECONDS * 1e3 / max(self.milliseconds(size, True), 1e-3)))

    def milliseconds(self, rows: int, ask: bool) -> float:
        """Of one call; a silent exit that is no branch of its own is merely not fetched."""
        answer = [name for name in (PROBABILITIES, CONFIDENCE) if name in self.session.outputs]
        call = self._call(self._feed(rows, ask), [*self.outputs, *(answer if ask or not self.outputs else [])])
        start = time.perf_counter()
        for _ in range(self.often[rows]):
            call()
        return (time.perf_counter() - start) * 1e3 / self.often[rows]

    def _call(self, feed: dict[str, np.ndarray], fetched: list[str]) -> Callable[[], object]:
        if self.device is None:
            return lambda: self.session.run(fetched, feed)
        device = self.device
        placed = {name: upload(value, HOST if name == ASK else device) for name, value in feed.items()}
        wanted = {name: HOST if name == CONFIDENCE else device for name in fetched or self.session.outputs}
        return lambda: self.session.run_bound(wanted, placed)

    def _feed(self, rows: int | None, ask: bool) -> dict[str, np.ndarray]:
        feed = {name: value[:rows] for name, value in self.batch.items()}
        return {**feed, ASK: np.array(ask)} if self.gated else feed


def _free(spec: TensorSpec, dimension: str) -> int:
    least, most = spec.ranges.get(dimension, ANY)
    return max(least, _FREE if most is None else min(most, _FREE))


def _zeros(spec: TensorSpec, rows: int) -> np.ndarray:
    """Valid indices and valid masks alike."""
    shape = [rows, *(size if isinstance(size, int) else _free(spec, size) for size in spec.shape[1:])]
    made = np.zeros(shape, spec.dtype)
    return made + np.ones((), spec.dtype) if made.dtype.kind in "iub" and "mask" in spec.name else made
