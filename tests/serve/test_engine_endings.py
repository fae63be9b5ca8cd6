"""Rows that are watched, requests that are cancelled, engines that close; and all of it at once."""

# ruff: noqa: F811  # fixtures are imported by name, and asked for by it

from __future__ import annotations

import dataclasses
import gc
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
from engine_help import (  # noqa: F401
    PATIENCE,
    PLAIN,
    FakeHost,
    Journal,
    Notes,
    Receiver,
    Start,
    ask,
    bytes_of,
    host,
    journal,
    missed,
    rows_at,
    start,
    tiny,
    until,
)
from tiny import THRESHOLDS, Tiny, batch, reference, reference_all

from offramp.runtime import ArtifactError
from offramp.runtime.errors import BusyError
from offramp.runtime.serve.engine import BatchingEngine
from offramp.runtime.serve.work import Asked, Leaving

# --- rows that are watched


def test_watched_rows_run_on_and_are_recorded(start: Start, host: FakeHost, journal: Journal) -> None:
    notes = Notes(1.0)
    engine = start(recorder=notes, max_batch=8)
    data = batch(40)
    receiver = ask(engine, data).wait()
    samples = notes.wait(40)
    every = reference_all(data)
    probabilities, exits = reference(data, THRESHOLDS)
    found = {sample.inputs["x"].tobytes(): sample for sample in samples}
    assert len(found) == 40
    for row in range(40):
        sample = found[data["x"][row].tobytes()]
        assert sample.inputs["side"].tolist() == data["side"][row].tolist()
        assert (sample.model, sample.digest, sample.exit) == ("a", "digest a", exits[row])
        np.testing.assert_allclose(sample.early, probabilities[row], atol=1e-5)
        np.testing.assert_allclose(sample.final, every[2, row], atol=1e-5)
    engine.close(PATIENCE)
    assert receiver.exits() == exits.tolist()
    agrees = probabilities.argmax(axis=1) == every[2].argmax(axis=1)
    assert sorted(journal.watched_) == sorted(("a", int(e), bool(a)) for e, a in zip(exits, agrees, strict=True))
    assert sorted(risk for risk in journal.risks_ if risk is not None) == sorted((~agrees).astype(float).tolist())
    assert sum(rows for _, _, rows, _ in journal.answered_) == 40
    assert engine._watching.free == 256


def test_the_risk_of_watched_rows_is_of_the_kind_their_tolerance_bounds(
    start: Start, host: FakeHost, journal: Journal
) -> None:
    host.models["a"].manifest = dataclasses.replace(host.models["a"].manifest, risk="regret")
    notes = Notes(1.0)
    engine = start(recorder=notes)
    ask(engine, batch(40)).wait()
    samples = notes.wait(40)
    engine.close(PATIENCE)
    lost = [float(sample.final.max() - sample.final[sample.early.argmax()]) for sample in samples]
    assert 0 < max(lost) < 1
    assert sorted(risk for risk in journal.risks_ if risk is not None) == pytest.approx(sorted(lost))


def test_watched_rows_that_the_default_plan_did_not_answer_have_no_risk(
    start: Start, host: FakeHost, journal: Journal
) -> None:
    notes = Notes(1.0)
    engine = start(recorder=notes)
    ask(engine, rows_at(0, 3), Asked(tolerance=0.001)).wait()
    notes.wait(3)
    host.models["a"].evict(2)
    ask(engine, rows_at(2, 3), Asked(deadline=0.05)).wait()
    host.models["a"].load(2)
    notes.wait(3)
    ask(engine, rows_at(1, 3), Asked(deadline=1e6)).wait()
    notes.wait(3)
    engine.close(PATIENCE)
    assert [risk is None for risk in journal.risks_] == [True] * 6 + [False] * 3


