"""Jobs: what tells one training from another, so that no checkpoint is taken up by a job it is not of."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from models import Chain, captured

from offramp.compiler import AUGMENTATIONS, Training
from offramp.compiler.augment import Augment, Batch, identity_of
from offramp.compiler.checkpoint import alone_in
from offramp.compiler.distill import job_fingerprint
from offramp.compiler.learner import Learner
from offramp.compiler.stream import Stream, largest_batch
from offramp.passes import Backbone
from offramp.runtime.data import ArrayRows
from offramp.runtime.errors import StorageError, UsageError


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return captured(Chain)


@pytest.fixture(scope="module")
def data() -> ArrayRows:
    return ArrayRows({"x": np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)})


def test_augmentations_are_told_apart_by_what_they_do() -> None:
    def scaled(batch: Batch, generator: torch.Generator, by: float = 1.0) -> Batch:
        return {name: by * x for name, x in batch.items()}

    def shifted(batch: Batch, generator: torch.Generator, by: float = 1.0) -> Batch:
        return {name: by + x for name, x in batch.items()}

    def made(by: float, more: float = 1.0) -> Augment:
        def closes(batch: Batch, generator: torch.Generator, *, then: float = more) -> Batch:
            return {name: by * x + then for name, x in batch.items()}

        return closes

    def closing_over(inner: Augment) -> Augment:
        def closes(batch: Batch, generator: torch.Generator) -> Batch:
            return inner(batch, generator)

        return closes

    shifted.__qualname__ = scaled.__qualname__
    some = [scaled, shifted, partial(scaled, by=0.1), partial(scaled, by=0.9), made(0.1), made(0.9), made(0.9, 2.0)]
    assert len({identity_of(one) for one in some}) == 7
    assert identity_of(partial(scaled, by=0.1)) == identity_of(some[2])
    assert identity_of(made(0.9)) == identity_of(some[5])
    assert not re.search("0x[0-9a-f]", identity_of(closing_over(scaled)))  # where it lies in this process
    assert identity_of(closing_over(scaled)) != identity_of(closing_over(shifted))
    scaled.__defaults__ = (2.0,)
    assert identity_of(scaled) not in {identity_of(one) for one in some[1:]}


def test_row_sets_that_end_elsewhere_are_of_another_job(backbone: Backbone, data: ArrayRows) -> None:
    stream = Stream(backbone, [], data, 32, AUGMENTATIONS["none"], 0)
    jobs = {job_fingerprint(stream, np.arange(end), np.arange(end, 100)) for end in (90, 91)}
    assert len(jobs) == 2


@pytest.mark.parametrize("rows", [1, 33, 100, 191, 192, 500])
def test_no_batch_is_larger_than_is_said(backbone: Backbone, data: ArrayRows, rows: int) -> None:
    stream = Stream(backbone, [], data, 128, AUGMENTATIONS["none"], 0)
    said = largest_batch(np.arange(rows), 128)
    assert said <= 191
    assert max(map(len, stream.shuffled(np.arange(rows), 0)), default=1) == said


def test_two_do_not_train_in_one_folder(tmp_path: Path) -> None:
    says = "work: another compile trains there; wait for it or give another --work"
    with alone_in(tmp_path / "work"), pytest.raises(UsageError, match=says), alone_in(tmp_path / "work"):
        pass
    with alone_in(tmp_path / "work"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_place_for_the_lock_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(StorageError, match=r"cannot be written to .*; choose another folder"), alone_in(tmp_path):
        pass


def test_heads_of_another_kind_of_scores_are_of_another_job(backbone: Backbone, data: ArrayRows) -> None:
    kinds = [replace(backbone, scores=kind) for kind in ("logits", "probabilities", "log-probabilities")]
    jobs = {job_fingerprint(Stream(kind, [], data, 32, AUGMENTATIONS["none"], 0), np.arange(9)) for kind in kinds}
    assert len(jobs) == 3


def test_a_checkpoint_of_heads_built_otherwise_is_refused_in_one_line() -> None:
    state = Learner(torch.nn.Linear(4, 3), 1, 1e-3, Training()).state()
    with pytest.raises(UsageError, match="heads that are built otherwise today; remove its folder"):
        Learner(torch.nn.Linear(5, 3), 1, 1e-3, Training()).restore(state)
