"""Tuning: an artifact's exits and thresholds chosen again for the machine it runs on, from the records it carries.

    measure   every stage at the batch sizes that rows come down to, its head asked and not
    choose    for every set of the artifact's exits the plan of least expected time, on the selection rows; of these
              sets the one whose time is least by the objective
    certify   along the path of that set, on the certification rows
    write     the same stages under other plans

No torch, no new rows: numpy and ONNX Runtime do. Which exits to ask is decided on the selection rows alone, among
exits that the certification rows had a say in when the artifact was made; the certificates pay for that (see `dial`).
"""

from __future__ import annotations

import io
import itertools
import math
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .artifact import Artifact, check_output, open_artifact, write_artifact
from .errors import ArtifactError, InputError, ToleranceError, UsageError
from .inputs import check_batch
from .manifest import Evaluation, ExitEvaluation, Manifest, Plan, Tuned
from .selection import (
    CERTIFIED,
    PREDICTED,
    Costs,
    Records,
    disagreement,
    exits_taken,
    joint,
    plan_without_exits,
    plans_over,
    rows_needed,
    select,
    upper_bound,
)
from .selection.records import Selection
from .stage_times import StageTimes, measure_stages

RECORDS_FILE, RIGHT_FILE = "records.npz", "right.npz"
_EVERY = 6  # exits up to which every set of them is tried; of more, one after the other is left out
# What quotes the thresholds it was compiled with.
_LEFT_OUT = ("model.onnx", "model.onnx.data", "model.ts", "report.html")


@dataclass(frozen=True, eq=False)
class Stored:
    """What `records.npz` holds of an artifact's own exits."""

    recorded: Mapping[str, Records]  # select, certify, test
    right: np.ndarray | None  # [test rows, exits] bool: answers that the labels confirm, the backbone's last
    sets: int  # of exits, that the certification rows decided between
    delta: float  # asked for when it was compiled


