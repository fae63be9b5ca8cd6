"""One stage on chunks of many requests: joined, run, parted again.

A value of a batch that one chunk fills is not copied on its way in. Rows that go on are copied out of the batch, so
that no survivor keeps the values of those that left. Dropping rows is never put off (the manifest's `worth_dropping`
is about one request alone): whoever left makes room for another request's rows.

A run that fails costs the request that caused it and no other: the chunks are run again one by one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import OfframpError
from ..execution import ASK, Stage, carry
from ..inputs import Arrays
from .requests import Chunk

_log = logging.getLogger(__name__)

Ran = Callable[[int, float], None]  # rows of a call of the stage, and the seconds it took


@dataclass(frozen=True)
class Outcome:
    """What a stage said to one chunk."""

    chunk: Chunk
    leaves: np.ndarray  # [n] bool: sure enough
    probabilities: np.ndarray  # [n, K] float32; [0, K] where the head was not asked
    confidence: np.ndarray  # [n] float32; [0] where the head was not asked
    onward: Chunk | None  # rows the next stage may have to see, with the values it reads
    error: OfframpError | None = None

    @property
    def spoken(self) -> bool:
        """Whether the head was asked."""
        return len(self.confidence) > 0


def run_joined(stage: Stage, index: int, last: bool, chunks: Sequence[Chunk], ran: Ran) -> list[Outcome]:
    """One outcome per chunk, in their order; all chunks wait for stage `index`, with values of the same shapes.

    Raises nothing but what `ran` does: what goes wrong is the outcome of the chunk it went wrong for.
    """
    try:
        return _run(stage, index, last, chunks, ran)
    except Exception as error:  # noqa: BLE001  # whatever it is, it must not cost the rows of other requests
        if len(chunks) == 1:
            return [failed(chunks[0], error)]
    return [outcome for chunk in chunks for outcome in run_joined(stage, index, last, [chunk], ran)]


def failed(chunk: Chunk, error: Exception) -> Outcome:
    """The outcome of a chunk that could not be run."""
    nobody = np.zeros(len(chunk.rows), bool)
    return Outcome(chunk, nobody, np.empty((0, 0), np.float32), np.empty(0, np.float32), None, as_ours(error))


def as_ours(error: Exception) -> OfframpError:
    """The error itself where it is meant for people; else one that says that it was not foreseen."""
    if isinstance(error, OfframpError):
        return error
    ours = OfframpError(f"the server failed on these rows ({type(error).__name__}: {error}); report this, with its log")
    ours.__cause__ = error
    _log.error("the server failed on a chunk of rows", exc_info=error)
    return ours


def _run(stage: Stage, index: int, last: bool, chunks: Sequence[Chunk], ran: Ran) -> list[Outcome]:
    rows = sum(len(chunk.rows) for chunk in chunks)
    ask = last or any(chunk.live and chunk.request.wants(chunk.rows, index) for chunk in chunks)
    feed = {name: _joined([chunk.values[name] for chunk in chunks]) for name in stage.inputs}
    if stage.asks:
        feed[ASK] = np.array(ask)
    names = stage.fetched if ask else stage.kept
    values = _call(stage, names, feed, rows, ran) if names else []
    confidence, probabilities = (values.pop(), values.pop()) if ask else (None, None)
    outcomes, start = [], 0
    for chunk in chunks:
        part = slice(start, start + len(chunk.rows))
        start = part.stop
        said = confidence[part] if confidence is not None else np.empty(0, np.float32)
        shares = probabilities[part] if probabilities is not None else np.empty((0, 0), np.float32)
        leaves = _leaves(chunk, index, last, said)
        onward = None if last else _onward(stage, index, chunk, leaves, [value[part] for value in values])
        outcomes.append(Outcome(chunk, leaves, shares, said, onward))
    return outcomes


def _call(stage: Stage, names: list[str], feed: Arrays, rows: int, ran: Ran) -> list[np.ndarray]:
    begun = time.monotonic()
    try:
        return stage.session.run(names, feed)
    finally:
        ran(rows, time.monotonic() - begun)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _leaves(chunk: Chunk, index: int, last: bool, confidence: np.ndarray) -> np.ndarray:
    if last or not chunk.live or not len(confidence):
        return np.full(len(chunk.rows), last)
    leaves: np.ndarray = confidence >= chunk.request.limit(chunk.rows, index)
    return leaves


def _onward(stage: Stage, index: int, chunk: Chunk, leaves: np.ndarray, kept: list[np.ndarray]) -> Chunk | None:
    """The rows that stay and those that are watched, with what later stages read."""
    goes = ~leaves
    if len(chunk.request.kept):
        goes |= chunk.request.watched[chunk.rows]
    if not np.count_nonzero(goes):  # a third of the time that `any` takes
        return None
    since = chunk.since if index else time.monotonic()
    return Chunk(chunk.request, chunk.rows, carry(stage, chunk.values, kept), since, chunk.live).only(goes)
