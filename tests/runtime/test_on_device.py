"""`OnDevice` on the device "cpu": the answers of `Segments`, in padded batches, with few reads by the host."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Compiled
from tiny import INF, THRESHOLDS, Tiny, batch, doubtful, reference, reference_all, resident, wrong_in_threads

from offramp.runtime import ArtifactError, InputError, ProviderWarning, Session, TensorSpec, load
from offramp.runtime import engine as engine_module
from offramp.runtime import on_device as on_device_module
from offramp.runtime import session as session_module
from offramp.runtime import stage_times as stage_times_module
from offramp.runtime.artifact import Artifact, open_artifact, write_artifact
from offramp.runtime.engine import CUDA, EngineSession, start_sessions
from offramp.runtime.gather import gather_model
from offramp.runtime.manifest import Manifest
from offramp.runtime.on_device import OnDevice
from offramp.runtime.process import CPU
from offramp.runtime.stage_times import measure_stages

LEVELS = st.floats(0, 1, width=32) | st.just(INF)


def device_session(artifact: Artifact, measured: tuple[int, ...] = (), worth: tuple[float, ...] = ()) -> Session:
    """A session whose values are OrtValues on the host; `measured` are the sizes worth padding to."""
    manifest = replace(artifact.manifest, measured=replace(artifact.manifest.measured, worth_dropping=worth))
    models = ((stage.file, artifact.model(stage.file)) for stage in manifest.stages)
    executor = OnDevice(manifest, start_sessions(models, [CPU], 1, strict=True), "cpu")
    executor._measured = measured
    return Session(replace(artifact, manifest=manifest), executor)


@pytest.fixture(scope="module")
def artifact(tiny: Tiny) -> Artifact:
    return open_artifact(tiny.path)


@pytest.fixture(scope="module", params=[(), (8, 20), (40,)], ids=["doubling", "measured", "one size"])
def session(artifact: Artifact, request: pytest.FixtureRequest) -> Session:
    return device_session(artifact, request.param)


class Calls:
    """What the host and the sessions did: runs as (model, rows each value had), and the shapes the host read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, forbid: bool = True) -> None:
        self.runs: list[tuple[str, int]] = []
        self.reads: list[tuple[int, ...]] = []
        run_bound, download = EngineSession.run_bound, engine_module.download

        def ran(engine: EngineSession, outputs: dict[str, str], feed: dict[str, Any]) -> list[Any]:
            values = run_bound(engine, outputs, feed)
            (rows,) = {value.shape()[0] for value in feed.values() if value.shape()} if "rows" not in feed else {0}
            self.runs.append((Path(engine.name).name, rows or feed["rows"].shape()[0]))
            return values

        def read(value: Any) -> np.ndarray:
            self.reads.append(tuple(value.shape()))
            return download(value)

        def refused(*_: Any) -> None:
            raise AssertionError("values went through the host")

        monkeypatch.setattr(EngineSession, "run_bound", ran)
        if forbid:
            monkeypatch.setattr(EngineSession, "run", refused)
        monkeypatch.setattr(on_device_module, "download", read)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**16), size=st.integers(1, 33), thresholds=st.tuples(LEVELS, LEVELS))
def test_answers_are_those_of_segments(
    tiny: Tiny, session: Session, seed: int, size: int, thresholds: tuple[float, float]
) -> None:
    rows = batch(size, seed)
    sure = ~doubtful(rows, thresholds)
    expected = segments(tiny).run(rows, thresholds=thresholds)
    answers = session.run(rows, thresholds=thresholds)
    np.testing.assert_array_equal(answers.exits[sure], expected.exits[sure])
    np.testing.assert_array_equal(answers.classes[sure], expected.classes[sure])
    np.testing.assert_allclose(answers.probabilities[sure], expected.probabilities[sure], atol=1e-5)
    np.testing.assert_allclose(answers.confidence[sure], expected.confidence[sure], atol=1e-5)
    assert [a.dtype for a in vars(answers).values()] == [a.dtype for a in vars(expected).values()]


