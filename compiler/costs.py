"""What exits cost and save, per row: FLOPs, or milliseconds on this machine.

FLOPs are the same everywhere. Milliseconds tell what FLOPs do not: a small head is a dozen calls that take their time
however few rows there are, and every exit parts the backbone into two models where there was one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from offramp.passes import METRICS, Backbone, ExitPlan, ExitProgram, PlannedExit, build_program, row_shape
from offramp.runtime.engine import ModelBytes
from offramp.runtime.manifest import StageSpec
from offramp.runtime.process import usable_cores
from offramp.runtime.selection import Costs
from offramp.runtime.stage_times import ROUNDS, StageTimes, time_stages

from .distill import Head
from .emit import SEGMENTS, emit, model_bytes
from .heads import head_flops

FLOPS, TIME = "flops", "time"
COSTS = (FLOPS, TIME)
_PLAIN = "backbone.onnx"
_ASKED = 0.5  # a threshold; stages are timed one by one, whoever leaves


def costs(backbone: Backbone, heads: Sequence[Head]) -> Costs:
    """FLOPs per row of every segment between candidates, and of every head."""
    depths = [h.candidate.flops_before for h in heads]
    total = heads[0].candidate.flops_before + heads[0].candidate.flops_after
    own = [head_flops(h.config, row_shape(backbone, h.candidate.name), backbone.classes) for h in heads]
    return Costs(np.diff([0.0, *depths, total]), np.array(own, np.float64))


def measured_costs(
    backbone: Backbone,
    heads: Sequence[Head],
    temperatures: Sequence[float],
    plain: ModelBytes,
    rows: Mapping[str, np.ndarray],
    threads: int | None,
) -> Costs:
    """Milliseconds per row, in batches as large as `rows`, by timing the program with an exit at every candidate.

    `plain` is the backbone as one model, timed in the same rounds.
    """
    stages, files = emit(every_exit(backbone, heads, temperatures), (SEGMENTS,))
    return timed_costs(stages, files, plain, rows, threads)


def every_exit(
    backbone: Backbone, heads: Sequence[Head], temperatures: Sequence[float], metric: str = METRICS[0]
) -> ExitProgram:
    """The program with an exit at every candidate."""
    exits = tuple(PlannedExit(h.candidate.name, t, _ASKED) for h, t in zip(heads, temperatures, strict=True))
    return build_program(backbone, ExitPlan(exits, metric), {h.candidate.name: h.module for h in heads})


def timed_costs(
    stages: Sequence[StageSpec],
    files: Mapping[str, bytes],
    plain: ModelBytes,
    rows: Mapping[str, np.ndarray],
    threads: int | None,
) -> Costs:
    """Milliseconds per row, in batches as large as `rows`, of the stages of `every_exit`, emitted."""
    names = tuple(rows)
    whole = StageSpec(_PLAIN, names, (), names)  # a stage before the first, which passes all inputs on

    def model(name: str) -> ModelBytes:
        return plain if name == _PLAIN else model_bytes(files, name)

    size = len(next(iter(rows.values())))
    cores = threads or usable_cores()
    return shared_out(time_stages((whole, *stages), model, (size,), cores, ROUNDS, rows))


def shared_out(times: StageTimes) -> Costs:
    """Times of the plain model, then of every stage, at one size -> costs per row.

    Stages together take longer than the plain model: each is a call of its own, and values change their memory layout
    in between. That is the exits' doing, and each pays an equal part of it, beside its head; what is left is the plain
    model's time, shared among the stages as they take it.
    """
    (size,) = times.sizes
    plain, silent, asked = times.silent[0, 0], times.silent[1:, 0], times.asked[1:, 0]
    parting = max(0.0, float(silent.sum() - plain)) / max(1, len(silent) - 1)
    segment = silent * (plain / silent.sum())
    return Costs(segment / size, ((asked - silent)[:-1] + parting) / size)
