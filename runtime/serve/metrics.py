"""What the server counts: for Prometheus at `/metrics`, and as JSON at `/v1/stats` for the page.

`Metrics` is the server's `Observer`. Its counts are kept under one lock and cost a few microseconds for a whole batch
of rows; what Prometheus and the page need is made of them when they ask. What is in memory and what waits is asked of
the host and the engine at that moment.

Rows that ran on to the end in the background are a fair sample of all rows, whatever they asked for. The live risk is
that of those the default plan answered: rows of another tolerance and those that were cut short are not among them. It
is of the kind the artifact's tolerances bound, disagreement or regret, so it may stand beside what the artifact
promises: the tolerance of its default plan, and the bound of its certificate where it has one. Every version of a model
has a live risk of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..manifest import Manifest
from .recording import Recording
from .tally import ModelTally, StageTally
from .work import VERSION_LENGTH, Engine, Host, SegmentState, held

UNKNOWN = "(unknown)"  # all names that are not served: a client must not make labels
_SHARES = (50.0, 95.0)


class Metrics(Collector):
    """An `Observer` that counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[str, ModelTally] = {}
        self._names: frozenset[str] | None = None
        self._host: Host | None = None
        self._engine: Engine | None = None
        self._recording: Recording | None = None
        self._unplaced = 0  # rows
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def watch(self, host: Host, engine: Engine) -> None:
        """Whom to ask what is in memory and what waits; the models they serve are the only ones counted by name."""
        self._host, self._engine = host, engine
        self._names = frozenset(host.names())

    def record(self, recording: Recording) -> None:
        """Whom to ask what became of the rows that were watched."""
        self._recording = recording

    def accepted(self, model: str, rows: int) -> None:
        with self._lock:
            tally = self._of(model)
            tally.requests += 1
            tally.rows += rows

    def refused(self, model: str, rows: int, reason: str) -> None:
        with self._lock:
            tally = self._of(model)
            tally.refused[reason] += 1
            tally.refused_rows[reason] += rows

    def answered(self, model: str, exit: int, seconds: np.ndarray, short: bool) -> None:
        now = time.monotonic()
        with self._lock:
            tally = self._of(model)
            left = tally.exit(exit)
            left.rows += len(seconds)
            left.seconds.add(seconds)
            left.recent.add(now, seconds)
            tally.short += len(seconds) if short else 0

    def cancelled(self, model: str, rows: int) -> None:
        with self._lock:
            self._of(model).cancelled += rows

    def failed(self, model: str, rows: int) -> None:
        with self._lock:
            self._of(model).failed += rows

    def ran(self, model: str, stage: int, rows: int, seconds: float) -> None:
        with self._lock:
            tally = self._of(model).stage(stage)
            tally.rows.add_one(float(rows))
            tally.seconds.add_one(seconds)

    def loaded(self, model: str, stage: int, seconds: float, bytes: int) -> None:
        with self._lock:
            tally = self._of(model).stage(stage)
            tally.loads += 1
            tally.load_seconds += seconds

    def evicted(self, model: str, stage: int) -> None:
        with self._lock:
            self._of(model).stage(stage).evictions += 1

    def watched(self, model: str, version: str, exit: int, agrees: bool, risk: float | None) -> None:
        with self._lock:
            tally = self._of(model).exit(exit)
            tally.watched += 1
            tally.disagree += not agrees
            if risk is not None:
                planned = tally.planned_of(version)
                planned.rows += 1
                planned.risk += risk

    def unplaced(self, rows: int) -> None:
        with self._lock:
            self._unplaced += rows

    def _of(self, model: str) -> ModelTally:
        name = model if self._names is None or model in self._names else UNKNOWN
        tally = self._models.get(name)
        if tally is None:
            tally = self._models[name] = ModelTally()
        return tally

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: the registry must not ask the host while it is being made."""
        return ()

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            families = [*_of_models(self._models), *_of_exits(self._models), *_of_stages(self._models)]
            unplaced = self._unplaced
        yield from families
        yield CounterMetricFamily("offramp_unplaced_rows", "Rows not watched, for there was no room", value=unplaced)
        yield from _of_recording(self._recording)
        yield from self._of_the_moment()

    def _of_the_moment(self) -> Iterator[Metric]:
        if self._host is None or self._engine is None:
            return
        size = GaugeMetricFamily(
            "offramp_segment_bytes", "Memory of a segment, 0 if not loaded", labels=("model", "stage")
        )
        for segment in self._host.segments():
            size.add_metric((segment.model, str(segment.stage)), segment.bytes if segment.loaded else 0)
        depth = GaugeMetricFamily("offramp_queue_rows", "Rows that wait for a stage", labels=("model", "stage"))
        for (model, stage), rows in self._engine.depths().items():
            depth.add_metric((model, str(stage)), rows)
        yield size
        yield depth
        yield from self._promises(self._host)

    def _promises(self, host: Host) -> Iterator[Metric]:
        labels = ("model", "risk", "version")
        tolerance = GaugeMetricFamily("offramp_tolerance", "Of the default plan, a share of rows", labels=labels)
        bound = GaugeMetricFamily("offramp_certified_bound", "On the risk of the default plan", labels=labels)
        for name in host.names():
            manifest, version = _served(host, name)
            plan = manifest.plans[manifest.default_plan]
            key = name, manifest.risk, version[:VERSION_LENGTH]
            tolerance.add_metric(key, plan.tolerance)
            if plan.certificate is not None:
                bound.add_metric(key, plan.certificate.bound)
        yield tolerance
        yield bound

    def stats(self) -> dict[str, Any]:
        """The same for the page: {"time": seconds, "models": {name: ...}}; see `_stats` for one model."""
        if self._host is None or self._engine is None:
            return {"time": time.time(), "models": {}}
        host, depths = self._host, self._engine.depths()
        segments: dict[str, list[SegmentState]] = {name: [] for name in host.names()}
        for segment in host.segments():
            segments.setdefault(segment.model, []).append(segment)
        served = {name: _served(host, name) for name in host.names()}
        with self._lock:
            models = {
                name: _stats(manifest, version, self._models.get(name, ModelTally()), segments[name], name, depths)
                for name, (manifest, version) in served.items()
            }
        return {"time": time.time(), "models": models}


def _served(host: Host, name: str) -> tuple[Manifest, str]:
    """The newest version's, and its digest."""
    with held(host, name) as hosted:
        return hosted.manifest, hosted.digest