_LOADED: dict[Path, Session] = {}


def segments(tiny: Tiny) -> Session:
    if tiny.path not in _LOADED:
        _LOADED[tiny.path] = load(tiny.path, providers=[CPU], threads=1, executor="segments")
    return _LOADED[tiny.path]


@pytest.mark.parametrize("worth", [(), (0.6, 0.6), (1.0, 1.0)])
@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), size=st.integers(1, 33))
def test_every_row_may_have_thresholds_of_its_own(
    artifact: Artifact, worth: tuple[float, ...], seed: int, size: int
) -> None:
    rows = batch(size, seed)
    tolerances = np.random.default_rng(seed).choice([0.0, 0.001, 0.01], size)
    session = device_session(artifact, (6, 12), worth)
    answers = session.run(rows, tolerance=tolerances)
    for tolerance in (0.0, 0.001, 0.01):
        thresholds = artifact.manifest.thresholds(tolerance)
        own = np.flatnonzero((tolerances == tolerance) & ~doubtful(rows, thresholds))
        probabilities, exits = reference(rows, thresholds)
        np.testing.assert_array_equal(answers.exits[own], exits[own])
        np.testing.assert_allclose(answers.probabilities[own], probabilities[own], atol=1e-5)


@pytest.mark.parametrize("size", [0, 1, 3, 32, 33, 257])
def test_run_all_gives_every_exit_for_every_row_and_nothing_of_the_padding(session: Session, size: int) -> None:
    rows = batch(size)
    everything = session.run_all(rows)
    assert everything.probabilities.shape == (3, size, 5)
    np.testing.assert_allclose(everything.probabilities, reference_all(rows), atol=1e-5)
    np.testing.assert_array_equal(everything.confidence, everything.probabilities.max(axis=2, initial=-1))


@pytest.mark.parametrize("thresholds", [(0.0, 0.0), (INF, INF), (INF, 0.0), (2.0, 2.0), THRESHOLDS])
def test_stream_hands_over_each_row_once(session: Session, thresholds: tuple[float, float]) -> None:
    rows = batch(27)
    whole = session.run(rows, thresholds=thresholds)
    parts = list(session.stream(rows, thresholds=thresholds))
    np.testing.assert_array_equal(np.sort(np.concatenate([index for index, _ in parts])), np.arange(27))
    for index, answers in parts:
        np.testing.assert_array_equal(answers.exits, whole.exits[index])
        np.testing.assert_array_equal(answers.probabilities, whole.probabilities[index])


