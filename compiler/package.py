"""Packing: an exit program and what is known of it become a manifest and the artifact's files.

The emitted forms are checked against the eager run and measured before anything is written.
"""

from __future__ import annotations

import datetime
import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from offramp.passes import METRICS, Backbone, Candidate, ExitProgram, Limits, Trace
from offramp.runtime.artifact import Artifact, file_spec, open_artifact, write_artifact
from offramp.runtime.data import Rows
from offramp.runtime.engine import ModelBytes
from offramp.runtime.errors import UsageError
from offramp.runtime.manifest import (
    FORMAT_VERSION,
    BackboneSpec,
    Evaluation,
    ExitSpec,
    Manifest,
    Measured,
    Plan,
    Splits,
    TensorSpec,
    Timing,
)
from offramp.runtime.process import usable_cores
from offramp.runtime.selection import CERTIFIED, DISAGREEMENT, POLICIES, RISKS, TOLERANCES, Costs, Records, Selection
from offramp.runtime.session import load
from offramp.runtime.stage_times import measure_stages
from offramp.runtime.trace import PASSES_FILE, dump_passes
from offramp.runtime.tune import RECORDS_FILE, RIGHT_FILE

from . import measure
from .costs import COSTS, FLOPS, TIME
from .distill import Head
from .emit import SCRIPT, SEGMENTS, TARGETS, any_onnx, check_targets, emit
from .emit.metadata import known_before
from .emit.torchscript import ScriptSession
from .equivalence import compare, require
from .evaluate import Outcome, evaluate, head_costs, run_program
from .evidence import Evidence
from .precision import FP32, PRECISIONS
from .record import Recording
from .report import render_report
from .search import Search
from .signature import Signature
from .splits import RowSplits
from .static import evaluate_static
from .training import Training

ALL_POLICIES = (CERTIFIED, *POLICIES)
_CHECKED_ROWS = 256
_FEW = 5  # rounds: an order of magnitude is enough


