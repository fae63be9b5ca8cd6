"""What is counted, as Prometheus' own parser reads it, and as the page gets it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from web_help import FakeEngine, FakeHost, as_lists, ask, expected, mixed, served, until

from offramp.runtime.serve.metrics import UNKNOWN, Metrics
from offramp.runtime.serve.recording import Recording
from offramp.runtime.serve.tally import SECONDS, Histogram, Recent
from offramp.runtime.serve.work import Sample

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def watching() -> tuple[Metrics, FakeHost, FakeEngine]:
    metrics, host = Metrics(), FakeHost("tiny", "other")
    engine = FakeEngine(host, metrics)
    metrics.watch(host, engine)
    return metrics, host, engine


def samples(metrics: Metrics) -> Samples:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


DIGEST = "00" + "a" * 62  # of the fake host's first model
VERSION = DIGEST[:12]


def test_every_event_is_counted_where_it_belongs() -> None:
    metrics, _, _ = watching()
    metrics.accepted("tiny", 10)
    metrics.accepted("tiny", 5)
    metrics.accepted("other", 1)
    metrics.refused("tiny", 7, "busy")
    metrics.refused("tiny", 0, "input")
    metrics.answered("tiny", 0, np.array([0.0004, 0.002, 0.002]), False)
    metrics.answered("tiny", 2, np.array([20.0]), True)
    metrics.failed("tiny", 2)
    metrics.cancelled("tiny", 3)
    metrics.ran("tiny", 0, 15, 0.004)
    metrics.ran("tiny", 0, 1, 0.004)
    metrics.loaded("tiny", 1, 0.5, 1000)
    metrics.loaded("tiny", 1, 0.25, 1000)
    metrics.evicted("tiny", 1)
    for agrees in (True, True, False):
        metrics.watched("tiny", DIGEST, 0, agrees, None if agrees else 0.25)
    found = samples(metrics)
    assert value(found, "offramp_requests_total", model="tiny") == 2
    assert value(found, "offramp_rows_total", model="tiny") == 15
    assert value(found, "offramp_rows_total", model="other") == 1
    assert value(found, "offramp_requests_refused_total", model="tiny", reason="busy") == 1
    assert value(found, "offramp_rows_refused_total", model="tiny", reason="busy") == 7
    assert value(found, "offramp_requests_refused_total", model="tiny", reason="input") == 1
    assert value(found, "offramp_exit_rows_total", model="tiny", exit="0") == 3
    assert value(found, "offramp_exit_rows_total", model="tiny", exit="2") == 1
    assert value(found, "offramp_rows_short_total", model="tiny") == 1
    assert value(found, "offramp_rows_failed_total", model="tiny") == 2
    assert value(found, "offramp_rows_cancelled_total", model="tiny") == 3
    for bound, count in {"0.0005": 1, "0.001": 1, "0.0025": 3, "+Inf": 3}.items():
        assert value(found, "offramp_latency_seconds_bucket", model="tiny", exit="0", le=bound) == count
    assert value(found, "offramp_latency_seconds_bucket", model="tiny", exit="2", le="10.0") == 0
    assert value(found, "offramp_latency_seconds_sum", model="tiny", exit="2") == 20
    assert value(found, "offramp_batch_rows_bucket", model="tiny", stage="0", le="1.0") == 1
    assert value(found, "offramp_batch_rows_sum", model="tiny", stage="0") == 16
    assert value(found, "offramp_stage_seconds_count", model="tiny", stage="0") == 2
    assert value(found, "offramp_loads_total", model="tiny", stage="1") == 2
    assert value(found, "offramp_load_seconds_total", model="tiny", stage="1") == 0.75
    assert value(found, "offramp_evictions_total", model="tiny", stage="1") == 1
    assert value(found, "offramp_watched_rows_total", model="tiny", exit="0") == 3
    assert value(found, "offramp_watched_rows_disagree_total", model="tiny", exit="0") == 1
    assert value(found, "offramp_planned_rows_total", model="tiny", exit="0", version=VERSION) == 1
    assert value(found, "offramp_planned_rows_risk_total", model="tiny", exit="0", version=VERSION) == 0.25
    stats = metrics.stats()["models"]["tiny"]
    assert (stats["watched"], stats["disagree"], stats["planned"], stats["lost"]) == (3, 1, 1, 0.25)


def test_the_live_risk_is_of_the_version_that_is_served() -> None:
    metrics, host, _ = watching()
    for _ in range(100):
        metrics.watched("tiny", DIGEST, 0, False, 1.0)
    host.swap("tiny")
    new = host.models["tiny"].digest
    metrics.watched("tiny", new, 0, True, 0.0)
    stats = metrics.stats()["models"]["tiny"]
    assert (stats["watched"], stats["planned"], stats["lost"]) == (101, 1, 0.0)
    found = samples(metrics)
    for version, rows in ((VERSION, 100), (new[:12], 1)):
        assert value(found, "offramp_planned_rows_total", model="tiny", exit="0", version=version) == rows


def test_what_is_not_recorded_is_counted(tmp_path: Path) -> None:
    metrics, _, _ = watching()
    metrics.unplaced(3)
    metrics.unplaced(4)
    assert value(samples(metrics), "offramp_unplaced_rows_total") == 7
    assert ("offramp_recording_stopped", frozenset()) not in samples(metrics)
    recording = Recording(tmp_path / "record", rate=1.0, seed=0, limit=1 << 20)
    metrics.record(recording)
    share = np.ones(2, np.float32)
    recording.record(Sample("tiny", "d", {"x": np.zeros(2)}, 0, share, share, 1.0))
    until(lambda: value(samples(metrics), "offramp_recorded_rows_total") == 1)
    assert value(samples(metrics), "offramp_recording_stopped") == 0
    recording.close()
    recording.record(Sample("tiny", "d", {"x": np.zeros(2)}, 0, share, share, 1.0))
    found = samples(metrics)
    assert value(found, "offramp_unrecorded_rows_total") == 1
    assert value(found, "offramp_recording_stopped") == 1


def test_memory_queues_and_promises_are_those_of_the_moment() -> None:
    metrics, host, engine = watching()
    engine.waiting["tiny", 1] = 12
    found = samples(metrics)
    assert value(found, "offramp_segment_bytes", model="tiny", stage="1") == 2 << 20
    assert value(found, "offramp_segment_bytes", model="tiny", stage="2") == 0
    assert value(found, "offramp_queue_rows", model="tiny", stage="1") == 12
    assert value(found, "offramp_tolerance", model="tiny", risk="disagreement", version=VERSION) == 0.01
    assert value(found, "offramp_certified_bound", model="tiny", risk="disagreement", version=VERSION) == 0.008701
    host.loaded["tiny", 2] = True
    engine.waiting["tiny", 1] = 0
    found = samples(metrics)
    assert value(found, "offramp_segment_bytes", model="tiny", stage="2") == 3 << 20
    assert value(found, "offramp_queue_rows", model="tiny", stage="1") == 0
    assert all(hosted.holders == 0 for hosted in host.models.values())


def test_a_client_cannot_make_labels() -> None:
    metrics, _, _ = watching()
    for number in range(50):
        metrics.refused(f"made up {number}", 1, "input")
    assert {labels for name, labels in samples(metrics) if name == "offramp_requests_refused_total"} == {
        frozenset({("model", UNKNOWN), ("reason", "input")})
    }


def test_counts_from_many_threads_lose_nothing() -> None:
    metrics, _, _ = watching()

    def work() -> None:
        for number in range(300):
            metrics.accepted("tiny", 2)
            metrics.answered("tiny", number % 3, np.full(2, 0.001), False)
            metrics.watched("tiny", DIGEST, 0, number % 2 == 0, None)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        samples(metrics), metrics.stats()
    for thread in threads:
        thread.join()
    stats = metrics.stats()["models"]["tiny"]
    assert (stats["requests"], stats["rows"], stats["watched"], stats["disagree"]) == (2400, 4800, 2400, 1200)
    assert [left["rows"] for left in stats["exits"]] == [1600, 1600, 1600]


@given(st.lists(st.floats(0, 20) | st.sampled_from(SECONDS), max_size=50), st.sampled_from([1, 9]))
def test_a_bucket_holds_what_is_at_most_its_bound(values: list[float], times: int) -> None:
    values *= times  # few are counted otherwise than many
    histogram = Histogram(SECONDS)
    for part in (values[::2], values[1::2]):
        histogram.add(np.array(part, np.float64))
    for bound, count in histogram.buckets():
        assert count == sum(each <= float(bound) for each in values)
    assert histogram.count == len(values)
    assert histogram.sum == pytest.approx(sum(values))


def test_percentiles_forget_what_is_old() -> None:
    recent = Recent()
    assert recent.percentiles(0.0, (50,)) is None
    recent.add(0.0, np.array([5.0]))
    recent.add(8.0, np.arange(1.0, 102.0))
    assert recent.percentiles(12.0, (0, 50, 100)) == [1.0, 51.0, 101.0]
    assert recent.percentiles(100.0, (50,)) is None


def test_what_requests_do_is_seen_over_http() -> None:
    with served() as running:
        arrays = mixed(30)
        inputs = [
            {"name": name, "datatype": "FP32", "shape": [30, len(rows[0])], "data": rows}
            for name, rows in as_lists(arrays).items()
        ]
        body = json.dumps({"inputs": inputs}).encode()
        assert ask(running, "/v2/models/tiny/infer", "POST", body).status == 200
        assert ask(running, "/v2/models/tiny/infer", "POST", b"{").status == 400
        stats = ask(running, "/v1/stats").json()["models"]["tiny"]
        exits = np.bincount(expected(arrays)[1], minlength=3).tolist()
        assert [each["rows"] for each in stats["exits"]] == exits
        assert all(0 <= each["p50_ms"] <= each["p95_ms"] for each in stats["exits"])
        assert (stats["requests"], stats["rows"], stats["refused"]) == (1, 30, {"input": 1})
        answer = ask(running, "/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        found = {(s.name, s.labels.get("exit")): s.value for family in
                 text_string_to_metric_families(answer.body.decode()) for s in family.samples}  # fmt: skip
        assert [found["offramp_exit_rows_total", str(exit)] for exit in range(3)] == exits
