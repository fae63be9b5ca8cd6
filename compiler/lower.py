"""Lower precision: trained heads -> exits of stages in fp16 or int8, everything about them decided by these stages.

    emit       an exit at every candidate, converted
    record     what these stages answer, against the model as it came
    calibrate  temperatures, by what they answer
    select     which exits, on the selection rows alone
    emit       these exits, converted over the same rows
    record     again, for other exits mean other stages
    select     thresholds, on the selection rows
    certify    on the certification rows, which had no say in which exits there are

The model's class is that of the float32 backbone as it came. A last stage of lower precision may answer otherwise, so
rows that reach the end count too (`Records.final`), and a plan without exits makes a promise that wants evidence.

Refused: stages that do not give the model's answers before they are converted (ModelError); a tolerance that the
precision alone breaks (ToleranceError).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from offramp.passes import ExitProgram, build_program, observed
from offramp.runtime.manifest import Plan, StageSpec
from offramp.runtime.selection import (
    CERTIFIED,
    Costs,
    Records,
    Selection,
    exits_taken,
    expected_cost,
    joint,
    plan_without_exits,
    plans_over,
    realised_risk,
    select,
)

from .capture import bind
from .choose import exit_plan, observers, records
from .costs import TIME, costs, every_exit, timed_costs, without_exits
from .distill import Head
from .emit import SEGMENTS, emit, model_bytes, stage_models
from .emitted import Answered, Stages
from .equivalence import Equivalence, require
from .evaluate import Outcome
from .package import Job, Options, Ready
from .precision import converted
from .progress import Say
from .record import Recording, calibrate, record
from .stream import tensors

_CHECKED_ROWS = 256
_LEAST = float(np.finfo(np.float32).tiny)  # a probability that float32 took for zero
_SPLITS = ("select", "certify", "test")


@dataclass(frozen=True, eq=False)
class Emitted:
    """A program's stages, converted, as they will be served."""

    program: ExitProgram
    models: Sequence[onnx.ModelProto]
    specs: Sequence[StageSpec]
    files: Mapping[str, bytes]

    def stages(self) -> Stages:
        """Ready to run."""
        return Stages(self.specs, [model_bytes(self.files, spec.file) for spec in self.specs])


def lowered(ready: Ready, heads: Sequence[Head], options: Options, say: Say) -> tuple[ExitProgram, Job]:
    """What `pack` makes an artifact of."""
    backbone, rows, splits = ready.backbone, ready.rows, ready.splits
    say(f"converting stages with an exit at each of {len(heads)} candidates to {options.precision}")
    every = _emitted(ready, every_exit(backbone, heads, [1.0] * len(heads), options.metric), options)
    truth = {p: record(backbone, [], rows, getattr(splits, p), p).backbone for p in ("calibrate", *_SPLITS)}
    stages = every.stages()
    said = {p: _recording(stages.answer(rows, getattr(splits, p), p), truth[p]) for p in truth}
    temperatures = calibrate(said["calibrate"])
    recorded = {p: records(said[p], temperatures, options.metric, options.risk) for p in _SPLITS}
    spent = costs(backbone, heads)
    if options.cost == TIME:
        spent = _timed(ready, every, options)
    first = _choose(recorded["select"], spent, options)
    with observed(*observers(ready.trace, options)):
        program = build_program(
            backbone, exit_plan(first, heads, temperatures, options.metric), {h.candidate.name: h.module for h in heads}
        )
    final = _emitted(ready, program, options)
    stages = final.stages()
    for part in _SPLITS:
        answered = stages.answer(rows, getattr(splits, part), part)
        said[part] = _with_exits(said[part], answered, first.chosen, temperatures)
        recorded[part] = _as_emitted(records(said[part], temperatures, options.metric, options.risk), answered, first)
    plans = _plans(recorded, spent, first, options)
    chosen = _default(plans, recorded["select"], spent, first)
    share = float((said["test"].final_classes != said["test"].backbone_classes).mean())
    say(
        f"{len(chosen.chosen)} exits chosen by {options.policy}: {chosen.risk:.2%} {options.risk} on the "
        f"{len(splits.select)} rows their thresholds were chosen on; {options.precision} alone changes {share:.2%} of "
        "the test rows' answers"
    )
    job = Job(
        rows, splits, heads, temperatures, recorded, said["test"], 1, costs(backbone, heads), chosen, plans,
        ready.plain, options, ready.trace, ready.static, final.models, _outcome(said["test"], recorded["test"], chosen),
    )  # fmt: skip
    return program.with_thresholds(chosen.thresholds), job


