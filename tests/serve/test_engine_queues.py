"""The order in which queues are served, without threads or stages; and the clock."""

from __future__ import annotations

import functools
import threading
import time
from typing import cast

import numpy as np
import pytest
from engine_help import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.runtime.serve.clock import Clock
from offramp.runtime.serve.queues import Claim, Queues
from offramp.runtime.serve.requests import Chunk, Request
from offramp.runtime.serve.work import Hosted


@functools.cache
def _version(model: str, number: int) -> object:
    """The same for the same words; the queues ask nothing of it."""
    return object()


def request(model: str = "a", rows: int = 1000, version: int = 0) -> Request:
    hosted = cast("Hosted", _version(model, version))
    nothing = np.zeros(rows, bool)
    return Request(
        model, hosted, np.zeros((rows, 2), np.float32), lambda leaving: None, 0.0, False, False,
        nothing, {}, np.arange(0), None, ~nothing, rows, 16,
    )  # fmt: skip


def chunk(of: Request, rows: int, since: float = 0.0, width: int = 4, live: bool = True) -> Chunk:
    return Chunk(of, np.arange(rows), {"x": np.zeros((rows, width), np.float32)}, since, live)


def serve(queues: Queues, now: float, seconds: float = 1.0) -> tuple[str, int, int] | None:
    """One batch drawn and run: its model, stage and rows."""
    claim = queues.claim(now)
    if claim is None:
        return None
    drawn = queues.draw(claim)
    if any(piece.live for piece in drawn):
        queues.charge(claim.queue, seconds)
    queues.done(claim)
    return claim.queue.lane.model, claim.queue.place.stage, sum(len(piece.rows) for piece in drawn)


def order(queues: Queues, now: float, seconds: float = 1.0) -> list[tuple[str, int, int]]:
    served = []
    while (one := serve(queues, now, seconds)) is not None:
        served.append(one)
    return served


def test_a_full_queue_goes_first_the_deepest_of_them() -> None:
    queues = Queues(8, 1.0)
    for stage, rows in ((0, 20), (1, 8), (2, 9), (3, 7)):
        queues.push(chunk(request(), rows), stage)
    assert order(queues, 0.5) == [
        ("a", 2, 8), ("a", 1, 8), ("a", 0, 8), ("a", 0, 8), ("a", 0, 4), ("a", 2, 1), ("a", 3, 7),
    ]  # fmt: skip


def test_what_has_waited_for_the_budget_counts_as_full() -> None:
    queues = Queues(8, 1.0)
    queues.push(chunk(request(), 16, since=0.0), 0)
    queues.push(chunk(request(), 2, since=0.9), 1)
    assert serve(queues, 1.5) == ("a", 0, 8)
    assert serve(queues, 2.0) == ("a", 1, 2)
    assert serve(queues, 2.0) == ("a", 0, 8)


def test_at_one_stage_the_oldest_shape_goes_first() -> None:
    queues = Queues(8, 1.0)
    for since, width in ((0.3, 4), (0.1, 5), (0.2, 6)):
        queues.push(chunk(request(), 3, since=since, width=width), 0)
    queues.push(chunk(request(), 30, since=0.4, width=7), 0)
    widths = []
    while (claim := queues.claim(2.0)) is not None:
        widths.append(claim.queue.place.shapes[0][0])
        queues.draw(claim)
        queues.done(claim)
    assert widths == [5, 6, 4, 7, 7, 7, 7]
    assert not queues.lane("a").queues


def test_models_share_seconds_not_batches() -> None:
    queues = Queues(1, 100.0)
    costs = {"slow": 3.0, "quick": 1.0}
    for model in costs:
        queues.push(chunk(request(model), 40), 0)
    served: list[str] = []
    for _ in range(40):
        claim = queues.claim(0.0)
        assert claim is not None
        queues.draw(claim)
        model = claim.queue.lane.model
        queues.charge(claim.queue, costs[model])
        queues.done(claim)
        served.append(model)
    assert served.count("slow") == 10
    assert served.count("quick") == 30


