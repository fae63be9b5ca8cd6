"""`compile` as a whole: the same artifact every time, in every form, and nothing left where it failed."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import QUICK, Chain, Compiled
from torch import nn

from offramp.compiler import Costs, Options, Records, Training, compile, prepare
from offramp.compiler.choose import choose_exits
from offramp.compiler.demo import Digits
from offramp.runtime import load, open_artifact
from offramp.runtime.artifact import write_artifact
from offramp.runtime.data import ArrayRows
from offramp.runtime.errors import InputError, ModelError, ToleranceError, UsageError

CHAIN_ROWS = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)

LEARNS = Training(epochs=10, batch=32)


def chain() -> nn.Module:
    """Its answers differ from row to row, or no head could learn more than one answer for all."""
    torch.manual_seed(0)
    model = Chain().eval()
    with torch.no_grad():
        model.last.weight.mul_(20)
    return model


def contents(path: Path) -> dict[str, bytes]:
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    found.pop("manifest.json")
    found.pop("report.html")
    return found


def test_same_seed_same_artifact(compiled: Compiled, tmp_path: Path) -> None:
    digits = compiled.digits
    again = compile(digits.model, digits.images, tmp_path / "again", labels=digits.labels, options=QUICK)
    assert contents(tmp_path / "again") == contents(compiled.path)
    blank = compiled.manifest.measured
    assert dataclasses.replace(again, measured=blank) == compiled.manifest


def test_the_artifact_is_whole_and_leaves_nothing_beside_it(compiled: Compiled) -> None:
    assert open_artifact(compiled.path).manifest == compiled.manifest
    assert [p.name for p in compiled.path.parent.iterdir()] == ["artifact"]
    assert len(compiled.manifest.exits) > 1
    assert compiled.manifest.evaluation.flops < compiled.manifest.evaluation.flops_backbone
    assert compiled.manifest.evaluation.accuracy is not None


def test_labels_change_only_the_report(compiled: Compiled, tmp_path: Path) -> None:
    unlabelled = compile(compiled.digits.model, compiled.digits.images, tmp_path / "blind", options=QUICK)
    assert unlabelled.plans == compiled.manifest.plans
    assert unlabelled.evaluation.accuracy is None
    labelled = contents(compiled.path)
    assert labelled.pop("right.npz"), "which test rows are answered right, beside the report"
    assert contents(tmp_path / "blind") == labelled


def test_the_records_are_those_of_the_splits(compiled: Compiled) -> None:
    with np.load(compiled.path / "records.npz", allow_pickle=False) as records:
        for part in ("select", "certify", "test"):
            rows = getattr(compiled.manifest.splits, part)
            assert records[f"{part}_confidence"].shape == (rows, len(records["candidates"]))
            assert records[f"{part}_agrees"].dtype == np.bool_


@pytest.fixture(scope="module")
def without_exits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tolerance of zero, and heads that are never right about every row they are surest of."""
    out = tmp_path_factory.mktemp("none") / "artifact"
    options = Options(tolerance=0.0, training=LEARNS, batches=(1,), rounds=2)
    manifest = compile(chain(), CHAIN_ROWS, out, options=options)
    assert [e.head for e in manifest.exits] == ["backbone"]
    assert manifest.evaluation.disagreement == 0.0
    return out


@pytest.mark.parametrize("executor", ["segments", "single-file"])
def test_an_artifact_without_exits_answers_as_the_backbone(without_exits: Path, executor: str) -> None:
    expected = torch.softmax(chain()(torch.from_numpy(CHAIN_ROWS[:5])), 1).detach().numpy()
    with load(without_exits, executor=executor) as session:  # type: ignore[arg-type]
        answers = session.run(CHAIN_ROWS[:5])
        assert answers.exits.tolist() == [0] * 5
        assert answers.probabilities == pytest.approx(expected, abs=1e-5)
        ((rows, streamed),) = list(session.stream(CHAIN_ROWS[:5]))
        assert rows.tolist() == [0, 1, 2, 3, 4]
        assert streamed.probabilities == pytest.approx(expected, abs=1e-5)
        assert session.run_all(CHAIN_ROWS[:5]).probabilities[0] == pytest.approx(expected, abs=1e-5)
        assert len(session.run(CHAIN_ROWS[:0]).exits) == 0


