"""Stages in fp16 and int8: what they answer is what was recorded, and what was promised counts all they changed."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models import QUICK, Attention, Chain, Compiled, captured, sentences, with_exits

from offramp.compiler import Options, Training, compile, split_rows
from offramp.compiler.demo import Digits
from offramp.compiler.emit import emit, model_bytes, stage_models
from offramp.compiler.emitted import Answered, Stages
from offramp.compiler.precision import converted
from offramp.passes import find_candidates
from offramp.runtime import load, open_artifact
from offramp.runtime.data import ArrayRows
from offramp.runtime.engine import ModelBytes
from offramp.runtime.errors import ModelError, ToleranceError, UsageError
from offramp.runtime.manifest import StageSpec
from offramp.runtime.table import render
from offramp.runtime.tune import evaluated, read_records, tune

ROWS = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)
LEARNS = Training(epochs=5, batch=32)
NAMED = {"x": [2], "probabilities": [2], "confidence": []}
CERTIFYING = replace(QUICK, precision="int8", policy="certified", tolerance=0.1, delta=0.2, dial=(0.005, 0.05, 0.3))


def chain(scale: float = 20.0) -> Chain:
    torch.manual_seed(0)
    model = Chain().eval()
    with torch.no_grad():
        model.last.weight.mul_(scale)
    return model


@pytest.fixture(scope="module")
def int8(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    out = tmp_path_factory.mktemp("int8") / "artifact"
    manifest = compile(digits.model, digits.images, out, labels=digits.labels, options=CERTIFYING)
    return Compiled(out, manifest, digits)


def truth(digits: Digits, rows: np.ndarray) -> np.ndarray:
    """[rows] the classes of the model as it came."""
    with torch.no_grad():
        found: np.ndarray = digits.model.eval()(torch.from_numpy(digits.images[rows])).argmax(1).numpy()
    return found


def kinds(data: bytes) -> Counter[str]:
    """Node types, those inside branches included."""
    model = onnx.load_from_string(data)
    graphs, found = [model.graph], Counter[str]()
    while graphs:
        graph = graphs.pop()
        found.update(node.op_type for node in graph.node)
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return found


def test_int8_stages_hold_their_products_in_8_bits_and_their_heads_in_float32(int8: Compiled) -> None:
    assert (int8.manifest.precision, len(int8.manifest.exits) > 1) == ("int8", True)
    assert {name for name in int8.manifest.files if name.endswith(".onnx")} == {
        stage.file for stage in int8.manifest.stages
    }
    for stage in int8.manifest.stages:
        model = onnx.load_from_string((int8.path / stage.file).read_bytes())
        made = {name: node.op_type for node in model.graph.node for name in node.output}
        products = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
        assert products
        assert {made[name] for node in products for name in node.input[:2]} == {"DequantizeLinear"}
        for value in (*model.graph.input, *model.graph.output):
            assert value.type.tensor_type.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL)
    asked = [a.g for node in model.graph.node if node.op_type == "If" for a in node.attribute]
    assert not any("QuantizeLinear" in node.op_type for graph in asked for node in graph.node)


def test_recorded_is_what_the_artifact_answers(int8: Compiled) -> None:
    splits, images = split_rows(len(int8.digits.images), CERTIFYING.seed), int8.digits.images
    kept = read_records(open_artifact(int8.path)).recorded
    with load(int8.path, threads=1) as session:
        for part in ("select", "certify", "test"):
            rows = getattr(splits, part)
            said = [session.run_all(images[piece]) for piece in np.array_split(rows, -(-len(rows) // 128))]
            classes = np.concatenate([one.classes for one in said], 1)
            sure = np.concatenate([one.confidence for one in said], 1)
            right, final = truth(int8.digits, rows), kept[part].final
            assert final is not None
            np.testing.assert_allclose(kept[part].confidence, sure[:-1].T, atol=1e-5)
            assert np.array_equal(kept[part].agrees, (classes[:-1] == right).T)
            assert np.array_equal(final, classes[-1] != right)


def test_certificates_count_what_the_artifact_answers_otherwise_than_the_model(int8: Compiled) -> None:
    splits = split_rows(len(int8.digits.images), CERTIFYING.seed)
    images, right = int8.digits.images[splits.certify], truth(int8.digits, splits.certify)
    proved = [plan for plan in int8.manifest.plans if plan.certificate is not None]
    assert 0.1 in [plan.tolerance for plan in proved]
    with load(int8.path, threads=1) as session:
        for plan in proved:
            assert plan.certificate is not None
            counted = int((session.run(images, tolerance=plan.tolerance).classes != right).sum())
            assert plan.certificate.observed == counted
            assert plan.certificate.bound <= plan.tolerance
            assert plan.certificate.delta == 0.2, "the certification rows had no say in which exits there are"


def test_the_evaluation_is_of_the_stages_against_the_model(int8: Compiled) -> None:
    splits, seen = split_rows(len(int8.digits.images), CERTIFYING.seed), int8.manifest.evaluation
    images, right = int8.digits.images[splits.test], truth(int8.digits, splits.test)
    labels = int8.digits.labels[splits.test]
    with load(int8.path, threads=1) as session:
        answers, alone = session.run(images), session.run(images, tolerance=0.0)
    assert seen.disagreement == pytest.approx((answers.classes != right).mean())
    assert seen.accuracy == pytest.approx((answers.classes == labels).mean())
    assert seen.accuracy_backbone == pytest.approx((right == labels).mean())
    assert [e.exit_rate for e in seen.exits] == pytest.approx(
        np.bincount(answers.exits, minlength=len(seen.exits)) / len(right)
    )
    assert (alone.exits == len(seen.exits) - 1).all(), "tolerance 0 is the last stage's own answers"
    changed = float((alone.classes != right).mean())
    assert seen.exits[-1].agreement_all == pytest.approx(1 - changed)
    assert f"stages in int8, which alone changes {changed * 100:.2f} % of the answers" in render(int8.manifest)
    assert 'id="precision">Stages in int8' in (int8.path / "report.html").read_text()


def test_tuning_counts_what_the_precision_changes(int8: Compiled, tmp_path: Path) -> None:
    manifest, stored = int8.manifest, read_records(open_artifact(int8.path))
    assert stored.sets == 1
    again = evaluated(manifest, manifest.plans[manifest.default_plan], stored)
    for name in ("disagreement", "accuracy", "flops", "regret"):
        assert getattr(again, name) == pytest.approx(getattr(manifest.evaluation, name), abs=1e-6), name
    made = tune(int8.path, tmp_path / "tuned", threads=1)
    splits = split_rows(len(int8.digits.images), CERTIFYING.seed)
    plan = made.plans[made.default_plan]
    assert (made.precision, plan.tolerance) == ("int8", 0.1)
    assert plan.certificate is not None
    with load(tmp_path / "tuned", threads=1) as session:
        given = session.run(int8.digits.images[splits.certify]).classes
    assert plan.certificate.observed == int((given != truth(int8.digits, splits.certify)).sum())


def test_fp16_stages_halve_the_weights_and_hardly_move_the_answers(tmp_path: Path) -> None:
    said: list[str] = []
    quick = Options(policy="joint", tolerance=0.3, precision="fp16", training=LEARNS, batches=())
    model = chain()
    made = compile(model, ROWS, tmp_path / "a", options=quick, say=said.append)
    assert "fp16 stages are emitted as onnx-segments only" in said
    assert made.precision == "fp16"
    assert len(made.exits) > 1, "else there is nothing to see"
    for stage in made.stages:
        data = (tmp_path / "a" / stage.file).read_bytes()
        assert kinds(data)["Gemm"] and kinds(data)["Softmax"]
        assert any(w.data_type == onnx.TensorProto.FLOAT16 for w in onnx.load_from_string(data).graph.initializer)
    with load(tmp_path / "a", threads=1) as session, torch.no_grad():
        answers = session.run(ROWS, tolerance=0.0)
        expected = torch.softmax(model(torch.from_numpy(ROWS)), 1).numpy()
    assert answers.probabilities.dtype == np.float32
    np.testing.assert_allclose(answers.probabilities, expected, atol=0.05)
    assert not np.array_equal(answers.probabilities, expected), "or nothing was converted"


@pytest.mark.parametrize("risk", ["regret", "disagreement"])
def test_every_risk_counts_the_last_stage_and_exits_may_be_chosen_by_time(tmp_path: Path, risk: str) -> None:
    options = Options(
        policy="joint", tolerance=0.3, precision="int8", risk=risk, metric="margin", cost="time", threads=1,
        training=LEARNS, batches=(2,), rounds=1,
    )  # fmt: skip
    made = compile(chain(), ROWS, tmp_path / "a", options=options)
    with np.load(io.BytesIO((tmp_path / "a" / "records.npz").read_bytes())) as kept:
        lost, differs = kept["test_final_regret"], kept["test_final"]
    assert (lost > 0).sum() <= differs.sum() <= len(differs)
    assert made.evaluation.exits[-1].agreement_all == pytest.approx(1 - differs.mean())
    assert made.evaluation.regret <= made.evaluation.disagreement
    assert made.measured.timings[0].batch == 2


def test_a_tolerance_that_the_precision_alone_breaks_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Stages.answer

    def mistaken(self: Stages, data: ArrayRows, rows: np.ndarray, what: str) -> Answered:
        """As answered, but for a last stage that gives every class the next one's probability."""
        said = answer(self, data, rows, what)
        if what == "float32 stages":
            return said
        said.probabilities[-1] = np.roll(said.probabilities[-1], 1, axis=1)
        return said

    monkeypatch.setattr(Stages, "answer", mistaken)
    for policy in ("joint", "certified"):
        options = Options(policy=policy, tolerance=0.1, precision="int8", training=LEARNS, batches=())
        with pytest.raises(ToleranceError, match=r"lower precision alone changes 100\.00% of"):
            compile(chain(), ROWS, tmp_path / "a", options=options, work=tmp_path / "work")
    assert [p.name for p in tmp_path.iterdir()] == ["work"]