@dataclass(frozen=True)
class Options:
    """Everything `compile` may be told; the defaults are what most people want."""

    tolerance: float = 0.01  # share of rows whose early answer may differ from the backbone's
    policy: str = CERTIFIED
    risk: str = DISAGREEMENT  # that `tolerance` bounds
    metric: str = METRICS[0]  # of confidence
    dial: tuple[float, ...] = TOLERANCES  # that a deployment may turn to, beside `tolerance`
    delta: float = 0.05  # how often the certificate may be wrong
    seed: int = 0
    targets: tuple[str, ...] | None = None  # None: stages, and at fp32 the single file too
    precision: str = FP32  # of the emitted stages
    training: Training = field(default_factory=Training)
    search: Search = field(default_factory=Search)  # for heads; none unless asked for
    limits: Limits = field(default_factory=Limits)
    memory_budget: int | None = None  # bytes that training may take beside the model and the data; None: no bound
    max_candidates: int = 12  # more are thinned out evenly along the backbone's compute
    threads: int | None = None  # to measure with; None: the cores this process may use
    cost: str = FLOPS  # what exits are chosen to save; "time": milliseconds on this machine, by the clock
    cost_batch: int = 1  # rows at a time that the time is of
    rounds: int = measure.ROUNDS
    batches: tuple[int, ...] = measure.BATCHES  # to measure at; empty: measure nothing
    verify: bool = False  # hold the graph to the verifier's rules after every pass
    signature: Signature = field(default_factory=Signature)  # what is said of the model's inputs and outputs
    preprocessing: str | None = None  # how a folder of images became rows; recorded, so that `run` repeats it

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and 0 <= self.tolerance <= 1):
            raise UsageError(f"tolerance {self.tolerance} is not a share of rows; give a number from 0 to 1")
        if wrong := [t for t in self.dial if not (math.isfinite(t) and 0 < t <= 1)]:
            raise UsageError(f"tolerance {wrong[0]} of the dial is not a share of rows; give numbers above 0, up to 1")
        if self.policy not in ALL_POLICIES:
            raise UsageError(f"policy {self.policy!r} does not exist; choose one of {', '.join(ALL_POLICIES)}")
        if self.risk not in RISKS:
            raise UsageError(f"risk {self.risk!r} does not exist; choose one of {', '.join(RISKS)}")
        if self.metric not in METRICS:
            raise UsageError(f"confidence metric {self.metric!r} does not exist; choose one of {', '.join(METRICS)}")
        if not 0 < self.delta < 1:
            raise UsageError(f"delta {self.delta} is not a probability; give a number between 0 and 1, such as 0.05")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed} is negative or beyond 63 bits; give 0 or more")
        if self.memory_budget is not None and self.memory_budget < 1:
            raise UsageError(f"a memory budget of {self.memory_budget} bytes holds nothing; give more, or none")
        if self.cost not in COSTS:
            raise UsageError(f"cost {self.cost!r} does not exist; choose one of {', '.join(COSTS)}")
        if self.cost_batch < 1:
            raise UsageError(f"the time of {self.cost_batch} rows is asked for; give 1 or more")
        if self.cost == TIME and not any_onnx(self.forms):
            raise UsageError("time is measured in ONNX Runtime; add target onnx-segments, or choose exits by flops")
        if self.rounds < 1:
            raise UsageError(f"{self.rounds} rounds measure nothing; give 1 or more, or no batches to measure at")
        if wrong := [size for size in self.batches if size < 1]:
            raise UsageError(f"batches of {wrong[0]} rows cannot be measured; give 1 or more")
        if self.max_candidates < 1:
            raise UsageError(f"at most {self.max_candidates} candidates leaves none; give 1 or more")
        check_targets(self.forms)
        self._check_precision()

    def _check_precision(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r} does not exist; choose one of {', '.join(PRECISIONS)}")
        if self.precision == FP32:
            return
        if wrong := [form for form in self.forms if form != SEGMENTS]:
            raise UsageError(
                f"{wrong[0]} is emitted at {FP32} only; for {self.precision} leave --target {wrong[0]} out and ask for "
                f"{SEGMENTS} alone, or leave --precision out"
            )
        if self.tolerance == 0:
            raise UsageError(
                f"tolerance 0 allows no answer to change, and {self.precision} changes some; raise the tolerance, or "
                "leave --precision out"
            )

    @property
    def forms(self) -> tuple[str, ...]:
        """The targets asked for, or else those that the precision has."""
        if self.targets is not None:
            return self.targets
        return TARGETS if self.precision == FP32 else (SEGMENTS,)


@dataclass(frozen=True, eq=False)
class Ready:
    """A model and its rows, with the places where exits may go: all that training needs."""

    backbone: Backbone
    candidates: tuple[Candidate, ...]
    rows: Rows
    splits: RowSplits
    plain: ModelBytes | None  # the backbone alone as ONNX
    trace: Trace  # the graph after every pass
    static: Backbone | None = None  # a smaller model to compare with


@dataclass(frozen=True, eq=False)
class Job:
    """What one compile knows when the exits are chosen."""

    rows: Rows
    splits: RowSplits
    heads: Sequence[Head]  # of every candidate, chosen or not
    temperatures: Sequence[float]  # one per head
    recorded: Mapping[str, Records]  # splits select, certify, test
    test: Recording  # what the heads and the backbone said of the test rows
    sets: int  # of exits, that the certification rows decided between
    costs: Costs  # FLOPs
    selection: Selection
    plans: Sequence[Plan]  # by rising tolerance, the selection's among them
    plain: ModelBytes | None  # the backbone alone as ONNX, to measure against; None: measure nothing
    options: Options
    trace: Trace = field(default_factory=Trace)  # the graph after every pass
    static: Backbone | None = None  # a smaller model to compare with
    models: Sequence[onnx.ModelProto] | None = None  # the stages', converted to another precision; None: to be made
    outcome: Outcome | None = None  # of these stages on the test rows; None: the eager run tells

    @property
    def labels(self) -> np.ndarray | None:
        """[test rows] int64, if the data has them."""
        return None if self.rows.labels is None else self.rows.labels[self.splits.test]


