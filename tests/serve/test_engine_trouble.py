"""Deadlines, missing and failing stages, rows that are watched, closing; and all of it at once."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from engine_help import PATIENCE, FakeHost, Journal, Notes, Receiver, rows_at, rows_of
from tiny import THRESHOLDS, Tiny, batch, reference, reference_all, write_tiny

from offramp.runtime import ArtifactError, InputError, OfframpError
from offramp.runtime.errors import BusyError
from offramp.runtime.serve.engine import BatchingEngine
from offramp.runtime.serve.work import Asked, Leaving

PLAIN = Asked()
Start = Callable[..., BatchingEngine]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "artifact")


@pytest.fixture
def host(tiny: Tiny) -> FakeHost:
    return FakeHost(tiny, "ab")


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def start(host: FakeHost, journal: Journal) -> Iterator[Start]:
    """Engines of one worker, closed when the test ends, with nothing held."""
    engines: list[BatchingEngine] = []

    def make(**options: Any) -> BatchingEngine:
        engines.append(BatchingEngine(host, **{"workers": 1, "observer": journal, **options}))
        return engines[-1]

    yield make
    host.gate.set()
    for engine in engines:
        engine.close(PATIENCE)
    host.at_rest()


def ask(engine: BatchingEngine, rows: dict[str, np.ndarray], asked: Asked = PLAIN, model: str = "a") -> Receiver:
    receiver = Receiver(len(rows["x"]))
    engine.submit(model, rows, asked, receiver)
    return receiver


def until(holds: Callable[[], bool]) -> None:
    """Until something holds that nobody announces."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def missed(host: FakeHost) -> None:
    """Until a stage was asked for that is not in memory."""
    assert host.missed.acquire(timeout=PATIENCE)


# --- deadlines


def test_at_the_deadline_the_best_answer_so_far_is_given(start: Start, host: FakeHost, journal: Journal) -> None:
    engine, data = start(), rows_at(2, 3)
    host.models["a"].evict(2)
    receiver = ask(engine, data, Asked(deadline=0.2)).wait()
    for row, got in receiver.rows.items():
        assert got.short
        assert got.exit in (0, 1)  # as far as it came
        np.testing.assert_allclose(got.probabilities, reference_all(data)[got.exit, row], atol=1e-5)
        assert got.confidence == pytest.approx(got.probabilities.max())
    assert all(leaving.seconds >= 0.2 for leaving in receiver.leavings)
    assert sum(rows for _, _, rows, short in journal.answered_ if short) == 3
    assert engine.depths() == {("a", stage): 0 for stage in range(3)}
    host.at_rest()  # though the stage they waited for never came


def test_rows_nobody_has_spoken_for_are_answered_by_the_first_exit_that_speaks(start: Start, host: FakeHost) -> None:
    engine = start()
    host.gate.clear()
    data = {name: np.concatenate([rows_at(0, 2)[name], rows_at(2, 2)[name]]) for name in ("x", "side")}
    receiver, endless = ask(engine, data, Asked(deadline=0.0)), ask(engine, data, Asked(deadline=1e300))
    assert host.entered.acquire(timeout=PATIENCE)
    until(lambda: any(request.overdue for request in list(engine._ledger.requests)))
    host.gate.set()
    receiver.wait()
    assert receiver.exits() == [0, 0, 0, 0]
    assert [receiver.rows[row].short for row in range(4)] == [False, False, True, True]
    assert endless.wait().exits() == [0, 0, 2, 2]
    assert len(engine._clock) <= 1  # the alarm of an answered request holds on to nothing


def test_rows_in_a_running_stage_are_answered_at_their_deadline_and_not_again(start: Start, host: FakeHost) -> None:
    engine = start()
    host.models["a"].evict(1)
    receiver = ask(engine, rows_at(2, 3), Asked(deadline=1e6))
    assert host.entered.acquire(timeout=PATIENCE)
    missed(host)
    host.gate.clear()
    host.models["a"].load(1)
    assert host.entered.acquire(timeout=PATIENCE)  # stage 1 has begun
    (request,) = engine._ledger.requests
    engine._expire(request)  # as the clock does
    assert receiver.all.is_set()
    assert receiver.exits() == [0, 0, 0]
    host.gate.set()
    assert ask(engine, rows_at(2, 1)).wait().exits() == [2]
    assert len(receiver.leavings) == 1


# --- stages that are not in memory


def test_rows_wait_for_a_stage_and_go_on_when_it_is_loaded(start: Start, host: FakeHost) -> None:
    engine = start()
    model = host.models["a"]
    model.evict(0, 2)
    data = batch(40)
    receiver = ask(engine, data)
    missed(host)
    assert engine.depths()["a", 0] == 40
    host.changed()  # something else was loaded
    missed(host)
    model.load(0)
    missed(host)  # stage 2, the rest is answered
    _, exits = reference(data, THRESHOLDS)
    while len(receiver.rows) < (exits < 2).sum():
        receiver.wait_some()
    assert engine.depths() == {("a", 0): 0, ("a", 1): 0, ("a", 2): int((exits == 2).sum())}
    other = ask(engine, batch(5), model="b")
    other.wait()  # nobody waits for another's memory
    model.load(2)
    assert receiver.wait().exits() == exits.tolist()