@pytest.mark.parametrize(
    ("target", "files"), [("onnx", {"model.onnx"}), ("onnx-segments", {"stages/0.onnx", "stages/1.onnx"})]
)
def test_one_target_is_enough(target: str, files: set[str], tmp_path: Path) -> None:
    options = Options(tolerance=1.0, targets=(target,), training=LEARNS, batches=(2,), rounds=1, max_candidates=1)
    manifest = compile(chain(), CHAIN_ROWS, tmp_path / "out", options=options)
    assert {name for name in manifest.files if name.endswith(".onnx")} == files
    assert manifest.measured.timings[0].batch == 2
    with load(tmp_path / "out") as session:
        assert session.run(CHAIN_ROWS[:9]).probabilities.shape == (9, 4)


def test_the_default_policy_writes_its_certificate(tmp_path: Path) -> None:
    options = Options(tolerance=0.5, delta=0.1, training=LEARNS, batches=(), targets=("onnx-segments",))
    manifest = compile(chain(), CHAIN_ROWS, tmp_path / "out", options=options)
    plan = manifest.plans[manifest.default_plan]
    assert plan.policy == "certified"
    assert plan.certificate is not None
    assert plan.certificate.delta == 0.1
    assert plan.certificate.bound <= 0.5
    if plan.thresholds:
        assert plan.certificate.rows == manifest.splits.certify


@pytest.mark.parametrize(("risk", "metric"), [("regret", "margin"), ("regret", "entropy"), ("disagreement", "margin")])
def test_other_risks_and_metrics_are_chosen_by_certified_and_served(tmp_path: Path, risk: str, metric: str) -> None:
    options = Options(tolerance=0.3, delta=0.1, risk=risk, metric=metric, training=LEARNS, batches=())
    manifest = compile(chain(), CHAIN_ROWS, tmp_path / "out", options=options)
    assert (manifest.risk, manifest.confidence) == (risk, metric)
    assert len(manifest.exits) > 1, "else there is nothing to see"
    plan = manifest.plans[manifest.default_plan]
    assert plan.certificate is not None
    assert plan.certificate.bound <= 0.3
    seen = manifest.evaluation
    assert 0 <= seen.regret <= seen.disagreement, "a disagreement costs at most a whole answer"
    with (
        load(tmp_path / "out", threads=1, executor="segments") as one,
        load(tmp_path / "out", threads=1, executor="single-file") as other,
    ):
        staged, whole = one.run(CHAIN_ROWS[:60]), other.run(CHAIN_ROWS[:60])
    assert np.array_equal(staged.exits, whole.exits)
    np.testing.assert_allclose(staged.confidence, whole.confidence, atol=1e-5)
    ordered = np.sort(staged.probabilities, axis=1)
    if metric == "margin":
        np.testing.assert_allclose(staged.confidence, ordered[:, -1] - ordered[:, -2], atol=1e-6)
    else:
        entropy = -(ordered * np.log(np.maximum(ordered, 1e-30))).sum(1)
        np.testing.assert_allclose(staged.confidence, 1 - entropy / np.log(4), atol=1e-5)


