"""The engine's answers against a session's, how it batches, and what it does when it is full or in a hurry."""

# ruff: noqa: F811  # fixtures are imported by name, and asked for by it

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from engine_help import (  # noqa: F401
    PATIENCE,
    PLAIN,
    FakeHost,
    FakeHosted,
    Journal,
    Receiver,
    Start,
    bytes_of,
    host,
    journal,
    rows_at,
    rows_of,
    start,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import INF, Tiny, batch, reference, reference_all

from offramp.runtime import InputError, Session, TensorSpec, UsageError, load
from offramp.runtime.engine import EngineSession
from offramp.runtime.errors import BusyError, UnknownModelError
from offramp.runtime.execution import stage_of
from offramp.runtime.manifest import Plan, StageSpec
from offramp.runtime.serve.engine import BatchingEngine
from offramp.runtime.serve.joined import run_joined
from offramp.runtime.serve.work import Asked


@pytest.fixture(scope="module")
def session(tiny: Tiny) -> Session:
    return load(tiny.path, threads=1, executor="segments")


def hold_up(engine: BatchingEngine, host: FakeHost, model: str = "a") -> Receiver:
    """Shut the gate with the engine's only worker behind it, on one row that leaves at exit 0."""
    host.gate.clear()
    first = Receiver(1)
    engine.submit(model, rows_at(0, 1), PLAIN, first)
    assert host.entered.acquire(timeout=PATIENCE)
    return first


TOLERANCES = st.one_of(st.none(), st.sampled_from([0, 0.001, 0.005, 0.01, 1.0]), st.just("each"))


@settings(max_examples=25)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), TOLERANCES), min_size=1, max_size=12),
    workers=st.integers(1, 3),
    max_batch=st.sampled_from([1, 3, 32]),
    budget=st.sampled_from([0.0, 0.001, 10.0]),
    asks=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_answers_are_a_sessions(
    tiny: Tiny, session: Session, sizes: list[Any], workers: int, max_batch: int, budget: float, asks: bool, seed: int
) -> None:
    host = FakeHost(tiny, "ab", asks=asks)
    engine = BatchingEngine(host, workers=workers, max_batch=max_batch, latency_budget=budget)
    rng = np.random.default_rng(seed)

    def send(number: int) -> tuple[dict[str, np.ndarray], Any, Receiver]:
        rows, tolerance = sizes[number]
        if tolerance == "each":
            tolerance = levels[number][:rows]
        data, receiver = batch(rows, seed + number), Receiver(rows)
        engine.submit("ab"[number % 2], data, Asked(tolerance), receiver)
        return data, tolerance, receiver

    levels = [rng.choice([0, 0.001, 0.01], 40) for _ in sizes]
    with ThreadPoolExecutor(4) as pool:
        sent = list(pool.map(send, range(len(sizes))))
    for data, tolerance, receiver in sent:
        receiver.wait()
        expected = session.run(data, tolerance=tolerance)
        assert receiver.exits() == expected.exits.tolist()
        for row, got in receiver.rows.items():
            np.testing.assert_allclose(got.probabilities, expected.probabilities[row], atol=1e-5)
            assert got.confidence == pytest.approx(expected.confidence[row], abs=1e-5)
            assert not got.short
    engine.close(PATIENCE)
    host.at_rest()


def test_requests_share_batches_at_every_stage(start: Start, host: FakeHost, journal: Journal) -> None:
    engine = start(max_batch=8)
    first = hold_up(engine, host)
    deep = rows_at(2, 16)
    receivers = []
    for number in range(16):
        receivers.append(Receiver(1))
        engine.submit("a", rows_of(deep, np.array([number])), PLAIN, receivers[-1])
    assert engine.depths() == {("a", 0): 16, ("a", 1): 0, ("a", 2): 0}
    host.gate.set()
    first.wait()
    for number, receiver in enumerate(receivers):
        got = receiver.wait().rows[0]
        assert got.exit == 2
        np.testing.assert_allclose(got.probabilities, reference_all(deep)[2, number], atol=1e-5)
    # Full queues go deepest first.
    deep_runs = [("a", 1, 8), ("a", 2, 8)]
    assert journal.ran_ == [("a", 0, 1), ("a", 0, 8), *deep_runs, ("a", 0, 8), *deep_runs]


