"""Deadlines, stages that are missing, stages that fail, neighbours that do."""

# ruff: noqa: F811  # fixtures are imported by name, and asked for by it

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from engine_help import (  # noqa: F401
    PATIENCE,
    PLAIN,
    FakeHost,
    Journal,
    Start,
    ask,
    host,
    journal,
    missed,
    rows_at,
    rows_of,
    start,
    tiny,
    until,
)
from tiny import THRESHOLDS, batch, reference, reference_all

from offramp.runtime import ArtifactError, InputError, OfframpError
from offramp.runtime.serve.work import Asked, Leaving

# --- answers that are none


def test_a_row_whose_answer_is_no_number_fails_alone(start: Start, host: FakeHost, journal: Journal) -> None:
    engine, data = start(), rows_at(2, 3)
    expected = reference_all(data)[2]
    data["side"][1] = 3e38, -3e38, 3e38  # finite, but not what comes of it; only the last exit reads it
    receiver = ask(engine, data).wait()
    assert isinstance(receiver.errors[1], InputError)
    assert "no number" in str(receiver.errors[1])
    for row in (0, 2):
        np.testing.assert_allclose(receiver.rows[row].probabilities, expected[row], atol=1e-5)
    assert journal.failed_ == [("a", 1)]
    host.at_rest()


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


def test_a_name_with_the_same_artifact_does_not_wait_for_another_s_memory(start: Start, host: FakeHost) -> None:
    first, second = host.models["a"], host.models["b"]
    second.digest = first.digest
    first.evict(1)
    engine = start()
    waiting = ask(engine, rows_at(2, 1))
    missed(host)
    assert ask(engine, rows_at(2, 3), model="b").wait().exits() == [2] * 3
    assert ask(engine, rows_at(2, 3), Asked(best_effort=True), model="b").wait().exits() == [2] * 3
    first.failures[1] = ArtifactError("altered")
    host.changed()
    assert isinstance(waiting.wait().errors[0], ArtifactError)
    host.at_rest()


def test_what_is_refused_at_the_end_is_said(start: Start, host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    engine = start()
    host.models["a"].evict(2)
    receiver = ask(engine, rows_at(2, 3))
    missed(host)
    with caplog.at_level(logging.WARNING):
        engine.close(0.0)
    assert len(receiver.wait().errors) == 3
    assert "3 rows that were accepted are refused" in caplog.text
