"""Counts of what happens to one model, kept by `metrics` and read by `/metrics` and `/v1/stats`."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_WINDOW = 10.0  # seconds that percentiles look back
_CHUNKS = 1024  # deliveries that percentiles look back at most
_FEW = 64  # observations that are sorted one by one, which for so few is quicker than numpy


class Histogram:
    """Observations by upper bound, cumulated when read."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)  # the last: above every bound
        self._sum = 0.0

    def add(self, values: np.ndarray) -> None:
        """[n] observations."""
        if len(values) <= _FEW:
            for value in values.tolist():
                self.add_one(value)
            return
        places = np.searchsorted(self._bounds, values)
        found = np.bincount(places, minlength=len(self._counts)).tolist()
        self._counts = [before + more for before, more in zip(self._counts, found, strict=True)]
        self._sum += float(values.sum())

    def add_one(self, value: float) -> None:
        """One observation."""
        self._counts[bisect_left(self._bounds, value)] += 1  # a value at a bound belongs below it
        self._sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it), as Prometheus counts them."""
        names = [*(repr(float(bound)) for bound in self._bounds), "+Inf"]
        return list(zip(names, map(float, itertools.accumulate(self._counts)), strict=True))

    @property
    def sum(self) -> float:
        return self._sum

    @property
    def count(self) -> int:
        return sum(self._counts)


class Recent:
    """Latencies of the last seconds."""

    def __init__(self) -> None:
        self._chunks: deque[tuple[float, np.ndarray]] = deque(maxlen=_CHUNKS)

    def add(self, now: float, seconds: np.ndarray) -> None:
        """[n] latencies of rows that were answered now."""
        self._chunks.append((now, seconds))

    def percentiles(self, now: float, shares: Sequence[float]) -> list[float] | None:
        """In seconds, for shares in percent; None where no row was answered lately."""
        while self._chunks and self._chunks[0][0] < now - _WINDOW:
            self._chunks.popleft()
        if not self._chunks:
            return None
        found: list[float] = np.percentile(np.concatenate([chunk for _, chunk in self._chunks]), shares).tolist()
        return found


@dataclass
class PlannedTally:
    """Watched rows of one version that its default plan answered."""

    rows: int = 0
    risk: float = 0.0  # of their answers, summed


@dataclass
class ExitTally:
    """Rows that left at one exit."""

    rows: int = 0
    seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    recent: Recent = field(default_factory=Recent)
    watched: int = 0  # rows answered here that ran on to the end
    disagree: int = 0  # of those, answered otherwise by the backbone
    planned: dict[str, PlannedTally] = field(default_factory=dict)  # of the watched, by the version's digest

    def planned_of(self, version: str) -> PlannedTally:
        """Made where it has none."""
        return self.planned.setdefault(version, PlannedTally())


@dataclass
class StageTally:
    """Calls of one stage."""

    seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    rows: Histogram = field(default_factory=lambda: Histogram(ROWS))
    loads: int = 0
    load_seconds: float = 0.0  # of all loads
    evictions: int = 0


@dataclass
class ModelTally:
    """Everything of one model."""

    requests: int = 0
    rows: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # requests, by reason
    refused_rows: Counter[str] = field(default_factory=Counter)
    failed: int = 0  # rows
    cancelled: int = 0  # rows
    short: int = 0  # rows
    exits: dict[int, ExitTally] = field(default_factory=dict)
    stages: dict[int, StageTally] = field(default_factory=dict)

    def exit(self, index: int) -> ExitTally:
        found = self.exits.get(index)
        if found is None:
            found = self.exits[index] = ExitTally()
        return found

    def stage(self, index: int) -> StageTally:
        found = self.stages.get(index)
        if found is None:
            found = self.stages[index] = StageTally()
        return found