def test_a_failure_leaves_the_old_artifact(compiled: Compiled, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = open_artifact(compiled.path).manifest
    files = {name: (compiled.path / name).read_bytes() for name in manifest.all_files()}
    write_artifact(out, manifest, files)
    with pytest.raises(InputError, match="does not run on the data"):
        compile(compiled.digits.model, np.zeros((300, 2, 8, 8), np.float32), out, options=QUICK)
    assert open_artifact(out).manifest == manifest
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_kept_heads_are_taken_up_under_another_tolerance(tmp_path: Path) -> None:
    said: list[str] = []
    quick = Options(tolerance=0.5, training=LEARNS, batches=(), targets=("onnx-segments",))
    work = tmp_path / "work"
    compile(chain(), CHAIN_ROWS, tmp_path / "one", options=quick, work=work, say=said.append)
    assert not any("resuming" in line for line in said)
    other = dataclasses.replace(quick, tolerance=0.1)
    compile(chain(), CHAIN_ROWS, tmp_path / "two", options=other, work=work, say=said.append)
    assert any("resuming after epoch 10 of 10" in line for line in said)
    assert (work / "heads0" / "heads.pt").is_file()


class Untranslatable(Chain):
    """Its last operator has no ONNX form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.special.bessel_j0(x.sum(1, keepdim=True))


def test_an_operator_without_onnx_form_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = Options(policy="joint", training=LEARNS, batches=())
    with pytest.raises(ModelError, match=r"cannot be translated to ONNX: .*bessel_j0"):
        compile(Untranslatable(), CHAIN_ROWS, tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tolerance": 1.5}, "tolerance 1.5 is not a share of rows; give a number from 0 to 1"),
        ({"tolerance": float("nan")}, "tolerance nan"),
        ({"policy": "greedy"}, "policy 'greedy' does not exist; choose one of"),
        ({"risk": "fear"}, "risk 'fear' does not exist; choose one of disagreement, regret"),
        ({"metric": "luck"}, "confidence metric 'luck' does not exist; choose one of max_probability"),
        ({"targets": ("tflite",)}, "target tflite is unknown; use onnx-segments or onnx"),
        ({"targets": ()}, r"target \(none\) is unknown"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"seed": 2**64}, "beyond 63 bits"),
        ({"max_candidates": 0}, "give 1 or more"),
        ({"rounds": 0}, "0 rounds measure nothing"),
        ({"batches": (1, 0)}, "batches of 0 rows cannot be measured"),
        ({"cost": "watts"}, "cost 'watts' does not exist; choose one of flops, time"),
        ({"cost_batch": 0}, "the time of 0 rows is asked for"),
        ({"cost": "time", "targets": ("torchscript",)}, "time is measured in ONNX Runtime; add target onnx-segments"),
    ],
)
def test_refused_options(settings: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Options(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("work", ["out", "out/work"])
def test_work_in_the_output_is_refused_before_training(digits: Digits, tmp_path: Path, work: str) -> None:
    with pytest.raises(UsageError, match=r"lies in the output .*; choose another folder"):
        compile(digits.model, digits.images, tmp_path / "out", work=tmp_path / work)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("row", "label"), [(3, 10), (7, -1)])
def test_labels_that_are_no_classes_are_refused(digits: Digits, row: int, label: int) -> None:
    labels = digits.labels.copy()
    labels[row] = label
    with pytest.raises(InputError, match=f"row {row} has the label {label}, the model's classes are 0 to 9"):
        prepare(digits.model, digits.images, labels=labels, options=QUICK)


def test_refused_data(digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the data is a list; give a numpy array"):
        compile(chain(), [1, 2], tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="bring their own labels"):
        compile(digits.model, ArrayRows({"image": digits.images}), tmp_path / "out", labels=digits.labels)
    assert list(tmp_path.iterdir()) == []


def test_the_work_folder_keeps_what_no_training_put_there(digits: Digits, tmp_path: Path) -> None:
    notes = tmp_path / "one.work" / "heads0.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    options = replace(QUICK, batches=(), targets=("onnx-segments",), training=Training(epochs=1))
    compile(digits.model, digits.images, tmp_path / "one", options=options)
    assert [p.name for p in notes.parent.iterdir()] == ["heads0.txt"]
    notes.unlink()
    compile(digits.model, digits.images, tmp_path / "one", options=options)
    assert not notes.parent.exists()


@pytest.mark.parametrize("policy", ["joint", "geometric", "equal", "certified"])
def test_a_tolerance_of_none_is_the_backbone_whatever_the_policy(policy: str) -> None:
    agrees = np.ones((50, 2), bool)  # on these rows nothing speaks against leaving at once
    kept = Records(np.full((50, 2), 0.9, np.float32), agrees)
    costs = Costs(np.array([0.2, 0.3, 0.5]), np.array([0.01, 0.01]))
    options = Options(tolerance=0.0, policy=policy)
    chosen, *_ = choose_exits({"select": kept, "certify": kept}, costs, options)
    assert chosen.chosen == ()
    coarse = replace(kept, final=np.arange(50) == 7, final_regret=np.zeros(50, np.float32))
    with pytest.raises(ToleranceError, match=r"lower precision alone changes 2\.00% of the answers"):
        choose_exits({"select": coarse, "certify": coarse}, costs, options)