def test_answers_that_are_not_numbers_are_refused() -> None:
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["b", *k]) for n, k in NAMED.items()]
    nodes = [
        onnx.helper.make_node("Log", ["x"], ["probabilities"]),
        onnx.helper.make_node("ReduceMax", ["probabilities"], ["confidence"], keepdims=0, axes=[1]),
    ]
    graph = onnx.helper.make_graph(nodes, "stage", value[:1], value[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    stages = Stages([StageSpec("stages/0.onnx", ("x",), (), ())], [ModelBytes(model.SerializeToString())])
    rows = ArrayRows({"x": np.array([[1, 2], [-1, 2], [0, 1]], np.float32)})
    assert stages.answer(rows, np.array([0]), "one").classes.tolist() == [[1]]
    with pytest.raises(ModelError, match=r"stages/0\.onnx answers 2 of 3 rows with what is not a number"):
        stages.answer(rows, np.arange(3), "all")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_model_of_matrix_products_and_side_inputs_converts_the_same_every_time(precision: str) -> None:
    given = sentences(200)
    backbone = captured(Attention, **given)
    program = with_exits(backbone, [c.name for c in find_candidates(backbone).kept])
    models = stage_models(program)
    assert len(models) > 1
    data, rows = ArrayRows({name: value.numpy() for name, value in given.items()}), np.arange(200)
    files = []
    for _ in range(2):
        specs, emitted = emit(program, ["onnx-segments"], made=converted(program, models, data, rows, precision))
        files.append(emitted)
    assert files[0] == files[1]
    answered = Stages(specs, [model_bytes(emitted, spec.file) for spec in specs]).answer(data, rows, "test")
    expected = program.all_exits(*given.values()).numpy()
    assert 0 < np.abs(answered.probabilities - expected).max() < 0.1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"precision": "int4"}, "precision 'int4' does not exist; choose one of fp32, fp16, int8"),
        ({"precision": "int8", "targets": ("onnx-segments", "onnx")}, "onnx is emitted at fp32 only; for int8 leave"),
        ({"precision": "fp16", "tolerance": 0.0}, "tolerance 0 allows no answer to change, and fp16 changes some"),
    ],
)
def test_refused_options(settings: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Options(**settings)  # type: ignore[arg-type]


def test_what_nobody_asks_for_follows_the_precision() -> None:
    assert Options().forms == ("onnx-segments", "onnx")
    assert Options(precision="int8").forms == ("onnx-segments",)
    assert Options(precision="int8", targets=("onnx-segments",)).forms == ("onnx-segments",)