def _of_recording(recording: Recording | None) -> Iterator[Metric]:
    """Nothing where nothing is to be recorded."""
    if recording is None:
        return
    counts = recording.counts()
    yield CounterMetricFamily("offramp_recorded_rows", "Rows written to the record", value=counts.recorded)
    yield CounterMetricFamily(
        "offramp_unrecorded_rows", "Watched rows that were not, see the log", value=counts.dropped
    )
    yield GaugeMetricFamily(
        "offramp_recording_stopped", "1: nothing is recorded any more, the log says why", value=float(recording.stopped)
    )


def _stats(
    manifest: Manifest,
    version: str,
    tally: ModelTally,
    segments: list[SegmentState],
    name: str,
    depths: Mapping[tuple[str, int], int],
) -> dict[str, Any]:
    """One model: counts since the start, those beside its promise of this version; latencies in milliseconds over the
    last seconds.
    """
    now = time.monotonic()
    planned = [left.planned[version] for left in tally.exits.values() if version in left.planned]
    plan = manifest.plans[manifest.default_plan]
    exits = []
    for index in range(len(manifest.exits)):
        left = tally.exit(index)
        found = left.recent.percentiles(now, _SHARES)
        p50, p95 = [round(value * 1e3, 3) for value in found] if found else (None, None)
        exits.append({"rows": left.rows, "p50_ms": p50, "p95_ms": p95})
    stages = [
        _stage_stats(segment, tally.stage(segment.stage), depths.get((name, segment.stage), 0))
        for segment in sorted(segments, key=lambda segment: segment.stage)
    ]
    return {
        "requests": tally.requests,
        "rows": tally.rows,
        "refused": dict(tally.refused),
        "failed": tally.failed,
        "cancelled": tally.cancelled,
        "short": tally.short,
        "exits": exits,
        "stages": stages,
        "watched": sum(left.watched for left in tally.exits.values()),
        "disagree": sum(left.disagree for left in tally.exits.values()),
        "planned": sum(each.rows for each in planned),
        "lost": sum(each.risk for each in planned),  # risk of the planned, summed
        "risk": manifest.risk,
        "tolerance": plan.tolerance,
        "bound": plan.certificate.bound if plan.certificate else None,
    }