def test_survivors_gather_for_the_deep_stages(start: Start, host: FakeHost, journal: Journal) -> None:
    engine = start(max_batch=8)
    first = hold_up(engine, host)
    data = {name: np.concatenate([rows_at(2, 12)[name], rows_at(0, 12)[name]]) for name in ("x", "side")}
    order = np.arange(24).reshape(2, 12).T.ravel()  # every second row leaves at once
    receiver = Receiver(24)
    engine.submit("a", rows_of(data, order), PLAIN, receiver)
    host.gate.set()
    receiver.wait()
    first.wait()
    assert receiver.exits() == [2, 0] * 12
    assert journal.ran_[1:] == [("a", 0, 8)] * 2 + [("a", 1, 8), ("a", 2, 8)] + [("a", 0, 8), ("a", 1, 4), ("a", 2, 4)]


def test_a_row_that_waited_for_its_budget_runs_before_new_ones(start: Start, host: FakeHost, journal: Journal) -> None:
    engine = start(max_batch=8, latency_budget=0.0)
    hold_up(engine, host)
    receivers = [Receiver(4), Receiver(12)]
    for receiver, rows in zip(receivers, (4, 12), strict=True):
        engine.submit("a", rows_at(2, rows), PLAIN, receiver)
    host.gate.set()
    for receiver in receivers:
        receiver.wait()
    assert journal.ran_[1:] == [("a", stage, 8) for stage in (0, 1, 2)] * 2


def test_a_model_with_one_request_is_served_while_another_has_a_long_queue(
    start: Start, host: FakeHost, journal: Journal
) -> None:
    engine = start(max_batch=4, queue_rows=400)
    hold_up(engine, host)
    long, short = Receiver(400 - 1), Receiver(1)
    engine.submit("a", rows_at(0, 399), PLAIN, long)
    engine.submit("b", rows_at(0, 1), PLAIN, short)
    host.gate.set()
    short.wait()
    long.wait()
    assert journal.ran_.index(("b", 0, 1)) == 1  # right after the call that was under way
    assert len(journal.ran_) == 1 + 1 + 100


def test_a_full_queue_refuses_at_once_and_takes_again(start: Start, host: FakeHost, journal: Journal) -> None:
    engine = start(queue_rows=8)
    first = hold_up(engine, host)
    waiting, refused = Receiver(7), Receiver(1)
    engine.submit("a", rows_at(2, 7), PLAIN, waiting)
    with pytest.raises(BusyError, match=r"a: 8 rows wait of 8 that may, and 1 more do not fit"):
        engine.submit("a", rows_at(0, 1), PLAIN, refused)
    other = Receiver(8)
    engine.submit("b", rows_at(0, 8), PLAIN, other)  # another model's room is its own
    host.gate.set()
    for receiver in (first, waiting, other):
        receiver.wait()
    again = Receiver(8)
    engine.submit("a", rows_at(2, 8), PLAIN, again)
    again.wait()
    assert not refused.leavings
    assert journal.refused_ == [("a", 1, "busy")]
    assert journal.accepted_ == [("a", 1), ("a", 7), ("b", 8), ("a", 8)]


def test_inputs_that_are_too_many_bytes_are_refused_at_once(start: Start, host: FakeHost, journal: Journal) -> None:
    row = bytes_of(batch(1))
    engine = start(queue_bytes=8 * row)  # of rows there may be far more
    first = hold_up(engine, host)
    ticket = engine.submit("a", rows_at(2, 7), PLAIN, Receiver(7))
    with pytest.raises(BusyError, match=rf"a: inputs of {8 * row} bytes wait of {8 * row} that may, and {row} more do"):
        engine.submit("a", rows_at(0, 1), PLAIN, Receiver(1))
    other = Receiver(8)
    engine.submit("b", rows_at(0, 8), PLAIN, other)  # another model's room is its own
    ticket.cancel()
    ticket.cancel()
    waiting = Receiver(7)
    engine.submit("a", rows_at(2, 7), PLAIN, waiting)
    with pytest.raises(BusyError):  # what was cancelled gave its room back once
        engine.submit("a", rows_at(0, 1), PLAIN, Receiver(1))
    host.gate.set()
    for receiver in (first, waiting, other):
        receiver.wait()
    again = Receiver(8)
    engine.submit("a", rows_at(2, 8), PLAIN, again)
    again.wait()
    assert journal.refused_ == [("a", 1, "busy")] * 2


def test_a_request_larger_than_the_queue_ever_holds_is_an_input_error(start: Start, host: FakeHost) -> None:
    row = bytes_of(batch(1))
    engine = start(queue_bytes=8 * row)
    with pytest.raises(
        InputError, match=rf"has {9 * row} bytes of inputs, the server takes {8 * row}; send it in parts"
    ):
        engine.submit("a", batch(9), PLAIN, Receiver(9))
    host.at_rest()


