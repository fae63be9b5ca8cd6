"""A session's answers against the same program in numpy, in both forms of the artifact."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CLASSES, INF, THRESHOLDS, Tiny, batch, doubtful, reference, reference_all

from offramp.runtime import Answers, Session, UsageError, execution, load
from offramp.runtime.artifact import write_artifact
from offramp.runtime.engine import EngineSession
from offramp.runtime.execution import _moved_up, staying

PLANS = {
    "all at the first": (0.0, 0.0),
    "none": (INF, INF),
    "only the second": (INF, 0.0),
    "second never": (0.55, INF),
    "mixed": THRESHOLDS,
    "above one": (2.0, 2.0),
}
SIZES = (0, 1, 3, 32, 257)


FORMS: dict[str, Literal["segments", "single-file"]] = {
    "segments": "segments",
    "segments that carry": "segments",
    "segments that never drop": "segments",
    "single-file": "single-file",
}
WORTH = {"segments that carry": (0.6, 0.6), "segments that never drop": (1.0, 1.0)}


@pytest.fixture(scope="module", params=list(FORMS))
def session(tiny: Tiny, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Whether answered rows are dropped or carried along changes no answer."""
    path = tiny.path
    if request.param in WORTH:
        path = tmp_path_factory.mktemp("carries") / "artifact"
        measured = replace(tiny.manifest.measured, worth_dropping=WORTH[request.param])
        write_artifact(path, replace(tiny.manifest, measured=measured), tiny.files)
    return load(path, threads=1, executor=FORMS[request.param])