def pack(program: ExitProgram, job: Job) -> tuple[Manifest, dict[str, bytes]]:
    """Emit, check, measure, report -> manifest and files.

    Raises `ModelError` when an operator has no ONNX form or an emitted form answers otherwise than the eager run.
    """
    known = _describe(program, job)
    stages, files = emit(program, job.options.forms, manifest=known_before(known), made=job.models)
    files[RECORDS_FILE] = _records_file(job)
    if job.trace.records:
        files[PASSES_FILE] = dump_passes(job.trace.records)
    draft = replace(known, stages=stages, files={name: file_spec(data) for name, data in files.items()})
    with tempfile.TemporaryDirectory(prefix="offramp-") as folder:
        write_artifact(Path(folder) / "draft", draft, files)
        artifact = open_artifact(Path(folder) / "draft")
        if job.models is None:  # converted ones answer otherwise by design, and are judged by what they answered
            _check(program, artifact, job)
        worth = _worth_dropping(artifact, job)
        measured = replace(draft.measured, worth_dropping=worth)
        measurements = _timings(replace(artifact, manifest=replace(draft, measured=measured)), job)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    timings = tuple(timing for timing, _ in measurements)
    measured = Measured(now, measure.machine(), measure.versions(), timings, {}, None, worth, _chosen_by(job.options))
    manifest = replace(draft, measured=measured)
    quoting = {
        "report.html": render_report(_evidence(manifest, job, [dial for _, dial in measurements])),
        **_labelled_files(job),
    }
    measured = replace(measured, files={name: file_spec(data) for name, data in quoting.items()})
    return replace(manifest, measured=measured), {**files, **quoting}


def input_specs(backbone: Backbone) -> tuple[TensorSpec, ...]:
    """The backbone's inputs as the manifest writes them."""
    return tuple(
        TensorSpec(i.name, str(i.dtype).removeprefix("torch."), i.shape, dict(i.ranges)) for i in backbone.inputs
    )


def _records_file(job: Job) -> bytes:
    """`records.npz`: confidence and agreement of every candidate on every recorded split."""
    arrays: dict[str, np.ndarray] = {
        "candidates": np.array([h.candidate.name for h in job.heads]),
        "temperatures": np.array(job.temperatures, np.float32),
        "segment_flops": job.costs.segment,
        "head_flops": job.costs.head,
    }
    arrays["sets"] = np.array(job.sets)
    arrays["delta"] = np.array(job.options.delta)
    for part, kept in job.recorded.items():
        arrays |= {f"{part}_{name}": values for name, values in kept.arrays().items()}
    return _npz(arrays)


def _labelled_files(job: Job) -> dict[str, bytes]:
    """`right.npz`, if there are labels: which test rows each candidate, and last the backbone, answers as they do."""
    if job.labels is None:
        return {}
    classes = np.column_stack([job.test.classes(), job.test.final_classes])
    return {RIGHT_FILE: _npz({"right": classes == job.labels[:, None]})}


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stub takes a flag among the names
    return buffer.getvalue()


def _describe(program: ExitProgram, job: Job) -> Manifest:
    """The manifest, but for what is emitted and measured."""
    backbone, selection, splits = program.backbone, job.selection, job.splits
    flops = round(sum(s.flops for s in program.segments))
    parts = {part: len(getattr(splits, part)) for part in ("distil", "calibrate", "select", "certify", "test")}
    return Manifest(
        format_version=FORMAT_VERSION,
        backbone=BackboneSpec(backbone.name, backbone.fingerprint(), backbone.parameters(), flops, backbone.scores),
        inputs=input_specs(backbone),
        classes=backbone.classes,
        confidence=program.plan.metric,
        risk=job.options.risk,
        stages=(),
        exits=_exit_specs(program, [job.heads[index] for index in selection.chosen]),
        plans=tuple(job.plans),
        default_plan=[plan.tolerance for plan in job.plans].index(selection.tolerance),
        splits=Splits(splits.seed, **parts),
        preprocessing=job.options.preprocessing,
        evaluation=_evaluated(program, job),
        files={},
        measured=Measured("", "", {}, (), {}),
        precision=job.options.precision,
    )