def test_idling_saves_up_nothing() -> None:
    queues = Queues(1, 100.0)
    queues.push(chunk(request("a"), 60), 0)
    assert [serve(queues, 0.0) for _ in range(30)] == [("a", 0, 1)] * 30
    queues.push(chunk(request("b"), 60), 0)
    served = [serve(queues, 0.0) for _ in range(20)]
    assert served[0] == ("b", 0, 1)  # at once
    assert served.count(("b", 0, 1)) == 10  # and no more than its share
    # Nor does having been alone cost anything.
    queues = Queues(1, 100.0)
    queues.push(chunk(request("a"), 30), 0)
    order(queues, 0.0)
    queues.push(chunk(request("b"), 30), 0)
    assert serve(queues, 0.0) == ("b", 0, 1)
    queues.push(chunk(request("a"), 30), 0)
    assert [serve(queues, 0.0) for _ in range(10)].count(("a", 0, 1)) == 5


def test_a_model_whose_stage_was_missing_does_not_catch_up() -> None:
    queues = Queues(1, 100.0)
    for model in "ab":
        queues.push(chunk(request(model), 60), 0)
    queues.block(request("a").hosted, 0, queues.generation)
    assert [serve(queues, 0.0) for _ in range(20)] == [("b", 0, 1)] * 20
    queues.changed()
    assert [serve(queues, 0.0) for _ in range(10)].count(("a", 0, 1)) == 5


def test_what_changed_since_is_not_passed_by() -> None:
    queues = Queues(8, 1.0)
    queues.push(chunk(request(), 3), 0)
    claim = queues.claim(0.0)
    assert claim is not None
    queues.changed()  # loaded between the take and the note of it
    queues.block(request("a").hosted, 0, claim.generation)
    queues.done(claim)
    assert not queues.missing(request("a").hosted, 0)
    assert serve(queues, 0.0) == ("a", 0, 3)


def test_background_rows_fill_a_batch_and_run_alone_at_last() -> None:
    queues = Queues(8, 100.0)
    queues.push(chunk(request(), 5), 1)
    queues.push(chunk(request(), 20, live=False), 1)
    queues.push(chunk(request("b"), 2), 0)
    assert order(queues, 0.0) == [("a", 1, 8), ("b", 0, 2), ("a", 1, 8), ("a", 1, 8), ("a", 1, 1)]
    assert queues.lane("a").virtual == 1.0  # what ran for the record alone is not the model's to pay


def test_workers_do_not_claim_rows_that_another_is_about_to_draw() -> None:
    queues = Queues(8, 100.0)
    queues.push(chunk(request(), 12), 0)
    first, second = queues.claim(0.0), queues.claim(0.0)
    assert first is not None
    assert second is not None
    assert queues.claim(0.0) is None
    queues.push(chunk(request(), 5), 0)
    third = queues.claim(0.0)
    assert third is not None
    assert [sum(len(piece.rows) for piece in queues.draw(claim)) for claim in (third, first, second)] == [8, 8, 1]


def test_a_late_worker_does_not_tidy_away_the_queue_that_came_after_its_own() -> None:
    queues = Queues(1, 100.0)
    queues.push(chunk(request(), 2), 0)
    early, late = queues.claim(0.0), queues.claim(0.0)
    assert early is not None
    assert late is not None
    queues.draw(early)
    queues.draw(late)
    queues.done(early)
    queues.push(chunk(request(), 1), 0)
    queues.done(late)
    assert serve(queues, 0.0) == ("a", 0, 1)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from("ab"), st.integers(0, 2), st.integers(1, 12), st.booleans()),
        st.tuples(st.sampled_from(["claim", "draw", "done", "drop", "block", "changed"]), st.integers(0, 10)),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(steps=STEPS, most=st.integers(1, 9), budget=st.sampled_from([0.0, 5.0]))
def test_every_row_is_drawn_once_in_whatever_order_workers_come(
    steps: list[tuple[object, ...]], most: int, budget: float
) -> None:
    queues = Queues(most, budget)
    pushed, drawn, claims, requests = 0, 0, list[Claim](), list[Request]()
    for now, (kind, *rest) in enumerate(steps):
        which = cast("int", rest[-1])
        if kind == "push":
            model, stage, rows, live = cast("tuple[str, int, int, bool]", tuple(rest))
            requests.append(request(model, rows))
            queues.push(chunk(requests[-1], rows, since=float(now), live=live), stage)
            pushed += rows
        elif kind == "claim" and (claim := queues.claim(float(now))):
            claims.append(claim)
        elif kind == "draw" and claims:
            batch = queues.draw(claims[which % len(claims)])
            assert sum(len(piece.rows) for piece in batch) <= most
            assert sorted(batch, key=lambda piece: not piece.live) == batch
            drawn += sum(len(piece.rows) for piece in batch)
        elif kind == "done" and claims:
            queues.done(claims.pop(which % len(claims)))
        elif kind == "drop" and requests:
            for piece in list(requests[which % len(requests)].queued):
                queues.drop(piece)
                drawn += len(piece.rows)
        elif kind == "block":
            queues.block(request("ab"[which % 2]).hosted, which % 3, queues.generation)
        elif kind == "changed":
            queues.changed()
    for claim in claims:
        drawn += sum(len(piece.rows) for piece in queues.draw(claim))
        queues.done(claim)
    queues.changed()
    drawn += sum(rows for _, _, rows in order(queues, 1e6))
    assert drawn == pushed
    assert not any(queues.lane(model).queues or queues.lane(model).running for model in "ab")


