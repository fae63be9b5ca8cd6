"""`Replayed` on the host: the answers of `Segments`, out of memory that stays where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Compiled
from tiny import INF, THRESHOLDS, Tiny, batch, doubtful, reference, wrong_in_threads

from offramp.runtime import ArtifactError, InputError, ProviderError, ProviderWarning, Session, UsageError, load
from offramp.runtime import engine as engine_module
from offramp.runtime import session as session_module
from offramp.runtime.always_asked import always_asked
from offramp.runtime.artifact import Artifact, open_artifact, write_artifact
from offramp.runtime.engine import CAPTURING, CUDA, CUDA_OPTIONS, EngineSession, ModelBytes, start_sessions
from offramp.runtime.execution import ASK
from offramp.runtime.process import CPU
from offramp.runtime.replayed import Replayed

LEVELS = st.floats(0, 1, width=32) | st.just(INF)


def replaying(artifact: Artifact, measured: tuple[int, ...] = ()) -> tuple[Session, Replayed]:
    stages = artifact.manifest.stages
    models = ((stage.file, always_asked(artifact.model(stage.file), stage.file)) for stage in stages)
    executor = Replayed(artifact.manifest, start_sessions(models, [CPU], 1, strict=True, graphs=True), "cpu")
    executor._measured = measured
    return Session(artifact, executor), executor


@pytest.fixture(scope="module")
def artifact(tiny: Tiny) -> Artifact:
    return open_artifact(tiny.path)


@pytest.fixture(scope="module", params=[(), (8, 20), (40,)], ids=["doubling", "measured", "one size"])
def session(artifact: Artifact, request: pytest.FixtureRequest) -> Session:
    return replaying(artifact, request.param)[0]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**16), size=st.integers(1, 33), thresholds=st.tuples(LEVELS, LEVELS))
def test_answers_are_right_batch_after_batch(
    session: Session, seed: int, size: int, thresholds: tuple[float, float]
) -> None:
    rows = batch(size, seed)
    sure = ~doubtful(rows, thresholds)
    probabilities, exits = reference(rows, thresholds)
    answers = session.run(rows, thresholds=thresholds)
    np.testing.assert_array_equal(answers.exits[sure], exits[sure])
    np.testing.assert_allclose(answers.probabilities[sure], probabilities[sure], atol=1e-5)
    np.testing.assert_array_equal(answers.confidence, answers.probabilities.max(axis=1))


def test_a_compiled_artifact_answers_as_in_segments(compiled: Compiled) -> None:
    images = compiled.digits.images
    expected = load(compiled.path, providers=[CPU], threads=1, executor="segments")
    session, _ = replaying(open_artifact(compiled.path), (5, 16, 40))
    for size in (1, 4, 5, 17, 33, 4):
        for plan in compiled.plans():
            want, got = (s.run(images[:size], thresholds=plan) for s in (expected, session))
            np.testing.assert_array_equal(got.exits, want.exits)
            np.testing.assert_allclose(got.probabilities, want.probabilities, atol=1e-5)
        everything = session.run_all(images[:size])
        np.testing.assert_allclose(everything.probabilities, expected.run_all(images[:size]).probabilities, atol=1e-5)


def test_every_stage_of_a_size_reads_and_writes_the_same_memory(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, executor = replaying(artifact)
    monkeypatch.setattr(executor, "_compaction", [Noted(one) for one in executor._compaction])
    prepared: list[tuple[str, int]] = []
    first_run = executor._prepared

    def noted(stage: Any, feed: Any, size: int) -> Any:
        prepared.append((stage.session.name, size))
        return first_run(stage, feed, size)

    monkeypatch.setattr(executor, "_prepared", noted)
    for size in (*range(1, 34), *range(33, 0, -1)):
        session.run(batch(size, size))
        session.run_all(batch(size, size))
    assert len(prepared) == len(set(prepared)) == len(executor._calls)
    assert {size for _, size in prepared} == {1, 2, 4, 8, 16, 32, 64}
    before = {key: value.data_ptr() for key, value in executor._places.items()}
    assert len(set(before.values())) == len(before)
    session.run(batch(33, 5))
    assert {key: value.data_ptr() for key, value in executor._places.items()} == before
    known = set(before.values())
    for one in executor._compaction:
        assert isinstance(one, Noted)
        assert one.seen
        assert one.seen <= known


class Noted:
    """What takes rows, and where the values lie that it read and wrote."""

    def __init__(self, session: EngineSession) -> None:
        self.session, self.seen = session, set[int]()

    def prepared(self, outputs: dict[str, Any], feed: dict[str, Any]) -> Callable[[], None]:
        self.seen |= {value.data_ptr() for value in (*outputs.values(), *feed.values()) if value is not feed["rows"]}
        return self.session.prepared(outputs, feed)


def test_answers_are_the_caller_s_to_keep(artifact: Artifact) -> None:
    session, _ = replaying(artifact)
    first, everything = session.run(batch(8, 1)), session.run_all(batch(8, 1))
    kept = [first.probabilities.copy(), first.confidence.copy(), everything.probabilities.copy()]
    session.run(batch(8, 2))
    session.run_all(batch(8, 2))
    for held, copy in zip((first.probabilities, first.confidence, everything.probabilities), kept, strict=True):
        np.testing.assert_array_equal(held, copy)


def test_the_caller_s_arrays_are_left_alone(artifact: Artifact) -> None:
    session, _ = replaying(artifact)
    rows = {name: np.asfortranarray(value) for name, value in batch(8).items()}
    before = {name: value.copy() for name, value in rows.items()}
    exits = session.run(rows).exits
    session.run(batch(8, 3))
    np.testing.assert_array_equal(session.run(rows).exits, exits)
    for name, value in rows.items():
        np.testing.assert_array_equal(value, before[name])


def test_threads_take_turns(artifact: Artifact) -> None:
    session, _ = replaying(artifact, (4, 16))
    assert wrong_in_threads(session) == []


def test_whoever_leaves_a_stream_holds_nobody_up(artifact: Artifact) -> None:
    session, _ = replaying(artifact)
    rows = batch(27)
    stream, other = session.stream(rows), session.stream(batch(27, 9))
    parts = [next(stream)]
    next(other)
    parts += stream
    whole = session.run(rows)
    np.testing.assert_array_equal(np.sort(np.concatenate([index for index, _ in parts])), np.arange(27))
    for index, answers in parts:
        np.testing.assert_array_equal(answers.exits, whole.exits[index])
        np.testing.assert_array_equal(answers.probabilities, whole.probabilities[index])


def test_a_batch_that_fails_holds_nobody_up(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    session, executor = replaying(artifact)

    def full(*_: Any) -> None:
        raise InputError("there is no room")

    with monkeypatch.context() as patched:
        patched.setattr(executor, "_prepared", full)
        with pytest.raises(InputError, match="no room"):
            session.run(batch(8))
    np.testing.assert_array_equal(session.run(batch(8)).exits, reference(batch(8), THRESHOLDS)[1])


def test_a_first_run_is_not_captured_and_every_other_has_a_graph_of_its_own(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[str] = []
    run_options = engine_module._run_options

    def noted(ort: Any, graph: str) -> Any:
        graphs.append(graph)
        return run_options(ort, graph)

    monkeypatch.setattr(engine_module, "_run_options", noted)
    session, executor = replaying(artifact)
    assert graphs == ["-1"] * 3, "one for all first runs of a stage"
    graphs.clear()
    session.run_all(batch(8))
    session.run_all(batch(3))
    session.run_all(batch(7))
    assert len(graphs) == len(set(graphs)) == len(executor._calls) == 6
    assert min(map(int, graphs)) > 0, "0 is ONNX Runtime's own"


def optimized(model: ModelBytes, path: Path) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.proto, options, providers=[CPU])
    return onnx.load(path / "optimized.onnx")


def test_a_stage_whose_head_is_always_asked_has_no_branches(compiled: Compiled, tmp_path: Path) -> None:
    artifact = open_artifact(compiled.path)
    asked = 0
    for stage in artifact.manifest.stages:
        model = artifact.model(stage.file)
        made = always_asked(model, stage.file)
        before, after = onnx.load_from_string(model.proto), onnx.load_from_string(made.proto)
        onnx.checker.check_model(after)
        inputs = [value.name for value in before.graph.input]
        assert [value.name for value in after.graph.input] == [name for name in inputs if name != ASK]
        asked += ASK in inputs
        if ASK in inputs:
            assert onnx.numpy_helper.to_array(after.graph.initializer[-1]).tolist() is True
            del after.graph.initializer[-1]
        del before.graph.input[:], after.graph.input[:]
        assert before == after
        assert "If" not in {node.op_type for node in optimized(made, tmp_path).graph.node}
    assert asked == len(artifact.manifest.exits) - 1 > 0


@pytest.mark.parametrize("spoilt", [b"\xff", b"\x3a\x7f\x0a", b"\x3a\x02\x0b\x0c", b"\x3a\x80"])
def test_bytes_that_are_no_model_are_refused(spoilt: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"stages/0\.onnx: is no ONNX model .*; compile the model again"):
        always_asked(ModelBytes(spoilt), "stages/0.onnx")


@pytest.fixture
def cuda_starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """CUDA that says it started, and is the CPU; returns what sessions ask of it."""
    asked: list[Any] = []
    inference = onnxruntime.InferenceSession

    def created(model: bytes, options: Any, providers: list[Any], **more: Any) -> Any:
        asked.append(providers[0])
        session = inference(model, options, providers=[CPU], **more)
        session.get_providers = lambda: [CUDA, CPU]
        return session

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", created)
    monkeypatch.setattr(engine_module, "_missing_driver", lambda: "")

    class OnHost(Replayed):
        def __init__(self, manifest: Any, sessions: Any, device: str) -> None:
            assert device == "cuda"
            super().__init__(manifest, sessions, "cpu")

    monkeypatch.setattr(session_module, "Replayed", OnHost)
    return asked


@pytest.mark.filterwarnings("error")
def test_load_has_stages_captured_and_compaction_not(tiny: Tiny, cuda_starts: list[Any]) -> None:
    with load(tiny.path, cuda_graphs=True) as session:
        assert cuda_starts[:3] == [(CUDA, CAPTURING)] * 3
        assert cuda_starts[3:] == [(CUDA, CUDA_OPTIONS)], "both compactions are of the same kinds"
        np.testing.assert_array_equal(session.run(batch(9)).exits, reference(batch(9), THRESHOLDS)[1])


def test_what_cannot_be_captured_runs_without_and_is_said_once(
    tiny: Tiny, cuda_starts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    created = onnxruntime.InferenceSession

    def refusing(model: bytes, options: Any, providers: list[Any], **more: Any) -> Any:
        if providers[0] == (CUDA, CAPTURING):
            raise RuntimeError("this session cannot use the graph capture feature")
        return created(model, options, providers=providers, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refusing)
    with pytest.warns(ProviderWarning) as said:
        session = load(tiny.path, providers=[CUDA, CPU], cuda_graphs=True)
    (warning,) = said
    assert warning.filename == __file__
    assert "stages/0.onnx: runs without a CUDA graph (this session cannot use the graph" in str(warning.message)
    np.testing.assert_array_equal(session.run(batch(9)).exits, reference(batch(9), THRESHOLDS)[1])


def test_where_cuda_does_not_start_the_cpu_answers(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(engine_module, "_missing_driver", lambda: "no NVIDIA driver: libcuda.so.1 is not there")
    with pytest.warns(ProviderWarning, match="could not start") as said:
        session = load(tiny.path, cuda_graphs=True)
    assert len(said) == 1
    np.testing.assert_array_equal(session.run(batch(9)).exits, reference(batch(9), THRESHOLDS)[1])


def test_graphs_without_cuda_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ProviderError, match="CUDA graphs need CUDAExecutionProvider, and providers are CPUEx"):
        load(tiny.path, providers=[CPU], cuda_graphs=True)


def test_graphs_of_the_single_file_are_refused(tiny: Tiny, cuda_starts: list[Any]) -> None:
    with pytest.raises(UsageError, match="CUDA graphs are of stages"):
        load(tiny.path, executor="single-file", cuda_graphs=True)


def test_graphs_of_rows_of_many_sizes_are_refused(tiny: Tiny, cuda_starts: list[Any], tmp_path: Path) -> None:
    x, side = tiny.manifest.inputs
    manifest = replace(tiny.manifest, inputs=(replace(x, shape=("batch", "tokens")), side))
    write_artifact(tmp_path / "free", manifest, tiny.files)
    with pytest.raises(UsageError, match=r"CUDA graphs are of rows of one size, and those of 'x' are .*tokens"):
        load(tmp_path / "free", cuda_graphs=True)