def _evaluated(program: ExitProgram, job: Job) -> Evaluation:
    """The program on the test rows, and the static model if there is one."""
    rows, labels = job.splits.test, job.labels
    outcome = run_program(program, job.rows, rows) if job.outcome is None else job.outcome
    seen = evaluate(program, outcome, labels)
    if job.static is None:
        return seen
    return replace(seen, static=evaluate_static(job.static, job.rows, rows, job.test.backbone, labels))


def _evidence(manifest: Manifest, job: Job, ratios: Sequence[Sequence[float]]) -> Evidence:
    """What the report is drawn from; `ratios` of time [timings][plans]."""
    return Evidence(
        manifest, [h.candidate.place for h in job.heads], job.selection.chosen, job.temperatures, job.test,
        job.recorded["test"], job.costs, job.labels, ratios,
    )  # fmt: skip


def _exit_specs(program: ExitProgram, heads: Sequence[Head]) -> tuple[ExitSpec, ...]:
    exits = []
    for index, (head, flops) in enumerate(zip(heads, head_costs(program), strict=True)):
        config = {"family": head.config.family, **head.config.settings}
        exits.append(
            ExitSpec(
                place=head.candidate.place,
                cut=head.candidate.name,
                head=head.config.describe(),
                head_config=config,
                parameters=head.parameters(),
                head_flops=flops,
                segment_flops=round(program.segments[index].flops),
                temperature=program.plan.exits[index].temperature,
            )
        )
    return (*exits, ExitSpec("output", "", "backbone", {}, 0, 0, round(program.segments[-1].flops), 1.0))


def _check(program: ExitProgram, artifact: Artifact, job: Job) -> None:
    """Every emitted form against the eager run, on test rows."""
    batch = job.rows.take(job.splits.test[:_CHECKED_ROWS])
    manifest = artifact.manifest
    if manifest.stages:
        session = load(artifact.path, providers=["CPUExecutionProvider"], executor="segments")
        require(compare(program, session, batch), "the ONNX segments")
    if "model.onnx" in manifest.files:
        session = load(artifact.path, providers=["CPUExecutionProvider"], executor="single-file")
        require(compare(program, session, batch), "the single ONNX file")
    if SCRIPT in manifest.files:
        script = ScriptSession(artifact.read(SCRIPT), [i.name for i in program.backbone.inputs])
        require(compare(program, script, batch), "the TorchScript file")


def _chosen_by(options: Options) -> str | None:
    if options.cost != TIME:
        return None
    return f"batch {options.cost_batch}, {options.threads or usable_cores()} threads"


def _worth_dropping(artifact: Artifact, job: Job) -> tuple[float, ...]:
    """From which share of answered rows compaction pays here; () where nothing is measured."""
    options = job.options
    if not options.batches or not artifact.manifest.stages or len(artifact.manifest.exits) == 1:
        return ()
    largest, test = max(options.batches), job.splits.test
    rows = job.rows.take(test[np.arange(largest) % len(test)])
    return measure_stages(artifact, largest, options.threads or usable_cores(), _FEW, rows).worth_dropping()


def _timings(artifact: Artifact, job: Job) -> tuple[tuple[Timing, tuple[float, ...]], ...]:
    """For every batch size the default plan's times, and all plans' ratios to the backbone's."""
    options = job.options
    if not options.batches or job.plain is None:
        return ()
    bench = measure.Bench(artifact, job.plain, options.threads or usable_cores())
    plans = [[math.inf if t is None else t for t in plan.thresholds] for plan in job.plans]
    rounds, drawn = max(1, options.rounds // measure.DIAL_SHARE), (job.rows, job.splits.test)
    return tuple(
        (
            bench.timing(*drawn, size, options.rounds, options.seed),
            bench.dial(*drawn, size, rounds, options.seed, plans),
        )
        for size in options.batches
    )