def test_watched_rows_yield_to_live_ones_and_fill_their_batches(start: Start, host: FakeHost, journal: Journal) -> None:
    notes = Notes(1.0)
    engine = start(recorder=notes, max_batch=8, watched_rows=6)
    host.models["a"].evict(1)
    ask(engine, rows_at(0, 6)).wait()
    missed(host)  # six watched rows wait, all there is room for
    live = ask(engine, rows_at(2, 4))
    host.models["a"].load(1)
    live.wait()
    assert len(notes.wait(6)) == 6
    assert journal.ran_[:2] == [("a", 0, 6), ("a", 0, 4)]
    assert sum(rows for _, stage, rows in journal.ran_ if stage == 1) == 10
    assert ("a", 1, 8) in journal.ran_ or ("a", 1, 6) in journal.ran_
    engine.close(PATIENCE)
    assert len(notes.samples) == 6
    assert engine._watching.free == 6
    assert journal.unplaced_ == 4


def test_a_watched_row_the_backbone_has_no_answer_to_is_not_recorded(start: Start, journal: Journal) -> None:
    notes, data = Notes(1.0), rows_at(0, 3)
    data["side"][1] = 3e38, -3e38, 3e38  # only the last exit reads it
    engine = start(recorder=notes)
    assert ask(engine, data).wait().exits() == [0, 0, 0]
    assert all(np.isfinite(sample.final).all() for sample in notes.wait(2))
    engine.close(PATIENCE)
    assert len(notes.samples) == len(journal.watched_) == 2
    assert engine._watching.free == 256


def test_rows_that_never_find_a_place_are_told_of(start: Start, journal: Journal) -> None:
    engine = start(recorder=Notes(1.0), queue_bytes=3 * bytes_of(batch(1)))
    for _ in range(5):
        ask(engine, rows_at(0, 3)).wait()
    engine.close(PATIENCE)
    assert journal.unplaced_ == 15
    assert journal.watched_ == []


def test_cancelled_rows_are_in_the_accounts(start: Start, host: FakeHost, journal: Journal) -> None:
    engine = start()
    host.models["a"].evict(1)
    ticket = engine.submit("a", rows_at(2, 3), Asked(), Receiver(3))
    missed(host)
    ticket.cancel()
    engine.close(PATIENCE)
    assert journal.cancelled_ == [("a", 3)]
    assert journal.failed_ == []
    host.at_rest()


def test_inputs_kept_of_watched_rows_are_bounded_and_refuse_nobody(
    start: Start, host: FakeHost, journal: Journal
) -> None:
    notes, row = Notes(1.0), bytes_of(batch(1))
    engine = start(recorder=notes, queue_bytes=16 * row)
    for model in "ab":
        host.models[model].evict(1)
        for _ in range(3):  # each as large as may be, although rows of the one before are watched
            ask(engine, rows_at(0, 16), model=model).wait()
    assert engine._watching.free == 256 - 8
    assert engine._watching.bytes == {"a": 4 * row, "b": 4 * row}
    kept = {chunk.request for queue in engine._queues for chunk in queue}
    assert sum(value.nbytes for request in kept for value in request.inputs.values()) == 8 * row
    for model in "ab":
        host.models[model].load(1)
    notes.wait(8)
    ask(engine, rows_at(2, 3)).wait()
    notes.wait(3)
    engine.close(PATIENCE)
    assert len(notes.samples) == 11
    assert journal.unplaced_ == 2 * 3 * 16 - 8
    assert set(engine._watching.bytes.values()) == {0}
    assert engine._watching.free == 256


def test_watched_rows_of_a_deadline_run_on_behind_their_short_answer(start: Start, host: FakeHost) -> None:
    notes = Notes(1.0)
    engine = start(recorder=notes)
    host.models["a"].evict(2)
    data = rows_at(2, 3)
    receiver = ask(engine, data, Asked(deadline=0.05)).wait()
    assert receiver.exits() == [1] * 3
    host.models["a"].load(2)
    for sample in notes.wait(3):
        assert sample.exit == 1
        row = int(np.flatnonzero((data["x"] == sample.inputs["x"]).all(axis=1))[0])
        np.testing.assert_allclose(sample.early, reference_all(data)[1, row], atol=1e-5)
        np.testing.assert_allclose(sample.final, reference_all(data)[2, row], atol=1e-5)


