"""Eager run, ONNX segments and single ONNX file on trained CIFAR networks: the same exits, the same answers.

The weights and images are real, and not part of the repository: without `../shared/data` (or `OFFRAMP_DATA`)
these tests say so and skip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.cifar import data_dir, load_images, resnet20, resnet56
from offramp.compiler import (
    Job,
    Options,
    Training,
    as_rows,
    calibrate,
    capture,
    choose_candidates,
    compare,
    costs,
    default_heads,
    distil,
    exit_plan,
    load_weights,
    pack,
    record,
    records,
    select,
    split_rows,
)
from offramp.compiler.equivalence import CLOSE, NEAR
from offramp.passes import ExitProgram, build_program, find_candidates
from offramp.runtime import Session, load, write_artifact
from offramp.runtime.selection import dial

INF = math.inf
BATCHES = [0, 1, 3, 32, 257]
MIXED = "mixed"
PLANS = {"all at once": (-INF,) * 3, "none": (INF,) * 3, "first alone": (-INF, INF, INF),
         "second alone": (INF, -INF, INF), "third alone": (INF, INF, -INF), MIXED: ()}  # fmt: skip
MODELS = {"resnet20": resnet20, "resnet56": resnet56}


@dataclass(frozen=True)
class Forms:
    """One exit program in all its forms, and rows none of it was made from."""

    program: ExitProgram
    sessions: dict[str, Session]
    rows: np.ndarray  # [257, 3, 32, 32]
    mixed: tuple[float, float, float]

    def under(self, plan: str) -> ExitProgram:
        return self.program.with_thresholds(PLANS[plan] or self.mixed)


def make(model: str, folder: Path, metric: str) -> Forms:
    weights = data_dir() / "cifar10" / f"{model}.safetensors"
    if not weights.is_file():
        pytest.skip(f"no trained weights at {weights}; set OFFRAMP_DATA to a folder that has them")
    images, _ = load_images()
    backbone_model = MODELS[model]()
    load_weights(backbone_model, weights)
    data, rows = as_rows({"x": images[:400]}), np.ascontiguousarray(images[-257:])
    backbone = capture(backbone_model, {"x": torch.from_numpy(images[:8])}, name=model)
    candidates = choose_candidates(backbone, find_candidates(backbone), 3)
    splits = split_rows(400, 0)
    options = Options(training=Training(epochs=2, batch=32), batches=(), metric=metric)
    heads = distil(
        backbone, candidates, default_heads(backbone, candidates), data,
        learn=splits.distil, validate=splits.calibrate, training=options.training, seed=0,
    )  # fmt: skip
    temperatures = calibrate(record(backbone, heads, data, splits.calibrate, "calibrate"))
    said = {p: record(backbone, heads, data, getattr(splits, p), p) for p in ("select", "certify", "test")}
    recorded = {part: records(one, temperatures, metric) for part, one in said.items()}
    first, second, third = (float(np.quantile(c, 0.7)) for c in recorded["select"].confidence.T)
    mixed = (first, second, third)
    selection = select("joint", recorded["select"], costs(backbone, heads), 0.01)
    selection = replace(selection, chosen=(0, 1, 2), thresholds=mixed)
    plan = exit_plan(selection, heads, temperatures, metric)
    program = build_program(backbone, plan, {h.candidate.name: h.module for h in heads})
    price = costs(backbone, heads)
    plans = dial(selection, None, recorded, price, (), "joint", options.delta, 1)
    job = Job(data, splits, heads, temperatures, recorded, said["test"], 1, price, selection, plans, None, options)
    manifest, files = pack(program, job)
    write_artifact(folder / "artifact", manifest, files)
    sessions = {form: load(folder / "artifact", executor=form) for form in ("segments", "single-file")}  # type: ignore[arg-type]
    return Forms(program, sessions, rows, mixed)


@pytest.fixture(scope="module")
def cifar20(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return make("resnet20", tmp_path_factory.mktemp("resnet20"), "margin")


@pytest.fixture(scope="module")
def cifar56(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return make("resnet56", tmp_path_factory.mktemp("resnet56"), "entropy")


def input_name(forms: Forms) -> str:
    return forms.program.backbone.inputs[0].name


def assert_equivalent(forms: Forms, form: str, plan: str, batch: int) -> None:
    found = compare(forms.under(plan), forms.sessions[form], {input_name(forms): forms.rows[:batch]})
    assert found.rows == batch
    assert found.other_exit == 0
    assert found.difference <= CLOSE
    assert found.near <= 0.02 * batch + 1, "an allowance, not an excuse"
    assert found.holds


@pytest.mark.parametrize("form", ["segments", "single-file"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("batch", BATCHES)
def test_resnet20(cifar20: Forms, form: str, plan: str, batch: int) -> None:
    assert_equivalent(cifar20, form, plan, batch)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["segments", "single-file"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("batch", BATCHES)
def test_resnet56(cifar56: Forms, form: str, plan: str, batch: int) -> None:
    assert_equivalent(cifar56, form, plan, batch)


def test_mixed_thresholds_use_every_exit(cifar20: Forms) -> None:
    exits = cifar20.under(MIXED)(torch.from_numpy(cifar20.rows))[1]
    assert set(exits.tolist()) == {0, 1, 2, 3}


def doubtful(forms: Forms, rows: np.ndarray) -> np.ndarray:
    """[B] bool: a confidence within 1e-5 of its threshold, where rounding may decide."""
    every = forms.sessions["segments"].run_all(rows).confidence[:-1]
    limits = np.array(forms.mixed, np.float32)[:, None]
    return np.asarray((np.abs(every - limits) <= NEAR).any(axis=0))


def eager(forms: Forms, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities, exits = forms.under(MIXED)(torch.from_numpy(rows))
    return probabilities.numpy(), exits.numpy()


def answers(forms: Forms, form: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if form == "eager":
        return eager(forms, rows)
    found = forms.sessions[form].run(rows, thresholds=forms.mixed)
    return found.probabilities, found.exits


def together(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([p for p, _ in parts]), np.concatenate([e for _, e in parts])


@pytest.mark.parametrize("form", ["eager", "segments", "single-file"])
def test_a_rows_answer_does_not_depend_on_its_neighbours(cifar20: Forms, form: str) -> None:
    rows = cifar20.rows[:64]
    sure = ~doubtful(cifar20, rows)
    assert sure.sum() >= 60
    probabilities, exits = answers(cifar20, form, rows)
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = answers(cifar20, form, rows[order])
    back = np.argsort(order)
    alone = together([answers(cifar20, form, rows[i : i + 1]) for i in range(len(rows))])
    for other_probabilities, other_exits in ((shuffled[0][back], shuffled[1][back]), alone):
        assert other_exits[sure].tolist() == exits[sure].tolist()
        assert np.abs(other_probabilities - probabilities)[sure].max() <= CLOSE