@dataclass(frozen=True)
class Objective:
    """What is made small: the time of a batch shared among its rows, or a percentile of the time to a row's answer."""

    batch: int = 1
    percentile: float | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UsageError(f"batch {self.batch}; give 1 row or more")
        if self.percentile is not None and not 0 < self.percentile <= 100:
            raise UsageError(f"percentile {self.percentile}; give a number above 0, up to 100")

    def describe(self) -> str:
        """One phrase."""
        if self.percentile is None:
            return f"mean ms per row at batch {self.batch}"
        return f"ms within which {self.percentile:g} % of rows are answered at batch {self.batch}"

    def of(self, exits: np.ndarray, asked: Sequence[bool], times: StageTimes) -> float:
        """Milliseconds. `exits` [rows] is where each leaves; rows come in batches, in their order."""
        # Whole batches: the first rows again fill up the last.
        batches = np.resize(exits, (-(-len(exits) // self.batch), self.batch))
        stages = len(times.silent)
        taken, until = 0.0, []
        for one in batches:
            reach = np.array([(one >= stage).sum() for stage in range(stages)])
            each = [float(times.call(k, reach[k], k < len(asked) and asked[k])) for k in range(stages)]
            taken += sum(each)
            until.append(np.cumsum(each)[one])
        if self.percentile is None:
            return taken / batches.size
        return float(np.percentile(np.concatenate(until), self.percentile))


def tune(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, objective: Objective | None = None,
    threads: int | None = None, tolerance: float | None = None, rows: Mapping[str, np.ndarray] | None = None,
    machine: str = "", say: Callable[[str], None] = lambda line: None,
) -> Manifest:  # fmt: skip
    """Measure the artifact at `path` here and write it to `out` with plans for this machine; returns its manifest.

    `tolerance` is the default one of the new artifact, None the old one's. `rows` are inputs to measure on, which
    matters where a free size is long; fewer than the objective's batch are repeated. `say` receives a line where the
    default plan loses its certificate. Raises `ArtifactError`, `InputError`, `UsageError` or `StorageError`; then `out`
    is as it was.
    """
    objective = objective or Objective()
    check_output(Path(out))  # before minutes of measuring
    artifact = open_artifact(path)
    manifest = artifact.manifest
    if len(manifest.exits) == 1:
        raise UsageError(f"{path}: has no exits to choose among; compile with a larger tolerance")
    stored = read_records(artifact)
    if rows is not None:
        given, count = check_batch(rows, manifest.inputs)
        if not count:
            raise InputError("no rows to measure on; give at least one, or leave rows out")
        rows = {name: values[np.arange(objective.batch) % count] for name, values in given.items()}
    times = measure_stages(artifact, objective.batch, threads, rows=rows)
    plans = retuned(manifest, stored, times, objective, tolerance)
    default = next(i for i, p in enumerate(plans) if p.tolerance == _wanted(manifest, tolerance))
    before, after = manifest.plans[manifest.default_plan], plans[default]
    if before.certificate is not None and after.certificate is None:
        say(_lost(after, stored))
    kept = stored.recorded["select"]
    tuned = Tuned(
        machine=machine,
        threads=threads,
        objective=objective.describe(),
        backbone_ms=objective.of(np.full(kept.rows, len(times.silent) - 1), (), times),
        before_ms=expected_ms(before, kept, objective, times),
        after_ms=expected_ms(after, kept, objective, times),
        silent_ms=_rows_of(times.silent),
        asked_ms=_rows_of(times.asked),
        batches=times.sizes,
    )
    files = {name: artifact.read(name) for name in manifest.all_files() if name not in _LEFT_OUT}
    measured = manifest.measured
    labelled = {name: spec for name, spec in measured.files.items() if name in files}
    made = replace(
        manifest, plans=plans, default_plan=default, evaluation=evaluated(manifest, after, stored),
        files={name: spec for name, spec in manifest.files.items() if name in files},
        measured=replace(
            measured, timings=(), files=labelled, tuned=tuned, worth_dropping=times.worth_dropping()
        ),
    )  # fmt: skip
    write_artifact(out, made, files)
    return made


def _lost(plan: Plan, stored: Stored) -> str:
    held, needed = stored.recorded["certify"].rows, rows_needed(plan.tolerance, stored.delta / stored.sets)
    if held >= needed:
        return f"the plan for {plan.tolerance:g} asks no exit now and needs no certificate"
    return (
        f"the plan for {plan.tolerance:g} is not certified any more: where {stored.sets} sets of exits were decided "
        f"between, {needed} certification rows are needed and the artifact has {held}; it keeps to the tolerance on "
        "the rows it was chosen on. Compile with more data for a certificate"
    )


def retuned(
    manifest: Manifest, stored: Stored, times: StageTimes, objective: Objective, tolerance: float | None = None
) -> tuple[Plan, ...]:
    """Plans by rising tolerance over the exits worth asking at `tolerance`, times in place of FLOPs."""
    wanted = _wanted(manifest, tolerance)
    old = manifest.plans[manifest.default_plan]
    policy = CERTIFIED if old.policy == PREDICTED else old.policy
    delta = stored.delta
    costs = stage_costs(times, objective.batch)
    kept = stored.recorded["select"]

    def price(some: tuple[int, ...]) -> float:
        if not some:
            return objective.of(np.full(kept.rows, len(times.silent) - 1), (), times)
        found = _hoped(kept.among(some), costs.among(some), wanted, policy)
        thresholds = dict(zip((some[i] for i in found.chosen), found.thresholds, strict=True))
        return expected_ms(_plan(wanted, policy, thresholds, kept.candidates), kept, objective, times)

    some = best_set(kept.candidates, price)
    tolerances = sorted({wanted, *(plan.tolerance for plan in manifest.plans)})
    if not some:
        return _none_asked(stored, costs, tolerances, policy, delta, wanted)
    recorded = {part: said.among(some) for part, said in stored.recorded.items()}
    plans = plans_over(recorded, costs.among(some), tolerances, policy, delta, stored.sets, wanted)
    return tuple(replace(p, thresholds=_spread(p.thresholds, some, kept.candidates)) for p in plans)


def _none_asked(
    stored: Stored, costs: Costs, tolerances: Sequence[float], policy: str, delta: float, wanted: float
) -> tuple[Plan, ...]:
    """Plans under which no exit answers, for the tolerances that the stages' precision alone keeps to."""
    plans, exits, level = [], len(costs.head), delta / stored.sets
    for tolerance in tolerances:
        try:
            plans.append(plan_without_exits(stored.recorded, costs, tolerance, policy, level, exits))
        except ToleranceError:
            if tolerance == wanted:
                raise
    return tuple(plans)


def best_set(exits: int, price: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """The set of exits of the least price; of equals, the one with fewer."""
    everyone = tuple(range(exits))
    if exits <= _EVERY:
        sets = (s for size in range(exits + 1) for s in itertools.combinations(everyone, size))
        return min(sets, key=price)
    best, least = everyone, price(everyone)
    while best:
        prices = {fewer: price(fewer) for fewer in (tuple(e for e in best if e != out) for out in best)}
        fewer = min(prices, key=prices.__getitem__)
        if prices[fewer] > least:
            return best
        best, least = fewer, prices[fewer]
    return best


def stage_costs(times: StageTimes, batch: int) -> Costs:
    """Milliseconds per row of a full batch: what selection adds up."""
    column = times.sizes.index(batch)
    silent, asked = times.silent[:, column] / batch, times.asked[:, column] / batch
    return Costs(silent.astype(np.float64), (asked - silent)[:-1].astype(np.float64))


def expected_ms(plan: Plan, kept: Records, objective: Objective, times: StageTimes) -> float:
    """The objective of a plan on recorded rows."""
    limits = plan.limits
    exits = exits_taken(kept, range(kept.candidates), limits)
    return objective.of(exits, [limit < math.inf for limit in limits], times)


def read_records(artifact: Artifact) -> Stored:
    """The artifact's records, of its own exits. Raises `ArtifactError` when they are not there."""
    manifest = artifact.manifest
    where = f"{artifact.path}/{RECORDS_FILE}"
    if RECORDS_FILE not in manifest.files:
        raise ArtifactError(f"{where}: is not there, and nothing can be chosen without it; compile the model again")
    try:
        arrays = _arrays(artifact, RECORDS_FILE)
        names = [str(name) for name in arrays["candidates"]]
        own = [names.index(spec.cut) for spec in manifest.exits[:-1]]
        recorded = {part: _records(arrays, part, manifest.risk).among(own) for part in ("select", "certify", "test")}
        labelled = RIGHT_FILE in manifest.measured.files
        right = _arrays(artifact, RIGHT_FILE)["right"][:, [*own, -1]] if labelled else None
        return Stored(recorded, right, int(arrays["sets"]), float(arrays.get("delta", 0.05)))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{where}: does not hold what it should ({error}); compile the model again") from error


def _arrays(artifact: Artifact, name: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(artifact.read(name)), allow_pickle=False) as file:
        return dict(file)


def evaluated(manifest: Manifest, plan: Plan, stored: Stored) -> Evaluation:
    """What the plan does on the test rows, by their records."""
    test, right = stored.recorded["test"], stored.right
    last = test.candidates
    limits = plan.limits
    taken = exits_taken(test, range(last), limits)
    end = np.zeros(test.rows, np.bool_) if test.final is None else test.final
    agrees = np.column_stack([test.agrees, ~end])
    at = np.arange(test.rows)
    exits = []
    for index, before in enumerate(manifest.evaluation.exits):
        left = taken == index
        some = bool(left.any())
        exits.append(
            ExitEvaluation(
                exit_rate=float(left.mean()),
                agreement=float(agrees[left, index].mean()) if some else None,
                agreement_all=before.agreement_all,
                accuracy=float(right[left, index].mean()) if some and right is not None else None,
            )
        )
    wrong = round(disagreement(test, range(last), limits) * test.rows)
    low, high = upper_bound(test.rows - wrong, test.rows, 0.025), upper_bound(wrong, test.rows, 0.025)
    none = np.zeros(test.rows) if test.final_regret is None else test.final_regret
    lost = np.column_stack([test.regret, none]) if test.regret is not None else np.zeros((test.rows, last + 1))
    asked = [limit < math.inf for limit in limits] + [False]
    reach = np.cumsum([spec.segment_flops for spec in manifest.exits])
    heads = np.cumsum([spec.head_flops * ask for spec, ask in zip(manifest.exits, asked, strict=True)])
    return replace(
        manifest.evaluation,
        exits=tuple(exits),
        disagreement=wrong / test.rows,
        disagreement_interval=(1 - low, high),
        regret=float(lost[at, taken].mean()),
        accuracy=None if right is None else float(right[at, taken].mean()),
        flops=float((reach + heads)[taken].mean()),
    )


def _records(arrays: Mapping[str, np.ndarray], part: str, risk: str) -> Records:
    names = ("chance", "regret", "final", "final_regret")
    chance, regret, final, lost = (arrays.get(f"{part}_{name}") for name in names)
    return Records(
        arrays[f"{part}_confidence"], arrays[f"{part}_agrees"], chance, regret, risk, final=final, final_regret=lost
    )


def _hoped(kept: Records, costs: Costs, tolerance: float, policy: str) -> Selection:
    """The plan a set of exits would get, but for certificates: those read rows that must not decide the set."""
    if policy == CERTIFIED:
        return joint(replace(kept, predicted=True), costs, tolerance)
    return select(policy, kept, costs, tolerance)


def _wanted(manifest: Manifest, tolerance: float | None) -> float:
    if tolerance is None:
        return manifest.plans[manifest.default_plan].tolerance
    if not 0 < tolerance <= 1:
        raise UsageError(f"tolerance {tolerance} is not a share of rows; give a number above 0, up to 1")
    return float(tolerance)


def _plan(tolerance: float, policy: str, thresholds: Mapping[int, float], exits: int) -> Plan:
    return Plan(tolerance, policy, tuple(thresholds.get(i) for i in range(exits)), None)


def _spread(thresholds: Sequence[float | None], some: Sequence[int], exits: int) -> tuple[float | None, ...]:
    """Thresholds of some exits -> of all; the others never answer."""
    given = dict(zip(some, thresholds, strict=True))
    return tuple(given.get(index) for index in range(exits))


def _rows_of(table: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(ms) for ms in row) for row in table)
