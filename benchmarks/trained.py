"""A task's model with its heads, trained once for all benchmarks and taken up from their checkpoints after that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import log
from benchmarks.tasks import Task
from offramp.compiler import Head, Options, Ready, RowSplits, Training, prepare, train
from offramp.compiler.search import Search

WORK = Path("build") / "benchmarks"
KINDS = ("searched", "default")


def options_of(task: Task, kind: str, epochs: int = Training.epochs, **changes: Any) -> Options:
    """The compiler's, for this task and heads of one kind, trained for `epochs` where the task does not say.

    Those that training depends on, the tolerance among them, must stay as they are where trained heads are to be taken
    up.
    """
    search = replace(Search(engine="tpe"), **task.search) if kind == "searched" else Search()
    told: dict[str, Any] = {"max_candidates": task.max_candidates, "policy": task.policy, **changes}
    return Options(training=replace(Training(epochs=epochs), **task.training), search=search, **told)


def made_ready(task: Task, options: Options) -> Ready:
    """The task's model and rows, its score rows choosing exits."""
    certify, test = np.array_split(task.judged, 2)
    splits = RowSplits(options.seed, task.learn, task.validate, task.score, certify, test)
    return prepare(task.model, task.rows, options=options, splits=splits, name=task.name, say=log)


def heads_of(task: Task, ready: Ready, options: Options, kind: str) -> tuple[Head, ...]:
    """The task's heads of one kind."""
    return train(ready, options, work_of(task.name, kind), log)


def work_of(name: str, kind: str) -> Path:
    """Where a task's training leaves its checkpoints."""
    return WORK / f"heads-{name}-{kind}.work"