def test_cancelled_rows_give_their_room_back_at_once(start: Start, host: FakeHost) -> None:
    engine = start(queue_rows=8)
    running = hold_up(engine, host)
    dropped, taken = Receiver(7), Receiver(7)
    ticket = engine.submit("a", rows_at(2, 7), PLAIN, dropped)
    ticket.cancel()
    ticket.cancel()
    assert engine.depths()["a", 0] == 0
    engine.submit("a", rows_at(2, 7), PLAIN, taken)
    host.gate.set()
    taken.wait()
    running.wait()
    assert not dropped.leavings


def test_a_request_cancelled_while_it_runs_delivers_nothing(start: Start, host: FakeHost) -> None:
    engine = start(max_batch=2)
    host.gate.clear()
    dropped, other = Receiver(5), Receiver(1)
    ticket = engine.submit("a", rows_at(2, 5), PLAIN, dropped)
    assert host.entered.acquire(timeout=PATIENCE)
    engine.submit("a", rows_at(0, 1), PLAIN, other)
    ticket.cancel()
    host.gate.set()
    other.wait()
    assert not dropped.leavings
    assert engine.depths() == {("a", stage): 0 for stage in range(3)}


@pytest.mark.parametrize(
    ("data", "asked", "error"),
    [
        ({"x": np.zeros((2, 6), np.float32)}, PLAIN, InputError),
        (np.zeros((2, 6), np.float32), PLAIN, InputError),
        (batch(9), PLAIN, InputError),
        (batch(2), Asked(tolerance=2), UsageError),
        (batch(2), Asked(tolerance=np.array([0.1])), UsageError),
        (batch(2), Asked(deadline=-1), UsageError),
        (batch(2), Asked(deadline=float("nan")), UsageError),
    ],
)
def test_what_does_not_fit_is_refused_and_costs_nothing(
    start: Start, host: FakeHost, journal: Journal, data: Any, asked: Asked, error: type[Exception]
) -> None:
    engine = start(queue_rows=8)
    with pytest.raises(error):
        engine.submit("a", data, asked, Receiver(0))
    host.at_rest()
    assert [(model, reason) for model, _, reason in journal.refused_] == [("a", "input")]
    receiver = Receiver(8)
    engine.submit("a", batch(8), PLAIN, receiver)
    receiver.wait()


def test_an_unknown_model_is_refused_and_not_counted(start: Start, journal: Journal) -> None:
    with pytest.raises(UnknownModelError):
        start().submit("c", batch(2), PLAIN, Receiver(0))
    assert not journal.refused_  # its name is the client's to choose