def _stage_stats(segment: SegmentState, tally: StageTally, waiting: int) -> dict[str, Any]:
    return {
        "stage": segment.stage,
        "loaded": segment.loaded,
        "bytes": segment.bytes,
        "uses": segment.uses,
        "waiting": waiting,
        "calls": tally.rows.count,
        "rows": int(tally.rows.sum),
        "loads": tally.loads,
        "evictions": tally.evictions,
    }


def _of_models(models: dict[str, ModelTally]) -> Iterator[Metric]:
    requests = CounterMetricFamily("offramp_requests", "Requests accepted", labels=("model",))
    rows = CounterMetricFamily("offramp_rows", "Rows accepted", labels=("model",))
    failed = CounterMetricFamily("offramp_rows_failed", "Rows accepted that got an error", labels=("model",))
    cancelled = CounterMetricFamily("offramp_rows_cancelled", "Rows whose client did not wait", labels=("model",))
    short = CounterMetricFamily(
        "offramp_rows_short", "Rows answered by an exit less sure than asked", labels=("model",)
    )
    by_reason = ("model", "reason")
    refused = CounterMetricFamily("offramp_requests_refused", "Requests refused, by reason", labels=by_reason)
    refused_rows = CounterMetricFamily(
        "offramp_rows_refused", "Their rows, where they could be counted", labels=by_reason
    )
    for name, tally in models.items():
        for family, value in (
            (requests, tally.requests),
            (rows, tally.rows),
            (failed, tally.failed),
            (cancelled, tally.cancelled),
        ):
            family.add_metric((name,), value)
        short.add_metric((name,), tally.short)
        for reason, count in tally.refused.items():
            refused.add_metric((name, reason), count)
            refused_rows.add_metric((name, reason), tally.refused_rows[reason])
    yield from (requests, rows, failed, cancelled, short, refused, refused_rows)


def _of_exits(models: dict[str, ModelTally]) -> Iterator[Metric]:
    labels = ("model", "exit")
    rows = CounterMetricFamily("offramp_exit_rows", "Rows answered, by exit", labels=labels)
    seconds = HistogramMetricFamily("offramp_latency_seconds", "From acceptance to the answer, by exit", labels=labels)
    watched = CounterMetricFamily("offramp_watched_rows", "Rows answered that ran on to the end", labels=labels)
    disagree = CounterMetricFamily(
        "offramp_watched_rows_disagree", "Of those, rows the backbone answers otherwise", labels=labels
    )
    of_version = (*labels, "version")
    planned = CounterMetricFamily("offramp_planned_rows", "Of those, rows the default plan answered", labels=of_version)
    risk = CounterMetricFamily(
        "offramp_planned_rows_risk", "Their risk, summed: over their number it compares to the version's tolerance",
        labels=of_version,
    )  # fmt: skip
    for name, tally in models.items():
        for index, left in tally.exits.items():
            key = (name, str(index))
            rows.add_metric(key, left.rows)
            seconds.add_metric(key, left.seconds.buckets(), left.seconds.sum)
            watched.add_metric(key, left.watched)
            disagree.add_metric(key, left.disagree)
            for version, each in left.planned.items():
                planned.add_metric((*key, version[:VERSION_LENGTH]), each.rows)
                risk.add_metric((*key, version[:VERSION_LENGTH]), each.risk)
    yield from (rows, seconds, watched, disagree, planned, risk)


def _of_stages(models: dict[str, ModelTally]) -> Iterator[Metric]:
    labels = ("model", "stage")
    rows = HistogramMetricFamily("offramp_batch_rows", "Rows of a stage's call", labels=labels)
    seconds = HistogramMetricFamily("offramp_stage_seconds", "Time of a stage's call", labels=labels)
    loads = CounterMetricFamily("offramp_loads", "Times a segment was loaded", labels=labels)
    spent = CounterMetricFamily("offramp_load_seconds", "Time spent loading a segment", labels=labels)
    evictions = CounterMetricFamily("offramp_evictions", "Times a segment was evicted", labels=labels)
    for name, tally in models.items():
        for index, stage in tally.stages.items():
            key = (name, str(index))
            rows.add_metric(key, stage.rows.buckets(), stage.rows.sum)
            seconds.add_metric(key, stage.seconds.buckets(), stage.seconds.sum)
            loads.add_metric(key, stage.loads)
            spent.add_metric(key, stage.load_seconds)
            evictions.add_metric(key, stage.evictions)
    yield from (rows, seconds, loads, spent, evictions)