def test_cancelled_failed_and_refused_rows_are_watched_no_more(start: Start, host: FakeHost) -> None:
    engine = start(recorder=Notes(1.0), queue_rows=8)
    host.models["a"].evict(0)
    receiver = Receiver(4)
    ticket = engine.submit("a", rows_at(2, 4), PLAIN, receiver)
    with pytest.raises(BusyError):
        ask(engine, rows_at(2, 5))
    ticket.cancel()
    assert engine._watching.free == 256
    failing = ask(engine, rows_at(2, 4))
    missed(host)
    host.models["a"].failures[0] = ArtifactError("altered")
    host.changed()
    assert len(failing.wait().errors) == 4
    assert engine._watching.free == 256


def test_watched_rows_of_best_effort_run_on_behind_their_short_answer(start: Start, host: FakeHost) -> None:
    notes = Notes(1.0)
    engine = start(recorder=notes)
    host.models["a"].evict(1)
    data = rows_at(2, 3)
    for _ in range(2):  # the stage is found missing, then known to be
        assert ask(engine, data, Asked(best_effort=True)).wait().exits() == [0] * 3
    host.models["a"].load(1)
    assert {sample.exit for sample in notes.wait(6)} == {0}


def test_a_recorder_that_fails_to_choose_costs_no_request(
    start: Start, host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Notes):
        def chosen(self, model: str, rows: int) -> np.ndarray:
            return np.ones(rows + 1, bool)

    engine = start(recorder=Broken(1.0))
    assert ask(engine, rows_at(2, 3)).wait().exits() == [2] * 3
    assert "the recorder failed to choose rows" in caplog.text


# --- cancelling


def test_a_cancel_returns_when_what_is_being_delivered_is(start: Start, host: FakeHost) -> None:
    engine, order = start(), list[str]()
    inside, go = threading.Event(), threading.Event()

    def deliver(leaving: Leaving) -> None:
        inside.set()
        assert go.wait(PATIENCE)
        order.append("delivered")

    ticket = engine.submit("a", rows_at(0, 1), PLAIN, deliver)
    assert inside.wait(PATIENCE)

    def cancel() -> None:
        ticket.cancel()
        order.append("cancelled")

    thread = threading.Thread(target=cancel)
    thread.start()
    until(lambda: ticket._request.cancelled)  # type: ignore[attr-defined]
    go.set()
    thread.join(PATIENCE)
    assert order == ["delivered", "cancelled"]


def test_what_was_answered_but_not_delivered_is_not_delivered_after_a_cancel(start: Start, host: FakeHost) -> None:
    """Rows that are sure and rows that are late leave in one run; whoever gets the first may cancel the others."""
    engine, tickets, leavings = start(), list[Any](), list[Leaving]()

    def deliver(leaving: Leaving) -> None:
        leavings.append(leaving)
        tickets[0].cancel()

    data = {name: np.concatenate([rows_at(0, 2)[name], rows_at(2, 2)[name]]) for name in ("x", "side")}
    host.gate.clear()
    tickets.append(engine.submit("a", data, Asked(deadline=1e6), deliver))
    assert host.entered.acquire(timeout=PATIENCE)
    engine._expire(tickets[0]._request)
    host.gate.set()
    ask(engine, rows_at(0, 1)).wait()
    assert [leaving.rows.tolist() for leaving in leavings] == [[0, 1]]


# --- what an answered request leaves behind


def test_an_answered_request_is_forgotten(start: Start, host: FakeHost) -> None:
    """At once, and not when the garbage collector comes: its arrays may be large."""
    engine = start(recorder=Notes(0.5))
    gc.collect()
    gc.disable()
    try:
        gone = []
        for asked in (PLAIN, Asked(deadline=1e6), Asked(deadline=0.0), Asked(best_effort=True)):
            receiver = ask(engine, batch(20), asked).wait()
            gone.append(weakref.ref(receiver))
            del receiver
        until(lambda: not any(ref() for ref in gone))
    finally:
        gc.enable()


# --- closing


def test_closing_answers_what_was_accepted(start: Start, host: FakeHost, journal: Journal) -> None:
    engine = start(max_batch=2)
    host.gate.clear()
    receivers = [ask(engine, batch(9, seed)) for seed in range(4)]
    closing = threading.Thread(target=engine.close, args=(PATIENCE,))
    closing.start()
    until(lambda: engine._closing)
    with pytest.raises(BusyError, match="closing"):
        ask(engine, batch(1))
    assert journal.refused_ == [("a", 1, "closing")]
    host.gate.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    for seed, receiver in enumerate(receivers):
        assert receiver.all.is_set()
        assert receiver.wait().exits() == reference(batch(9, seed), THRESHOLDS)[1].tolist()
    assert not any(thread.is_alive() for thread in engine._threads)