def test_a_stage_loaded_while_the_engine_was_told_it_is_not_there_is_not_missed(start: Start, host: FakeHost) -> None:
    engine, model = start(), host.models["a"]
    take = model.take

    def late(stage: int) -> Any:
        taken = take(stage)
        if taken is None:
            model.take = take  # type: ignore[method-assign]
            model.load(stage)  # the listener is called before the engine has noted what it heard
        return taken

    model.take = late  # type: ignore[method-assign]
    model.evict(1)
    assert ask(engine, rows_at(2, 3)).wait().exits() == [2, 2, 2]


def test_best_effort_rows_take_the_best_so_far_where_a_stage_is_missing(start: Start, host: FakeHost) -> None:
    engine, model = start(), host.models["a"]
    model.evict(1)
    data = rows_at(2, 4)
    patient, hasty = ask(engine, data), ask(engine, data, Asked(best_effort=True))
    hasty.wait()
    later = ask(engine, data, Asked(best_effort=True)).wait()  # it is known to be missing now
    assert hasty.exits() == later.exits() == [0] * 4
    assert all(got.short for got in [*hasty.rows.values(), *later.rows.values()])
    assert not patient.rows
    assert model.asked_for == [1]
    model.load(1)
    assert patient.wait().exits() == [2] * 4
    assert not any(got.short for got in patient.rows.values())


def test_best_effort_rows_wait_for_the_first_stage(start: Start, host: FakeHost) -> None:
    engine, model = start(), host.models["a"]
    model.evict(0)
    receiver = ask(engine, rows_at(2, 4), Asked(best_effort=True))
    missed(host)
    assert not receiver.leavings
    model.load(0)
    assert receiver.wait().exits() == [2] * 4


@pytest.mark.parametrize("failure", [ArtifactError("stages/2.onnx: altered"), RuntimeError("a bug")])
def test_a_stage_that_cannot_be_loaded_fails_who_waits_for_it(
    start: Start, host: FakeHost, journal: Journal, failure: Exception
) -> None:
    engine, model = start(), host.models["a"]
    model.evict(2)
    data = rows_at(2, 3)
    waiting, hasty = ask(engine, data), ask(engine, data, Asked(deadline=1e6))
    missed(host)
    model.failures[2] = failure
    host.changed()
    for error in waiting.wait().errors.values():
        assert isinstance(error, OfframpError)
        assert error is failure or "a bug" in str(error)
    assert waiting.leavings[0].probabilities.shape == (0, 5)
    assert hasty.wait().exits() == [1] * 3  # would take less than the last exit
    assert journal.failed_ == [("a", 3)]
    model.load(2)
    assert ask(engine, data).wait().exits() == [2] * 3


# --- stages that fail


@pytest.mark.parametrize("failure", [InputError("token 7 is beyond the vocabulary"), RuntimeError("a bug")])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_request_that_a_stage_fails_on_costs_no_other(
    start: Start, host: FakeHost, journal: Journal, stage: int, failure: Exception
) -> None:
    engine = start()
    data = rows_at(2, 6)
    poisoned = float(data["side"][2, 0])

    def check(feed: Mapping[str, np.ndarray]) -> None:
        poison = feed["side"][:, 0] == np.float32(poisoned) if "side" in feed else feed["x"][:, 0] == data["x"][2, 0]
        if poison.any():
            raise failure

    host.models["a"].session(stage).check = check
    host.gate.clear()
    ask(engine, rows_at(0, 1))
    receivers = [ask(engine, rows_of(data, np.array(rows))) for rows in ([0, 1], [2, 3], [4, 5])]
    host.gate.set()
    for number, receiver in enumerate(receivers):
        receiver.wait()
        assert receiver.exits() == ([] if number == 1 else [2, 2])
        assert len(receiver.errors) == (2 if number == 1 else 0)
    assert all(str(failure) in str(error) for error in receivers[1].errors.values())
    assert journal.failed_ == [("a", 2)]
    assert ask(engine, data, model="b").wait().exits() == [2] * 6


def test_neighbours_that_raise_cost_nobody_a_row(
    start: Start, host: FakeHost, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    engine = start()

    def deliver(leaving: Leaving) -> None:
        raise RuntimeError("a bug in the web part")

    def ran(*_: object) -> None:
        raise RuntimeError("a bug in the metrics")

    journal.ran = ran  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        engine.submit("a", rows_at(0, 1), PLAIN, deliver)
        assert ask(engine, rows_at(2, 3)).wait().exits() == [2] * 3
    assert {"a bug in the web part", "a bug in the metrics"} <= {
        str(record.exc_info[1]) for record in caplog.records if record.exc_info
    }


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
    assert sum(rows for _, _, rows, _ in journal.answered_) == 40
    assert engine._watching.free == 256


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
        host, workers=3, max_batch=5, queue_rows=60, latency_budget=0.002, observer=journal, recorder=notes,
        watched_rows=20,
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
    assert not any(lane.open or lane.running or lane.queues for lane in engine._queues._lanes.values())
    assert engine._watching.free == 20
    answers = sum(len(receiver.rows) for receiver in kept) + sum(len(receiver.rows) for receiver, _ in cancelled)
    assert answers <= sum(rows for *_, rows, _ in journal.answered_) <= sum(rows for _, rows in journal.accepted_)
    assert all(sample.final.shape == (5,) for sample in notes.samples)