@pytest.mark.parametrize("seed", range(5))
def test_under_load_deep_stages_run_full_batches_and_nobody_waits_for_long(seed: int) -> None:
    """Twice the rows that can be served: survivors of stage 0 still gather, and wait no longer than the budget."""
    rng = np.random.default_rng(seed)
    queues, now, budget, batches = Queues(32, 1.0), 0.0, 1.0, [list[int](), [], []]
    waits: list[float] = []
    queues.lane("a").stages = 3
    for _ in range(2000):
        while queues.depths()["a", 0] < 500:
            queues.push(chunk(request(rows=4), 4, since=now), 0)
        claim = queues.claim(now)
        assert claim is not None
        stage = claim.queue.place.stage
        drawn = queues.draw(claim)
        now += 0.01
        rows = sum(len(piece.rows) for piece in drawn)
        batches[stage].append(rows)
        if stage:
            waits += [now - piece.since for piece in drawn]
        for piece in drawn if stage < 2 else ():
            stay = int((rng.random(len(piece.rows)) < 0.3).sum())
            if stay:
                queues.push(chunk(piece.request, stay, since=now if stage == 0 else piece.since), stage + 1)
        queues.done(claim)
    assert np.mean(batches[0]) == 32
    assert np.mean(batches[1]) > 28
    assert np.mean(batches[2]) > 16
    assert max(waits) <= budget + 0.1  # and what it takes to run what is ready before it


# --- the clock


def test_calls_come_in_the_order_of_their_times() -> None:
    clock, called, last = Clock(), list[int](), threading.Event()
    now = time.monotonic()
    clock.at(float("inf"), lambda: called.append(9))
    clock.at(now + 0.06, last.set)
    for number in (3, 1, 2):
        clock.at(now + 0.01 * number, lambda number=number: called.append(number))  # type: ignore[misc]
    clock.at(now - 1, lambda: called.append(0))
    assert last.wait(PATIENCE)
    assert time.monotonic() >= now + 0.06
    assert called == [0, 1, 2, 3]
    clock.close()


def test_a_cancelled_alarm_does_not_ring_and_does_not_stay() -> None:
    clock, called, last = Clock(), list[int](), threading.Event()
    alarms = [clock.at(time.monotonic() + 1e6, lambda: called.append(1)) for _ in range(1000)]
    for alarm in alarms:
        alarm.cancel()
        alarm.cancel()
    assert len(clock) <= 65
    busy, free = threading.Event(), threading.Event()
    clock.at(0.0, lambda: (busy.set(), free.wait(PATIENCE)))  # type: ignore[arg-type,return-value]
    assert busy.wait(PATIENCE)
    due = clock.at(1.0, lambda: called.append(2))
    due.cancel()
    clock.at(2.0, last.set)
    free.set()
    assert last.wait(PATIENCE)
    due.cancel()
    assert not called
    clock.close()


def test_a_call_that_fails_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    clock, last = Clock(), threading.Event()
    clock.at(0.0, lambda: [].remove(1))
    clock.at(0.0, last.set)
    assert last.wait(PATIENCE)
    clock.close()
    assert "failed" in caplog.text


def test_watched_rows_of_a_replaced_version_get_on_although_there_always_are_live_ones() -> None:
    queues = Queues(8, 0.0)
    queues.push(chunk(request(version=0), 3, since=0.0, live=False), 2)
    served = []
    for second in range(60):
        queues.push(chunk(request(version=1), 8, float(second)), 0)
        served.append(serve(queues, float(second)))
    assert served.count(("a", 2, 3)) == 1
    assert served.index(("a", 2, 3)) > 4, "not before it has waited for long"
    assert served.count(("a", 0, 8)) == 59