def test_a_batch_without_rows_delivers_nothing(start: Start, host: FakeHost) -> None:
    receiver = Receiver(0)
    start().submit("a", batch(0), Asked(deadline=0.0), receiver).cancel()
    host.at_rest()
    assert not receiver.leavings


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"max_batch": 0}, {"queue_rows": 0}, {"queue_bytes": 0}, {"latency_budget": -1.0}]
)
def test_an_engine_that_could_serve_nobody_is_refused(start: Start, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        start(**options)


def test_a_head_nobody_wants_is_not_asked(tiny: Tiny) -> None:
    host = FakeHost(tiny, asks=True)
    engine = BatchingEngine(host, workers=1)
    sessions = [host.models["a"].session(stage) for stage in range(3)]
    for asked in (Asked(tolerance=0), PLAIN, Asked(tolerance=0, best_effort=True)):
        receiver = Receiver(4)
        engine.submit("a", rows_at(2, 4), asked, receiver)
        assert set(receiver.wait().exits()) == {2}
    engine.close(PATIENCE)
    assert [call[2] for call in sessions[0].calls] == [False, True, True]
    assert sessions[1].calls[0] == (4, ["h1"], False)
    assert sessions[1].calls[1] == (4, ["h1", "probabilities", "confidence"], True)
    assert all(call[2] for call in sessions[2].calls)


def test_a_row_that_wants_an_exit_does_not_make_another_leave(start: Start, host: FakeHost) -> None:
    engine = start()
    hold_up(engine, host)
    data = rows_at(0, 3)
    silent, asking, mixed = Receiver(3), Receiver(3), Receiver(3)
    engine.submit("a", data, Asked(tolerance=0), silent)
    engine.submit("a", data, PLAIN, asking)
    engine.submit("a", data, Asked(tolerance=np.array([0, 0.01, 0])), mixed)
    host.gate.set()
    assert silent.wait().exits() == [2, 2, 2]
    assert asking.wait().exits() == [0, 0, 0]
    assert mixed.wait().exits() == [2, 0, 2]
    assert reference(data, (INF, INF))[1].tolist() == [2, 2, 2]


def test_two_versions_of_a_model_do_not_share_batches(start: Start, host: FakeHost, journal: Journal) -> None:
    engine = start()
    hold_up(engine, host)
    old, new = Receiver(3), Receiver(3)
    engine.submit("a", rows_at(0, 3), PLAIN, old)
    host.models["a"], replaced = host.models["b"], host.models["a"]  # swapped
    engine.submit("a", rows_at(0, 3), PLAIN, new)
    host.gate.set()
    old.wait()
    new.wait()
    assert [rows for _, _, rows in journal.ran_] == [1, 3, 3]
    assert [len(model.session(0).calls) for model in (replaced, host.models["b"])] == [2, 1]
    engine.close(PATIENCE)
    assert replaced.holders == 0
    assert host.models["b"].holders == 0


def test_survivors_keep_nothing_of_the_batch_they_came_from(tiny: Tiny) -> None:
    host, data = FakeHost(tiny), rows_at(2, 4)
    data = {name: np.concatenate([value, rows_at(0, 4)[name]]) for name, value in data.items()}
    engine = BatchingEngine(host, workers=1)
    chunks = [
        engine._read("a", host.hold("a"), rows_of(data, np.arange(start, 8, 2)), PLAIN, Receiver(4))[1]
        for start in (0, 1)
    ]
    outcomes = run_joined(host.models["a"].stages[0], 0, False, chunks, lambda rows, seconds: None)
    engine.close(PATIENCE)
    for outcome in outcomes:
        assert outcome.leaves.tolist() == [False, False, True, True]
        assert outcome.onward is not None
        assert outcome.onward.rows.tolist() == [0, 1]
        assert {name: len(value) for name, value in outcome.onward.values.items()} == {"h0": 2, "skip": 2, "side": 2}
        assert all(value.base is None for value in outcome.onward.values.values())


class Lengths:
    """A stage on texts, by hand: class 0 or 1 by whether the sum of the row is odd."""

    name, inputs, outputs = "lengths", ("ids",), ("probabilities", "confidence")

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def run(self, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.shapes.append(feed["ids"].shape)
        odd = feed["ids"].sum(axis=1) % 2
        shares = np.stack([1 - odd, odd, *[0 * odd] * 3], axis=1).astype(np.float32)
        return [shares, shares.max(axis=1)]


def test_one_stage_alone_and_texts_of_different_lengths(tiny: Tiny) -> None:
    stages = (StageSpec("stages/0.onnx", ("ids",), (), ()),)
    manifest = replace(
        tiny.manifest,
        inputs=(TensorSpec("ids", "int64", ("batch", "length")),),
        stages=stages,
        exits=tiny.manifest.exits[-1:],
        plans=(Plan(0.0, "joint", (), None),),
    )
    host, lengths = FakeHost(tiny), Lengths()
    stage = stage_of(manifest, 0, cast("EngineSession", lengths))
    host.models["t"] = FakeHosted(host, "t", manifest, [stage], "digest t")
    engine = BatchingEngine(host, workers=1)
    hold_up(engine, host)
    sent = []
    for number in range(12):
        ids = np.arange(2 * (3 + number % 3)).reshape(2, -1) + number
        asked = Asked([None, 0, np.zeros(2)][number % 3], deadline=[None, 1e6][number % 2])
        sent.append((ids, Receiver(2)))
        engine.submit("t", ids, asked, sent[-1][1])
    host.gate.set()
    for ids, receiver in sent:
        assert receiver.wait().exits() == [0, 0]
        assert [got.probabilities.argmax() for got in receiver.rows.values()] == (ids.sum(axis=1) % 2).tolist()
    assert lengths.shapes == [(8, 3), (8, 4), (8, 5)]
    engine.close(PATIENCE)
    host.at_rest()


def test_threads_that_wait_are_all_woken(start: Start, host: FakeHost) -> None:
    """Three workers run three batches side by side."""
    engine = start(workers=3, max_batch=2)
    host.gate.clear()
    receiver = Receiver(6)
    engine.submit("a", rows_at(0, 6), PLAIN, receiver)
    for _ in range(3):
        assert host.entered.acquire(timeout=PATIENCE)
    assert threading.active_count() >= 4
    host.gate.set()
    receiver.wait()