def test_a_stage_runs_only_when_its_rows_are_asked_for(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    session, calls = device_session(artifact), Calls(monkeypatch)
    stream = session.stream(batch(64))
    assert calls.runs == []
    next(stream)
    assert calls.runs == [("0.onnx", 64)]
    next(stream)
    assert [name for name, _ in calls.runs] == ["0.onnx", "1.onnx"]


def left_after(rows: dict[str, np.ndarray], thresholds: tuple[float, float]) -> tuple[int, int]:
    exits = reference(rows, thresholds)[1]
    return int((exits > 0).sum()), int((exits > 1).sum())


def test_batches_are_padded_to_sizes(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = batch(60)
    after = left_after(rows, THRESHOLDS)
    assert 16 < after[1] < after[0] < 56, "else the sizes below are not what this is about"
    sessions = {
        "doubling": (device_session(artifact), 60),
        "measured": (device_session(artifact, (after[1] + 1, 57, 80)), 80),
        "beyond": (device_session(artifact, (3, 24)), 60),
    }
    calls = Calls(monkeypatch)
    seen = {}
    for name, (session, first) in sessions.items():
        calls.runs.clear()
        session.run(rows)
        seen[name] = [size for model, size in calls.runs if model != "compaction"]
        assert seen[name][0] == first
    up = [1 << (left - 1).bit_length() for left in after]
    assert seen["doubling"] == [60, *(min(size, 60) for size in up)]
    assert seen["measured"] == [80, 57, after[1] + 1]
    assert seen["beyond"][1:] == [next(s for s in (3, 24, 32, 60) if left <= s) for left in after]


def test_rows_are_dropped_only_where_a_smaller_size_is_reached_and_pays(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = batch(60)
    after = left_after(rows, THRESHOLDS)
    sizes = (after[1], 60)
    saved = 1 - after[1] / 60
    expected = {
        (): [60, 60, after[1]],  # the first exit's rows alone reach no smaller size
        (0.0, saved): [60, 60, after[1]],
        (0.0, saved + 0.01): [60, 60, 60],
        (1.0, 1.0): [60, 60, 60],
    }
    sessions = {worth: device_session(artifact, sizes, worth) for worth in expected}
    calls = Calls(monkeypatch)
    for worth, session in sessions.items():
        calls.runs.clear()
        session.run(rows)
        assert [size for name, size in calls.runs if name != "compaction"] == expected[worth], worth
        assert [size for name, size in calls.runs if name == "compaction"] == [after[1]] * (expected[worth][2] < 60)


def test_the_host_reads_confidences_and_answers_and_no_more(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, calls = device_session(artifact, (8, 40)), Calls(monkeypatch)
    cases = {
        (2.0, 2.0): [(40,), (40,), (40,), (40, 5)],  # nobody leaves: the confidence alone, then the answer
        (INF, INF): [(40,), (40, 5)],  # nobody is asked
        (0.0, 0.0): [(40,), (40, 5)],
        (INF, 0.0): [(40,), (40, 5)],
    }
    for thresholds, reads in cases.items():
        calls.reads.clear()
        session.run(batch(33), thresholds=thresholds)
        assert calls.reads == reads, thresholds
    calls.reads.clear()
    exits = session.run(batch(33)).exits
    assert set(exits) == {0, 1, 2}
    assert len([shape for shape in calls.reads if len(shape) == 1]) == 3, "one confidence per exit"
    assert len([shape for shape in calls.reads if len(shape) == 2]) == 3, "and one answer, where rows leave"


def test_the_caller_s_arrays_are_left_alone(session: Session) -> None:
    rows = {name: np.asfortranarray(value) for name, value in batch(33).items()}
    before = {name: value.copy() for name, value in rows.items()}
    answers = session.run(rows)
    session.run_all(rows)
    np.testing.assert_array_equal(answers.exits, session.run(before).exits)
    for name, value in rows.items():
        np.testing.assert_array_equal(value, before[name])


def test_threads_may_share_a_session(artifact: Artifact) -> None:
    session = device_session(artifact, (4, 16))
    assert wrong_in_threads(session) == []


def test_a_compiled_artifact_with_unasked_heads(compiled: Compiled) -> None:
    images = compiled.digits.images[:33]
    expected = load(compiled.path, providers=[CPU], threads=1, executor="segments")
    session = device_session(open_artifact(compiled.path), (5, 16, 40))
    assert len(compiled.manifest.exits) > 1
    for size in (1, 4, 5, 17, 33):
        for plan in compiled.plans():
            want, got = (s.run(images[:size], thresholds=plan) for s in (expected, session))
            np.testing.assert_array_equal(got.exits, want.exits)
            np.testing.assert_allclose(got.probabilities, want.probabilities, atol=1e-5)
        everything = session.run_all(images[:size])
        np.testing.assert_allclose(everything.probabilities, expected.run_all(images[:size]).probabilities, atol=1e-5)


class Elsewhere:
    """A device called "elsewhere", made of the host; where values were put and wanted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        self.put: list[tuple[str, np.dtype[Any]]] = []
        self.wanted: list[dict[str, str]] = []
        run_bound, upload = EngineSession.run_bound, engine_module.upload

        def ran(engine: EngineSession, outputs: dict[str, str], feed: dict[str, Any]) -> list[Any]:
            self.wanted.append(outputs)
            return run_bound(engine, dict.fromkeys(outputs, "cpu"), feed)

        def placed(array: np.ndarray, device: str) -> Any:
            self.put.append((device, array.dtype))
            return upload(array, "cpu")

        monkeypatch.setattr(EngineSession, "run_bound", ran)
        monkeypatch.setattr(module, "upload", placed)

    def assert_only_confidences_and_questions_are_on_the_host(self) -> None:
        assert {name for outputs in self.wanted for name, device in outputs.items() if device == "cpu"} == {
            "confidence"
        }
        assert {device for outputs in self.wanted for device in outputs.values()} == {"cpu", "elsewhere"}
        assert {kind for device, kind in self.put if device == "cpu"} <= {np.dtype(np.bool_)}
        assert {device for device, _ in self.put} >= {"elsewhere"}


def test_values_stay_on_the_device(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = open_artifact(compiled.path)
    device = Elsewhere(monkeypatch, on_device_module)
    models = [(stage.file, artifact.model(stage.file)) for stage in artifact.manifest.stages]
    executor = OnDevice(artifact.manifest, start_sessions(models, [CPU], 1, strict=True), "elsewhere")
    for thresholds in (None, (INF,) * (len(models) - 1)):
        Session(artifact, executor).run(compiled.digits.images[:33], thresholds=thresholds)
    device.assert_only_confidences_and_questions_are_on_the_host()


def test_stages_are_timed_on_values_that_stay_on_the_device(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host = measure_stages(artifact, 6, 1, rounds=1)
    device = Elsewhere(monkeypatch, stage_times_module)
    monkeypatch.setattr(stage_times_module, "device_of", lambda sessions: "elsewhere")
    found = measure_stages(artifact, 6, 1, rounds=1)
    device.assert_only_confidences_and_questions_are_on_the_host()
    assert {"g0", "g1", "g2"} in [set(outputs) for outputs in device.wanted], "compaction is timed there as well"
    assert found.sizes == on_host.sizes == (1, 2, 4, 6)
    assert found.asked.shape == on_host.asked.shape
    assert (found.asked > 0).all()
    assert (found.gather[:2] > 0).all()
    assert found.gather[2] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_a_value_does_not_hold_what_it_was_taken_from() -> None:
    session = EngineSession(gather_model([("tensor(float)", 2)]), "gather", [CPU], 1, strict=True)

    def taken(rows: np.ndarray, value: Any) -> Any:
        feed = {"rows": engine_module.upload(rows, engine_module.HOST), "v0": value}
        (one,) = session.run_bound({"g0": engine_module.HOST}, feed)
        return one

    whole = engine_module.upload(np.ones((8192, 1024), np.float32), engine_module.HOST)
    before = resident()
    kept = [taken(np.array([row]), taken(np.arange(8192), whole)) for row in range(6)]
    assert [value.shape() for value in kept] == [[1, 1024]] * 6
    assert resident() - before < 3 * 8192 * 1024 * 4


@pytest.mark.parametrize("array", [np.array(True), np.zeros((2, 3)), np.asfortranarray(np.eye(3)), np.arange(8)[::2]])
def test_a_value_on_the_device_has_the_array_s_shape_and_contents(array: np.ndarray) -> None:
    value = engine_module.upload(array, engine_module.HOST)
    assert tuple(value.shape()) == array.shape
    np.testing.assert_array_equal(value.numpy(), array)


def test_what_does_not_fit_on_the_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        @staticmethod
        def ortvalue_from_numpy(*_: Any) -> None:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 12000000000")

    monkeypatch.setattr(onnxruntime, "OrtValue", Full)
    with pytest.raises(InputError, match=r"float64 values of shape \(2, 3\) cannot be put on cuda .*a smaller batch"):
        engine_module.upload(np.zeros((2, 3)), "cuda")


def test_a_stage_the_manifest_does_not_describe_is_refused(tiny: Tiny, artifact: Artifact) -> None:
    stages = tiny.manifest.stages
    wrong = replace(tiny.manifest, stages=(stages[0], stages[1], replace(stages[2], inputs=("h1", "skip"))))
    models = ((stage.file, artifact.model(stage.file)) for stage in stages)
    with pytest.raises(ArtifactError, match="model and manifest differ on 'side'"):
        OnDevice(wrong, start_sessions(models, [CPU], 1, strict=True), "cpu")


def test_a_value_that_is_carried_and_never_read_does_no_harm(artifact: Artifact) -> None:
    manifest = artifact.manifest
    *carrying, last = manifest.stages
    stages = (*(replace(stage, carries=(*stage.carries, "idle")) for stage in carrying), last)
    inputs = (*manifest.inputs, TensorSpec("idle", "int64", ("batch", 2)))
    session = device_session(replace(artifact, manifest=replace(manifest, stages=stages, inputs=inputs)))
    rows = {**batch(33), "idle": np.zeros((33, 2), np.int64)}
    np.testing.assert_array_equal(session.run(rows).exits, reference(batch(33), THRESHOLDS)[1])


def test_load_takes_the_device_executor_where_all_stages_started_on_one(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Recorded(OnDevice):
        def __init__(self, manifest: Manifest, sessions: list[EngineSession], device: str) -> None:
            made.append(device)
            super().__init__(manifest, sessions, "cpu")

    class Started:
        def __init__(self, *providers: str) -> None:
            self.providers = providers

    on_gpu, on_cpu = Started(CUDA, CPU), Started(CPU)
    assert engine_module.device_of([on_gpu, on_gpu]) == "cuda"  # type: ignore[list-item]
    assert engine_module.device_of([on_gpu, on_cpu]) is None  # type: ignore[list-item]
    monkeypatch.setattr(session_module, "OnDevice", Recorded)
    load(tiny.path, threads=1)
    assert made == []
    monkeypatch.setattr(session_module, "device_of", lambda sessions: "cuda")
    with load(tiny.path, threads=1) as session:
        assert made == ["cuda"]
        rows = batch(40)
        np.testing.assert_array_equal(session.run(rows).exits, reference(rows, THRESHOLDS)[1])
    load(tiny.path, threads=1, executor="single-file")
    assert made == ["cuda"], "the single file compacts inside"


def test_measured_sizes_of_an_artifact_are_used(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device_module, "measured_sizes", lambda manifest: (64,))
    write_artifact(tmp_path / "artifact", tiny.manifest, tiny.files)
    artifact = open_artifact(tmp_path / "artifact")
    models = ((stage.file, artifact.model(stage.file)) for stage in artifact.manifest.stages)
    session = Session(artifact, OnDevice(artifact.manifest, start_sessions(models, [CPU], 1, strict=True), "cpu"))
    calls = Calls(monkeypatch)
    session.run(batch(9))
    assert {size for _, size in calls.runs} == {64}


def cuda_works() -> bool:
    return CUDA in onnxruntime.get_available_providers() and engine_module._missing_driver() == ""


@pytest.mark.skipif(not cuda_works(), reason="takes a GPU and onnxruntime-gpu")
@pytest.mark.parametrize("graphs", [False, True])
def test_on_a_gpu_answers_are_those_of_the_cpu(
    compiled: Compiled, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = load(compiled.path, providers=[CPU], threads=1, executor="segments")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProviderWarning)  # what cannot be captured would run without
        on_gpu = load(compiled.path, providers=[CUDA, CPU], cuda_graphs=graphs)
    calls = Calls(monkeypatch, forbid=False)
    for size in (1, 5, 33, 257, 33, 5, 1):
        images = compiled.digits.images[:size]
        every, expected = on_gpu.run_all(images), on_cpu.run_all(images)
        np.testing.assert_allclose(every.probabilities, expected.probabilities, atol=1e-4)
        limits = np.array(compiled.manifest.thresholds(), np.float32)[:, None]
        sure = ~(np.abs(expected.confidence[:-1] - limits) < 1e-4).any(axis=0)
        np.testing.assert_array_equal(on_gpu.run(images).exits[sure], on_cpu.run(images).exits[sure])
    assert calls.runs, "else the values went through the host"
