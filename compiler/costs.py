"""What exits cost and save, per row: FLOPs, or milliseconds on this machine.

FLOPs are the same everywhere. Milliseconds tell what FLOPs do not: a small head is a dozen calls that take their time
however few rows there are, and every exit parts the backbone into two models where there was one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

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
_ALONE = "without exits"
Emission = tuple[Sequence[StageSpec], Mapping[str, bytes]]  # what `emit` gives
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
    rows: Mapping[str, np.ndarray],
    threads: int | None,
) -> Costs:
    """Milliseconds per row, in batches as large as `rows`, by timing the program with an exit at every candidate.

    The backbone is timed in the same rounds, as an artifact without exits would have it: what its stages gain by the
    way they are written is no exit's merit.
    """
    alone = emit(without_exits(backbone), (SEGMENTS,))
    return timed_costs(emit(every_exit(backbone, heads, temperatures), (SEGMENTS,)), alone, rows, threads)


def without_exits(backbone: Backbone, metric: str = METRICS[0]) -> ExitProgram:
    """The program of one stage."""
    return build_program(backbone, ExitPlan((), metric), {})


def every_exit(
    backbone: Backbone, heads: Sequence[Head], temperatures: Sequence[float], metric: str = METRICS[0]
) -> ExitProgram:
    """The program with an exit at every candidate."""
    exits = tuple(PlannedExit(h.candidate.name, t, _ASKED) for h, t in zip(heads, temperatures, strict=True))
    return build_program(backbone, ExitPlan(exits, metric), {h.candidate.name: h.module for h in heads})


def timed_costs(every: Emission, alone: Emission, rows: Mapping[str, np.ndarray], threads: int | None) -> Costs:
    """Milliseconds per row, in batches as large as `rows`, of `every_exit` and `without_exits`, emitted."""
    stages, files = every
    (single,), own = alone
    # A stage before the first, which passes all inputs on.
    whole = replace(single, file=_ALONE, outputs=(), carries=tuple(rows))

    def model(name: str) -> ModelBytes:
        return model_bytes(own, single.file) if name == _ALONE else model_bytes(files, name)

    size = len(next(iter(rows.values())))
    cores = threads or usable_cores()
    return shared_out(time_stages((whole, *stages), model, (size,), cores, ROUNDS, rows))


def shared_out(times: StageTimes) -> Costs:
    """Times of the model without exits, then of every stage, at one size -> costs per row.

    Stages together take longer than that model: each is a call of its own, and values change their memory layout
    in between. That is the exits' doing, and each pays an equal part of it, beside its head; what is left is the
    model's time, shared among the stages as they take it.
    """
    (size,) = times.sizes
    plain, silent, asked = times.silent[0, 0], times.silent[1:, 0], times.asked[1:, 0]
    parting = max(0.0, float(silent.sum() - plain)) / max(1, len(silent) - 1)
    segment = silent * (plain / silent.sum())
    return Costs(segment / size, ((asked - silent)[:-1] + parting) / size)
