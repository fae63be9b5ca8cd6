"""The emitted ONNX: checked, named, reproducible, right in plain onnxruntime, and skipping for real."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from models import INF, Attention, Chain, Sized, captured, rows, sentences, with_exits

from offramp.compiler import emit
from offramp.passes import ExitProgram, Limits, find_candidates
from offramp.runtime.errors import UsageError
from offramp.runtime.execution import ASK
from offramp.runtime.manifest import StageSpec


@dataclass(frozen=True)
class Emitted:
    program: ExitProgram
    specs: tuple[StageSpec, ...]
    files: dict[str, bytes]


def emitted(kind: type) -> Emitted:
    backbone = captured(kind, **(sentences(8) if kind is Attention else {"x": rows(8)}))
    found = find_candidates(backbone, limits=Limits(least_left=0.0)).kept[:2]
    program = with_exits(backbone, [c.name for c in found], [0.4, 0.5])
    return Emitted(program, *emit(program))


@pytest.fixture(scope="module")
def chain() -> Emitted:
    return emitted(Chain)


@pytest.fixture(scope="module")
def attention() -> Emitted:
    return emitted(Attention)


@pytest.fixture(scope="module")
def sized() -> Emitted:
    return emitted(Sized)


def test_every_file_passes_the_full_check(chain: Emitted, attention: Emitted) -> None:
    for made in (chain, attention):
        assert sorted(made.files) == ["model.onnx", "stages/0.onnx", "stages/1.onnx", "stages/2.onnx"]
        for data in made.files.values():
            model = onnx.load_from_string(data)
            onnx.checker.check_model(model, full_check=True)
            assert {opset.domain for opset in model.opset_import} == {""}
            assert not model.functions


def test_stages_are_named_as_the_manifest_says(attention: Emitted) -> None:
    for index, spec in enumerate(attention.specs):
        session = ort.InferenceSession(attention.files[spec.file])
        ask = [ASK] if index < len(attention.specs) - 1 else []
        assert [i.name for i in session.get_inputs()] == [*spec.inputs, *ask]
        assert [o.name for o in session.get_outputs()] == [*spec.outputs, "probabilities", "confidence"]


def test_an_exit_that_is_not_asked_lets_no_row_go_and_computes_no_head(attention: Emitted) -> None:
    spec = attention.specs[0]
    model = onnx.load_from_string(attention.files[spec.file])
    (choice,) = [node for node in model.graph.node if node.op_type == "If"]
    branches = {a.name: a.g for a in choice.attribute}
    heads = {weight.name for weight in branches["then_branch"].initializer}
    assert heads
    assert not heads & {weight.name for weight in model.graph.initializer}
    assert {n.op_type for n in branches["else_branch"].node} == {"Constant"}
    session = ort.InferenceSession(attention.files[spec.file])
    feed = {}
    for given in session.get_inputs()[:-1]:
        shape = [3, *(size if isinstance(size, int) else 5 for size in given.shape[1:])]
        feed[given.name] = np.ones(shape, np.int64 if "int" in given.type else np.float32)
    silent = session.run(None, {**feed, ASK: np.array(False)})
    asked = session.run(None, {**feed, ASK: np.array(True)})
    for quiet, loud in zip(silent[:-2], asked[:-2], strict=True):
        assert np.array_equal(quiet, loud)
    assert asked[-2].shape == (3, 4)
    assert (asked[-1] > 0).all()
    assert [part.shape for part in silent[-2:]] == [(0, 4), (0,)], "it answers for no row"


def test_the_single_file_is_named_as_the_model_is(attention: Emitted) -> None:
    session = ort.InferenceSession(attention.files["model.onnx"])
    assert [i.name for i in session.get_inputs()] == ["ids", "mask"]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("probabilities", ["batch", 4]), ("exit", ["batch"])]
    assert [i.name for i in session.get_overridable_initializers()] == ["thresholds"]


LIMITS = [(-INF, -INF), (INF, INF), (INF, -INF), (0.35, 0.45)]


@pytest.mark.parametrize("name", ["chain", "attention", "sized"])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("count", [0, 1, 9])
def test_plain_onnxruntime_gives_the_eager_answers(
    request: pytest.FixtureRequest, name: str, limits: tuple[float, float], count: int
) -> None:
    made: Emitted = request.getfixturevalue(name)
    session = ort.InferenceSession(made.files["model.onnx"])
    inputs = sentences(count, seed=2) if name == "attention" else {"x": rows(count, seed=2)}
    expected, exits = made.program.with_thresholds(limits)(*inputs.values())
    feed = {key: value.numpy() for key, value in inputs.items()}
    got = session.run(["probabilities", "exit"], {**feed, "thresholds": np.array(limits, np.float32)})
    assert got[1].tolist() == exits.tolist()
    assert got[0] == pytest.approx(expected.numpy(), abs=1e-5)


def test_thresholds_have_the_plans_as_default(chain: Emitted) -> None:
    session = ort.InferenceSession(chain.files["model.onnx"])
    expected, exits = chain.program(rows(50))
    got = session.run(None, {"x": rows(50).numpy()})
    assert got[1].tolist() == exits.tolist()
    assert len(set(got[1])) > 1
    assert got[0] == pytest.approx(expected.numpy(), abs=1e-5)


def test_emitting_again_gives_the_same_bytes(chain: Emitted) -> None:
    assert emitted(Chain).files == chain.files


def test_only_the_targets_asked_for(chain: Emitted) -> None:
    specs, files = emit(chain.program, ["onnx"])
    assert (specs, list(files)) == ((), ["model.onnx"])
    specs, files = emit(chain.program, ["onnx-segments"])
    assert sorted(files) == [s.file for s in specs] == ["stages/0.onnx", "stages/1.onnx", "stages/2.onnx"]
    for wrong in (["tflite"], []):
        with pytest.raises(UsageError, match=r"is unknown; use onnx-segments or onnx"):
            emit(chain.program, wrong)


def branches(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    return [a.g for node in graph.node for a in node.attribute if a.HasField("g")]


def test_weights_lie_in_the_branch_that_uses_them(chain: Emitted) -> None:
    """In the outer graph ONNX Runtime would lose the blocked convolution layout."""
    outer = onnx.load_from_string(chain.files["model.onnx"]).graph
    level: list[onnx.GraphProto] = [outer]
    for stage in range(3):
        weights = {t.name: list(t.dims) for graph in level for t in graph.initializer if t.name != "thresholds"}
        alone = onnx.load_from_string(chain.files[f"stages/{stage}.onnx"]).graph.initializer
        assert {t.name: list(t.dims) for t in alone if len(t.dims) > 1}.items() <= weights.items()
        assert any(np.prod(dims) >= 16 * 4 for dims in weights.values())
        level = [branch for graph in level for branch in branches(graph)]
    assert not any(branches(graph) for graph in level)


def ran(model: bytes, feed: dict[str, np.ndarray], folder: Path) -> set[str]:
    """The nodes onnxruntime says it ran, unmerged."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(model, options)
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    return {e["name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")}


def test_the_single_file_skips_what_nobody_needs(chain: Emitted, tmp_path: Path) -> None:
    def stages(limits: list[float]) -> set[str]:
        feed = {"x": rows(5).numpy(), "thresholds": np.array(limits, np.float32)}
        return {name.split("/")[0] for name in ran(chain.files["model.onnx"], feed, tmp_path) if name[:6] == "stage_"}

    # The empty branch of stage i is called stage_i; whatever carries a later number computes something.
    assert stages([0.0, 0.0]) == {"stage_0"}
    assert stages([INF, 0.0]) == {"stage_0", "stage_1"}
    assert stages([INF, INF]) == {"stage_0", "stage_1", "stage_2"}


def test_no_exit_at_all_can_be_emitted() -> None:
    program = with_exits(captured(Chain), [])
    specs, files = emit(program)
    assert [s.file for s in specs] == ["stages/0.onnx"]
    session = ort.InferenceSession(files["model.onnx"])
    expected, _ = program(rows(3))
    got = session.run(["probabilities", "exit"], {"x": rows(3).numpy()})
    assert got[1].tolist() == [0, 0, 0]
    assert got[0] == pytest.approx(expected.numpy(), abs=1e-6)