def test_rows_are_dropped_only_where_it_pays(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, (_, exits) = batch(64), reference(batch(64), THRESHOLDS)
    left = [int((exits == index).sum()) for index in range(3)]
    assert 0 < left[0] < 64
    assert left[1]
    seen: list[int] = []
    run = EngineSession.run

    def counted(self: EngineSession, outputs: list[str], feed: dict[str, Any]) -> list[Any]:
        seen.append(len(next(value for value in feed.values() if value.ndim)))
        return run(self, outputs, feed)

    monkeypatch.setattr(EngineSession, "run", counted)
    half = (64 - left[2]) / 64
    expected = {
        (): [64, 64 - left[0], left[2]],
        (1.0, 1.0): [64, 64, 64],
        (1.0, half): [64, 64, left[2]],
        (1.0, half + 0.01): [64, 64, 64],
    }
    for number, (worth, sizes) in enumerate(expected.items()):
        measured = replace(tiny.manifest.measured, worth_dropping=worth)
        write_artifact(tmp_path / str(number), replace(tiny.manifest, measured=measured), tiny.files)
        with load(tmp_path / str(number), threads=1, executor="segments") as session:
            seen.clear()
            session.run(rows)
            assert seen == sizes, worth


def assert_reference(answers: Answers, rows: dict[str, np.ndarray], thresholds: tuple[float, ...]) -> None:
    probabilities, exits = reference(rows, thresholds)
    sure = ~doubtful(rows, thresholds)
    assert sure.sum() >= 0.9 * len(sure)
    np.testing.assert_array_equal(answers.exits[sure], exits[sure])
    np.testing.assert_allclose(answers.probabilities[sure], probabilities[sure], atol=1e-5)
    np.testing.assert_array_equal(answers.classes, answers.probabilities.argmax(axis=1))
    np.testing.assert_array_equal(answers.confidence, answers.probabilities.max(axis=1, initial=-1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plan", PLANS)
def test_run_gives_the_reference_answers(session: Session, plan: str, size: int) -> None:
    rows = batch(size, seed=size)
    answers = session.run(rows, thresholds=PLANS[plan])
    assert_reference(answers, rows, PLANS[plan])
    kinds = [
        answers.classes.dtype,
        answers.probabilities.dtype,
        answers.exits.dtype,
        answers.confidence.dtype,
    ]
    assert kinds == [np.int64, np.float32, np.int64, np.float32]
    assert answers.probabilities.shape == (size, CLASSES)


def test_the_mixed_plan_uses_every_exit() -> None:
    assert np.bincount(reference(batch(257), THRESHOLDS)[1], minlength=3).min() >= 10


def test_run_takes_the_thresholds_of_the_default_plan(session: Session) -> None:
    assert_reference(session.run(batch(64)), batch(64), THRESHOLDS)


# The artifact's plans are for 0.1 % and 1 %.
DIAL = {0.0: (INF, INF), 0.0005: (INF, INF), 0.001: (INF, 0.9), 0.005: (INF, 0.9), 0.01: THRESHOLDS, 1.0: THRESHOLDS}


@pytest.mark.parametrize("tolerance", DIAL)
def test_the_dial_takes_the_boldest_plan_within_the_tolerance(tiny: Tiny, session: Session, tolerance: float) -> None:
    rows = batch(64)
    assert_reference(session.run(rows, tolerance=tolerance), rows, DIAL[tolerance])
    with load(tiny.path, threads=1, tolerance=tolerance) as turned:
        assert_reference(turned.run(rows), rows, DIAL[tolerance])
        assert (turned.plan is None) == (tolerance < 0.001)
        assert turned.plan is None or turned.plan.tolerance <= tolerance
        assert_reference(turned.run(rows, tolerance=0.01), rows, THRESHOLDS)


def test_what_a_call_gave_before_comes_to_the_same_thresholds(session: Session) -> None:
    rows, pairs = batch(16), [(at / 100, 1 - at / 100) for at in range(100)]
    first = [session.run(rows, thresholds=pair).exits for pair in pairs]
    assert len({exits.tobytes() for exits in first}) > 3
    for pair, exits in zip(pairs, first, strict=True):  # more of them than are remembered
        for form in (pair, list(pair), np.array(pair)):
            np.testing.assert_array_equal(session.run(rows, thresholds=form).exits, exits)
    for _ in range(2):
        for tolerance in (0, 0.0, 0.001, 0.01, 1, 1.0):
            assert_reference(session.run(rows, tolerance=tolerance), rows, DIAL[float(tolerance)])


SCORES = st.sampled_from([0.2, 0.5, 0.8, math.nan])  # that one never leaves


@given(
    st.lists(st.tuples(SCORES, st.sampled_from([0.2, 0.5, 0.8])), min_size=1), st.sampled_from([1, 40]), st.booleans()
)
def test_every_row_leaves_or_stays(rows: list[tuple[float, float]], repeat: int, one_limit: bool) -> None:
    confidence, limits = (np.array(column) for column in zip(*rows * repeat, strict=True))
    stays = staying(confidence, 0.5 if one_limit else limits)
    leave = [row for row, score in enumerate(confidence) if score >= (0.5 if one_limit else limits[row])]
    assert (stays is None) == (not leave)
    if stays is not None:
        assert sorted([*leave, *stays]) == list(range(len(confidence)))
        assert stays.tolist() == sorted(stays)


@pytest.mark.parametrize("size", SIZES)
def test_large_values_are_compacted_in_their_own_memory(
    session: Session, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = batch(size, seed=size)
    kept = {name: value.copy() for name, value in rows.items()}
    expected = session.run(rows)
    moved: list[int] = []
    monkeypatch.setattr(execution, "_LARGE", 0)
    monkeypatch.setattr(execution, "_moved_up", lambda *given: (moved.append(size), _moved_up(*given))[1])
    answers = session.run(rows)
    for name in ("classes", "probabilities", "exits", "confidence"):
        np.testing.assert_array_equal(getattr(answers, name), getattr(expected, name))
    for name, value in rows.items():
        np.testing.assert_array_equal(value, kept[name])
    worth = session.manifest.measured.worth_dropping
    if isinstance(session._executor, execution.Segments) and size > 3 and not worth:
        assert moved


@pytest.mark.parametrize("size", SIZES)
def test_every_row_may_have_a_tolerance_of_its_own(session: Session, size: int) -> None:
    rows = batch(size, seed=size)
    levels = np.random.default_rng(size).choice(list(DIAL), size)
    answers = session.run(rows, tolerance=levels)
    parts = list(session.stream(rows, tolerance=levels))
    assert [int(part.exits[0]) for _, part in parts] == sorted({int(part.exits[0]) for _, part in parts})
    for index, part in parts:
        np.testing.assert_array_equal(part.exits, answers.exits[index])
    for level, thresholds in DIAL.items():
        own = np.flatnonzero(levels == level)
        expected, exits = reference(rows, thresholds)
        sure = own[~doubtful(rows, thresholds)[own]]
        np.testing.assert_array_equal(answers.exits[sure], exits[sure])
        np.testing.assert_allclose(answers.probabilities[sure], expected[sure], atol=1e-5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (-0.1, "tolerance -0.1 is not a share of rows"),
        (float("nan"), "tolerance nan is not a share of rows"),
        (np.array([0.01, 0.01]), r"tolerance is float64 \[2\]; give one number, or one for each of the 3 rows"),
        (np.array(["a", "b", "c"]), "give one number"),
        ("much", "tolerance 'much' is not a share of rows"),
        (np.array([0.0, 0.5, 1.5]), "tolerance 1.5 is not a share of rows"),
    ],
)
def test_tolerances_that_are_none_are_refused(session: Session, given: float | np.ndarray, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        session.run(batch(3), tolerance=given)


@pytest.mark.parametrize("narrow", [np.float16, np.float32])
def test_a_tolerance_in_a_narrower_float_is_what_was_written(tiny: Tiny, session: Session, narrow: type) -> None:
    rows = batch(60)
    for level in DIAL:
        assert session.manifest.plan(narrow(level)) == session.manifest.plan(level)
        expected = session.run(rows, tolerance=level).exits
        np.testing.assert_array_equal(session.run(rows, tolerance=narrow(level)).exits, expected)
        np.testing.assert_array_equal(session.run(rows, tolerance=np.full(60, level, narrow)).exits, expected)


def test_a_ragged_tolerance_is_refused(session: Session) -> None:
    with pytest.raises(UsageError, match="is ragged; give one number, or one for each row"):
        session.run(batch(2), tolerance=[[0.1], [0.1, 0.2]])


def test_a_tolerance_and_thresholds_are_refused_together(tiny: Tiny, session: Session) -> None:
    with pytest.raises(UsageError, match="both a tolerance and thresholds"):
        session.run(batch(3), tolerance=0.01, thresholds=THRESHOLDS)
    with pytest.raises(UsageError, match="tolerance 2 is not a share"):
        load(tiny.path, tolerance=2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plan", PLANS)
def test_stream_and_on_exit_hand_over_each_row_once(session: Session, plan: str, size: int) -> None:
    rows = batch(size, seed=size)
    whole = session.run(rows, thresholds=PLANS[plan])
    told: list[tuple[np.ndarray, Answers]] = []
    session.run(rows, thresholds=PLANS[plan], on_exit=lambda *leaving: told.append(leaving))
    for parts in (list(session.stream(rows, thresholds=PLANS[plan])), told):
        shallowest_first = [int(answers.exits[0]) for _, answers in parts]
        assert shallowest_first == sorted(set(shallowest_first))
        seen = np.concatenate([indices for indices, _ in parts]) if parts else np.empty(0, np.int64)
        assert seen.dtype == np.int64
        np.testing.assert_array_equal(np.sort(seen), np.arange(size))
        for indices, answers in parts:
            np.testing.assert_array_equal(answers.exits, whole.exits[indices])
            np.testing.assert_array_equal(answers.probabilities, whole.probabilities[indices])
            np.testing.assert_array_equal(answers.classes, whole.classes[indices])
            np.testing.assert_array_equal(answers.confidence, whole.confidence[indices])


@pytest.mark.parametrize("size", SIZES)
def test_run_all_gives_every_exit_for_every_row(session: Session, size: int) -> None:
    rows = batch(size, seed=size)
    everything = session.run_all(rows)
    assert everything.probabilities.shape == (3, size, CLASSES)
    assert everything.classes.dtype == np.int64
    np.testing.assert_allclose(everything.probabilities, reference_all(rows), atol=1e-5)
    np.testing.assert_array_equal(everything.classes, everything.probabilities.argmax(axis=2))
    np.testing.assert_array_equal(everything.confidence, everything.probabilities.max(axis=2, initial=-1))


@pytest.mark.parametrize("spoilt", [[0], [1, 2], [0, 1, 2, 3]])
def test_a_row_that_overflows_is_no_number_and_the_others_are_right(session: Session, spoilt: list[int]) -> None:
    rows = batch(4)
    expected = reference_all(rows)
    rows["x"][spoilt] = 3e38  # finite, but not what comes of it
    everything = session.run_all(rows)
    whole = [row for row in range(4) if row not in spoilt]
    assert np.isnan(everything.probabilities[:, spoilt]).all()
    assert np.isnan(everything.confidence[:, spoilt]).all()
    np.testing.assert_allclose(everything.probabilities[:, whole], expected[:, whole], atol=1e-5)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 40),
    thresholds=st.tuples(*[st.floats(0, 1, width=32) | st.just(INF)] * 2),
)
def test_a_row_does_not_depend_on_its_neighbours(
    session: Session, seed: int, size: int, thresholds: tuple[float, float]
) -> None:
    rows = batch(size, seed)
    sure = ~doubtful(rows, thresholds)
    together = session.run(rows, thresholds=thresholds)
    order = np.random.default_rng(seed).permutation(size)
    shuffled = session.run({name: value[order] for name, value in rows.items()}, thresholds=thresholds)
    alone = [
        session.run({name: value[i : i + 1] for name, value in rows.items()}, thresholds=thresholds)
        for i in range(size)
    ]
    for position, row in enumerate(order):
        if sure[row]:
            assert shuffled.exits[position] == together.exits[row] == alone[row].exits[0]
            np.testing.assert_allclose(shuffled.probabilities[position], together.probabilities[row], atol=1e-5)
            np.testing.assert_allclose(alone[row].probabilities[0], together.probabilities[row], atol=1e-5)


def test_a_confidence_that_equals_the_threshold_is_enough(session: Session) -> None:
    rows = batch(8)
    confidence = session.run_all(rows).confidence[0]
    for row in range(8):
        exits = session.run(rows, thresholds=(float(confidence[row]), INF)).exits
        np.testing.assert_array_equal(exits == 0, confidence >= confidence[row])


class Count:
    """Names of the models run, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        original = EngineSession.run

        def run(engine: EngineSession, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            self.names.append(f"{Path(engine.name).name}:{len(next(iter(feed.values())))}")
            return original(engine, outputs, feed)

        monkeypatch.setattr(EngineSession, "run", run)


def test_a_stage_runs_only_when_its_rows_are_asked_for(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Count(monkeypatch)
    rows = batch(64)
    exits = reference(rows, THRESHOLDS)[1]
    stream = load(tiny.path, threads=1).stream(rows)
    assert count.names == []
    next(stream)
    assert count.names == ["0.onnx:64"]
    next(stream)
    assert count.names == ["0.onnx:64", f"1.onnx:{(exits > 0).sum()}"]
    next(stream)
    assert count.names[2:] == [f"2.onnx:{(exits > 1).sum()}"]
    assert next(stream, None) is None


def test_no_stage_runs_once_all_rows_left(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Count(monkeypatch)
    load(tiny.path, threads=1).run(batch(8), thresholds=(0.0, 0.0))
    assert count.names == ["0.onnx:8"]


def test_no_rows_never_reach_onnxruntime(tiny: Tiny, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Count(monkeypatch)
    session.run(batch(0))
    session.run_all(batch(0))
    assert list(session.stream(batch(0))) == []
    assert count.names == []


def test_the_caller_s_arrays_are_left_alone(session: Session) -> None:
    rows = batch(33)
    before = {name: value.copy() for name, value in rows.items()}
    session.run(rows)
    session.run_all(rows)
    for name, value in rows.items():
        np.testing.assert_array_equal(value, before[name])


def test_threads_may_share_a_session(session: Session) -> None:
    wrong: list[str] = []

    def answer(seed: int) -> None:
        for size in (1, 7, 32):
            rows = batch(size, seed)
            if not np.array_equal(session.run(rows).exits, reference(rows, THRESHOLDS)[1]):
                wrong.append(f"seed {seed}, size {size}")

    seeds = [seed for seed in range(40) if not any(doubtful(batch(s, seed), THRESHOLDS).any() for s in (1, 7, 32))]
    workers = [threading.Thread(target=answer, args=(seed,)) for seed in seeds[:8]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(workers) == 8
    assert wrong == []


def test_properties_say_what_the_manifest_says(tiny: Tiny, session: Session) -> None:
    assert replace(session.manifest, measured=tiny.manifest.measured) == tiny.manifest
    assert session.inputs == tiny.manifest.inputs
    assert (session.classes, session.exits) == (CLASSES, 3)


def test_a_closed_session_refuses(tiny: Tiny) -> None:
    with load(tiny.path, threads=1) as session:
        session.run(batch(1))
    with pytest.raises(UsageError, match="closed; load"):
        session.run(batch(1))


@pytest.mark.parametrize(
    "thresholds",
    [
        (0.5,),
        (0.5, 0.5, 0.5),
        (float("nan"), 0.5),
        ("high", 0.5),
        ("0.5", "0.5"),
        (10**400, 0.5),
        0.5,
        ((0.5,), (0.5,)),
    ],
    ids=range(8),
)
def test_thresholds_that_do_not_fit_are_refused(session: Session, thresholds: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match=r"give 2"):
        session.run(batch(1), thresholds=thresholds)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2", 2**40])
def test_a_thread_count_that_is_none_is_refused(tiny: Tiny, threads: int) -> None:
    with pytest.raises(UsageError, match="threads is"):
        load(tiny.path, threads=threads)


def test_two_threads_and_the_default_give_the_same_answers(tiny: Tiny) -> None:
    for threads in (2, None):
        with load(tiny.path, threads=threads) as session:
            assert_reference(session.run(batch(64)), batch(64), THRESHOLDS)


def test_an_onnxruntime_that_hides_its_own_session_answers_alike(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = onnxruntime.InferenceSession

    class Hiding:
        """Passes on what is public, and nothing of the library's own."""

        def __init__(self, *given: Any, **named: Any) -> None:
            self.public = wrapper(*given, **named)

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            return getattr(self.public, name)

    rows, usual = batch(9), load(tiny.path, threads=1)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Hiding)
    hidden, told = load(tiny.path, threads=1).run(rows), usual.run(rows)
    np.testing.assert_array_equal(hidden.probabilities, told.probabilities)
    np.testing.assert_array_equal(hidden.exits, told.exits)