def _emitted(ready: Ready, program: ExitProgram, options: Options) -> Emitted:
    """Checked as float32 stages, then converted."""
    models = stage_models(program, rewritten=False)
    specs, files = emit(program, (SEGMENTS,), made=models)
    some = ready.splits.test[:_CHECKED_ROWS]
    answered = Stages(specs, [model_bytes(files, s.file) for s in specs]).answer(ready.rows, some, "float32 stages")
    inputs = bind(program.backbone.inputs, tensors(ready.rows, some), program.backbone.name)
    difference = np.abs(program.all_exits(*inputs).numpy() - answered.probabilities).max()
    require(Equivalence(len(some), 0, 0, float(difference)), "the float32 ONNX segments")
    models = converted(program, models, ready.rows, ready.splits.calibrate, options.precision)
    return Emitted(program, models, *emit(program, (SEGMENTS,), made=models))


def _recording(answered: Answered, truth: np.ndarray) -> Recording:
    """Stages of temperature 1 and the model's own probabilities [rows, K] -> what they say.

    The logarithms of probabilities are logits; in float64, for in float32 the two largest could become equal.
    """
    logits = np.log(np.maximum(answered.probabilities[:-1].astype(np.float64), _LEAST))
    return Recording(logits, truth, answered.probabilities[-1])


def _with_exits(
    first: Recording, answered: Answered, chosen: Sequence[int], temperatures: Sequence[float]
) -> Recording:
    """What the emitted exits said in the place of what the first round's said at the same candidates."""
    own, logits = _recording(answered, first.backbone), first.logits.copy()
    for index, one in zip(chosen, own.logits, strict=True):
        logits[index] = one * temperatures[index]
    return replace(own, logits=logits)


def _as_emitted(kept: Records, answered: Answered, chosen: Selection) -> Records:
    """Confidences to the last bit as thresholds will see them; rounding may put one a hair above 1."""
    confidence = kept.confidence.copy()
    confidence[:, list(chosen.chosen)] = np.clip(answered.confidence[:-1].T, 0, 1)
    return replace(kept, confidence=confidence)


def _choose(kept: Records, spent: Costs, options: Options) -> Selection:
    """The exits, by the policy asked for; the certification rows are left to those that will be emitted."""
    if options.policy == CERTIFIED:
        return joint(replace(kept, predicted=True), spent, options.tolerance)
    return select(options.policy, kept, spent, options.tolerance)


def _plans(recorded: Mapping[str, Records], spent: Costs, first: Selection, options: Options) -> tuple[Plan, ...]:
    """Plans by rising tolerance over the exits there are; without any, one."""
    own, policy, delta = options.tolerance, options.policy, options.delta
    if not first.chosen:
        return (plan_without_exits(recorded, spent, own, policy, delta, 0),)
    merged = {part: kept.among(first.chosen) for part, kept in recorded.items()}
    return plans_over(merged, spent.among(first.chosen), sorted({own, *options.dial}), policy, delta, 1, own)


def _default(plans: Sequence[Plan], kept: Records, spent: Costs, first: Selection) -> Selection:
    """The plan of the tolerance asked for, as a selection."""
    plan = next(plan for plan in plans if plan.tolerance == first.tolerance)
    asked = [(c, limit) for c, limit in zip(first.chosen, plan.thresholds, strict=True) if limit is not None]
    return Selection(
        first.chosen,
        plan.limits,
        plan.policy,
        plan.tolerance,
        expected_cost(kept, spent, [c for c, _ in asked], [limit for _, limit in asked]),
        realised_risk(kept, first.chosen, plan.limits),
    )


def _outcome(said: Recording, kept: Records, chosen: Selection) -> Outcome:
    """What the stages make of the test rows under the default plan."""
    exits = exits_taken(kept, chosen.chosen, chosen.thresholds)
    classes = np.vstack([said.classes().T[list(chosen.chosen)], said.final_classes[None]])
    return Outcome(exits, classes[exits, np.arange(len(exits))], classes, said.backbone)


def _timed(ready: Ready, every: Emitted, options: Options) -> Costs:
    """Milliseconds per row, against the backbone in the same precision: what exits part is that."""
    alone = _emitted(ready, without_exits(ready.backbone, options.metric), options)
    some = ready.rows.take(ready.splits.select[np.arange(options.cost_batch) % len(ready.splits.select)])
    return timed_costs((every.specs, every.files), (alone.specs, alone.files), some, options.threads)