def test_what_is_not_answered_in_time_is_refused(start: Start, host: FakeHost) -> None:
    engine = start(recorder=Notes(0.5))
    host.models["a"].evict(2)
    data = batch(40)
    receiver = ask(engine, data)
    missed(host)
    engine.close(0.05)
    engine.close(0.05)
    _, exits = reference(data, THRESHOLDS)
    assert receiver.all.is_set()
    assert sorted(receiver.wait().errors) == np.flatnonzero(exits == 2).tolist()
    assert all(isinstance(error, BusyError) for error in receiver.errors.values())
    host.at_rest()
    assert engine._watching.free == 256


# --- all of it at once


@pytest.mark.parametrize("seed", range(6))
def test_every_row_is_delivered_once_whatever_happens(tiny: Tiny, seed: int) -> None:
    """Clients that submit, cancel and give deadlines, memory that comes and goes, an engine that closes on them."""
    host, journal, notes = FakeHost(tiny, "ab"), Journal(), Notes(0.3, seed)
    engine = BatchingEngine(
        host, workers=3, max_batch=5, queue_rows=60, queue_bytes=50 * bytes_of(batch(1)), latency_budget=0.002,
        observer=journal, recorder=notes, watched_rows=20,
    )  # fmt: skip
    stop, kept, cancelled = threading.Event(), [], []
    lock = threading.Lock()

    def client(number: int) -> None:
        rng = np.random.default_rng([seed, number])
        for _ in range(60):
            rows = int(rng.integers(1, 12))
            asked = Asked(
                tolerance=[None, 0, 0.001, rng.choice([0.0, 0.01], rows)][rng.integers(4)],
                deadline=[None, None, 0.0, 0.003][rng.integers(4)],
                best_effort=bool(rng.random() < 0.2),
            )
            receiver = Receiver(rows)
            try:
                ticket = engine.submit("ab"[rng.integers(2)], batch(rows, int(rng.integers(1000))), asked, receiver)
            except BusyError:
                time.sleep(0.002)
                continue
            if rng.random() < 0.2:
                time.sleep(rng.random() * 0.003)
                ticket.cancel()
                with lock:
                    cancelled.append((receiver, len(receiver.leavings)))
            else:
                with lock:
                    kept.append(receiver)

    def memory() -> None:
        rng = np.random.default_rng([seed, 99])
        while not stop.wait(0.001):
            model, stage = host.models["ab"[rng.integers(2)]], int(rng.integers(3))
            [model.evict, model.load][rng.integers(2)](stage)
            if rng.random() < 0.05:
                model.failures[stage] = ArtifactError("cannot be loaded")
        for model in host.models.values():
            model.load(0, 1, 2)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    rover = threading.Thread(target=memory)
    for thread in [rover, *threads]:
        thread.start()
    if seed % 2:
        for thread in threads:
            thread.join()
        stop.set()
        rover.join()
        for receiver in kept:
            receiver.wait()
    else:
        time.sleep(0.1)
        engine.close(0.02)  # clients go on and are refused
        stop.set()
        for thread in [*threads, rover]:
            thread.join()
    engine.close(PATIENCE)
    assert kept
    for receiver in kept:
        assert receiver.all.is_set()
        assert not receiver.wrong
    for receiver, seen in cancelled:
        assert len(receiver.leavings) == seen, "delivered after the cancel had returned"
        assert not receiver.wrong
    host.at_rest()
    assert set(engine.depths().values()) <= {0}
    assert not any(lane.open or lane.bytes or lane.running or lane.queues for lane in engine._queues._lanes.values())
    assert engine._watching.free == 20
    assert not any(engine._watching.bytes.values())
    answers = sum(len(receiver.rows) for receiver in kept) + sum(len(receiver.rows) for receiver, _ in cancelled)
    assert answers <= sum(rows for *_, rows, _ in journal.answered_) <= sum(rows for _, rows in journal.accepted_)
    assert all(sample.final.shape == (5,) for sample in notes.samples)
