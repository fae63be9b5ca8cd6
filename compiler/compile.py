"""`compile`: the flow of the design as one call, and nothing else.

capture -> candidates -> distil -> calibrate -> record -> select -> build -> emit -> check -> measure -> write
"""

from __future__ import annotations

import datetime
import io
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn
from torch.export import ExportedProgram

from offramp.passes import Backbone, Candidate, Candidates, ExitPlan, ExitProgram, Limits, PlannedExit, build_program, find_candidates
from offramp.runtime.artifact import Artifact, file_spec, open_artifact, write_artifact
from offramp.runtime.data import ArrayRows, Rows, fit_rows
from offramp.runtime.errors import NoCandidateError, UsageError
from offramp.runtime.manifest import (
    FORMAT_VERSION, BackboneSpec, ExitSpec, Manifest, Measured, Plan, Splits, StageSpec, TensorSpec, Timing,
)  # fmt: skip
from offramp.runtime.session import load

from . import measure
from .capture import capture
from .distill import Head, Training, default_heads, distil, tensors, value_shape
from .emit import TARGETS, backbone_model, check_targets, emit, serialise
from .equivalence import compare, require
from .evaluate import Outcome, evaluate, head_costs, run_program
from .heads import HeadConfig, head_flops
from .record import Recording, calibrate, record
from .report import render_report
from .splits import RowSplits, split_rows
from .thresholds import POLICIES, Costs, Records, Selection, select

METRIC = "max_probability"
_EXAMPLE_ROWS = 8
_CHECKED_ROWS = 256

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Everything `compile` may be told; the defaults are what most people want."""

    tolerance: float = 0.01  # share of rows whose early answer may differ from the backbone's
    policy: str = "joint"
    seed: int = 0
    targets: tuple[str, ...] = TARGETS
    training: Training = Training()
    limits: Limits = Limits()
    max_candidates: int = 16  # more are thinned out evenly along the backbone's compute
    threads: int | None = None  # to measure with; None: the cores this process may use
    rounds: int = measure.ROUNDS
    batches: tuple[int, ...] = measure.BATCHES  # to measure at; empty: measure nothing
    preprocessing: str | None = None  # how a folder of images became rows; recorded, so that `run` repeats it

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and 0 <= self.tolerance <= 1):
            raise UsageError(f"tolerance {self.tolerance} is not a share of rows; give a number from 0 to 1")
        if self.policy not in POLICIES:
            raise UsageError(f"policy {self.policy!r} does not exist; choose one of {', '.join(POLICIES)}")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative; give 0 or more")
        if self.max_candidates < 1:
            raise UsageError(f"at most {self.max_candidates} candidates leaves none; give 1 or more")
        check_targets(self.targets)


def compile(  # noqa: A001  the job's own word; reached as offramp.compiler.compile
    model: nn.Module | ExportedProgram,
    data: Rows | np.ndarray | Mapping[str, np.ndarray],
    out: str | Path,
    *,
    labels: np.ndarray | None = None,
    options: Options = Options(),  # noqa: B008  frozen
    name: str | None = None,
    say: Say = lambda line: None,
) -> Manifest:
    """Trained classifier + unlabelled inputs -> artifact at `out`; returns its manifest.

    `data` holds preprocessed rows (an array for a single input, arrays by input name, or any `Rows`); `labels`
    `[rows]` are used in the report only. Heads in training are kept in `<out>.work` until the artifact stands,
    so that an interrupted call goes on where it was. `say` receives one line per step.

    Raises `ModelError`, `NoCandidateError`, `InputError`, `UsageError` or `StorageError`; then `out` is as it was.
    """
    out = Path(out)
    rows = as_rows(data, labels)
    backbone = capture(model, tensors(rows, np.arange(min(_EXAMPLE_ROWS, len(rows)))), name=name)
    rows = fit_rows(rows, input_specs(backbone))
    splits = split_rows(len(rows), options.seed)
    found = find_candidates(backbone, limits=options.limits)
    candidates = choose_candidates(backbone, found, options.max_candidates)
    say(f"{backbone.name}: {len(found.kept)} candidates of {len(found.kept) + len(found.refused)} places, {len(candidates)} taken")

    flops = candidates[0].flops_before + candidates[0].flops_after
    work = out.with_name(out.name + ".work")
    heads = distil(
        backbone, candidates, default_heads(backbone, candidates, flops), rows,
        learn=splits.distil, validate=splits.calibrate, training=options.training, seed=options.seed,
        checkpoint=work / "heads.pt", report=say,
    )  # fmt: skip
    temperatures = calibrate(record(backbone, heads, rows, splits.calibrate, "calibrate"))
    recorded = {part: record(backbone, heads, rows, getattr(splits, part), part) for part in ("select", "certify", "test")}
    selection = select(options.policy, records(recorded["select"], temperatures), costs(backbone, heads), options.tolerance)
    say(f"{len(selection.chosen)} exits chosen by {options.policy}: {selection.disagreement:.2%} disagreement on {len(splits.select)} rows")

    program = build_program(backbone, exit_plan(selection, heads, temperatures), {h.candidate.name: h.module for h in heads})
    outcome = run_program(program, rows, splits.test)
    stages, files = emit(program, options.targets)
    files["records.npz"] = pack_records(heads, temperatures, recorded)
    draft = describe(program, heads, selection, splits, rows, outcome, stages, files, options)
    manifest, files = finish(program, draft, files, rows, splits, recorded, temperatures, heads, options)
    write_artifact(out, manifest, files)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def as_rows(data: Rows | np.ndarray | Mapping[str, np.ndarray], labels: np.ndarray | None = None) -> Rows:
    """Whatever a caller has -> `Rows`."""
    if isinstance(data, np.ndarray):
        return ArrayRows({"input": data}, labels)
    if isinstance(data, Mapping):
        return ArrayRows(data, labels)
    return data


def input_specs(backbone: Backbone) -> tuple[TensorSpec, ...]:
    """The backbone's inputs as the manifest writes them."""
    return tuple(TensorSpec(i.name, str(i.dtype).removeprefix("torch."), i.shape) for i in backbone.inputs)


def choose_candidates(backbone: Backbone, found: Candidates, limit: int) -> tuple[Candidate, ...]:
    """At most `limit` of the candidates, spread evenly along the backbone's compute.

    Raises `NoCandidateError` with the most frequent refusals when there is none.
    """
    if not found.kept:
        reasons = [f"{r.name} ({r.place}): {r.reason}" for r in found.refused[-3:]]
        raise NoCandidateError(
            f"{backbone.name} has no place for an exit among {len(found.refused)} considered, such as "
            f"{'; '.join(reasons) or 'none at all'}; see `offramp candidates` for all of them"
        )
    if len(found.kept) <= limit:
        return found.kept
    depths = np.array([c.flops_before for c in found.kept])
    wanted = np.linspace(depths[0], depths[-1], limit + 2)[1:-1]
    return tuple(found.kept[i] for i in sorted({int(np.abs(depths - w).argmin()) for w in wanted}))


def costs(backbone: Backbone, heads: Sequence[Head]) -> Costs:
    """FLOPs per row of every segment between candidates, and of every head."""
    depths = [h.candidate.flops_before for h in heads]
    total = heads[0].candidate.flops_before + heads[0].candidate.flops_after
    own = [head_flops(h.config, value_shape(backbone, h.candidate), backbone.classes) for h in heads]
    return Costs(np.diff([0.0, *depths, total]), np.array(own, np.float64))


def records(recording: Recording, temperatures: Sequence[float]) -> Records:
    """What selection reads of a recording."""
    agrees = recording.classes() == recording.backbone_classes[:, None]
    return Records(recording.confidence(temperatures, METRIC), agrees)


def exit_plan(selection: Selection, heads: Sequence[Head], temperatures: Sequence[float]) -> ExitPlan:
    """The selection in the words of the passes."""
    exits = tuple(
        PlannedExit(heads[index].candidate.name, temperatures[index], threshold)
        for index, threshold in zip(selection.chosen, selection.thresholds, strict=True)
    )
    return ExitPlan(exits, METRIC, selection.policy, selection.tolerance)


def pack_records(heads: Sequence[Head], temperatures: Sequence[float], recorded: Mapping[str, Recording]) -> bytes:
    """`records.npz`: confidence and agreement of every candidate, chosen or not, on every recorded split."""
    arrays: dict[str, np.ndarray] = {
        "candidates": np.array([h.candidate.name for h in heads]),
        "temperatures": np.array(temperatures, np.float32),
    }
    for part, recording in recorded.items():
        kept = records(recording, temperatures)
        arrays[f"{part}_confidence"], arrays[f"{part}_agrees"] = kept.confidence, kept.agrees
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def describe(
    program: ExitProgram, heads: Sequence[Head], selection: Selection, splits: RowSplits, rows: Rows,
    outcome: Outcome, stages: Sequence[StageSpec], files: Mapping[str, bytes], options: Options,
) -> Manifest:  # fmt: skip
    """The manifest, but for what is measured."""
    backbone = program.backbone
    labels = rows.labels[splits.test] if rows.labels is not None else None
    thresholds = tuple(None if math.isinf(t) and t > 0 else t for t in selection.thresholds)
    return Manifest(
        format_version=FORMAT_VERSION,
        backbone=BackboneSpec(
            backbone.name, backbone.fingerprint(), backbone.parameters(),
            round(sum(s.flops for s in program.segments)), backbone.scores,
        ),
        inputs=input_specs(backbone),
        classes=backbone.classes,
        confidence=program.plan.metric,
        stages=tuple(stages),
        exits=_exit_specs(program, [heads[index] for index in selection.chosen]),
        plans=(Plan(selection.tolerance, selection.policy, thresholds),),
        default_plan=0,
        splits=Splits(
            splits.seed, len(splits.distil), len(splits.calibrate), len(splits.select), len(splits.certify),
            len(splits.test),
        ),
        preprocessing=options.preprocessing,
        evaluation=evaluate(program, outcome, labels),
        files={name: file_spec(data) for name, data in files.items()},
        measured=Measured("", "", {}, (), {}),
    )  # fmt: skip


def _exit_specs(program: ExitProgram, heads: Sequence[Head]) -> tuple[ExitSpec, ...]:
    exits = [
        ExitSpec(
            h.candidate.place, h.candidate.name, h.config.describe(),
            {"family": h.config.family, **h.config.settings}, h.parameters(), flops, round(s.flops), e.temperature,
        )
        for h, flops, s, e in zip(heads, head_costs(program), program.segments, program.plan.exits, strict=False)
    ]  # fmt: skip
    return (*exits, ExitSpec("output", "", "backbone", {}, 0, 0, round(program.segments[-1].flops), 1.0))


def finish(
    program: ExitProgram, draft: Manifest, files: Mapping[str, bytes], rows: Rows, splits: RowSplits,
    recorded: Mapping[str, Recording], temperatures: Sequence[float], heads: Sequence[Head], options: Options,
) -> tuple[Manifest, dict[str, bytes]]:  # fmt: skip
    """Check the emitted forms against the eager run, measure them, write the report -> manifest and files."""
    with tempfile.TemporaryDirectory(prefix="offramp-") as folder:
        write_artifact(Path(folder) / "draft", draft, files)
        artifact = open_artifact(Path(folder) / "draft")
        checked = rows.take(splits.test[:_CHECKED_ROWS])
        for executor in (["segments"] if draft.stages else []) + (["single-file"] if "model.onnx" in files else []):
            session = load(artifact.path, providers=["CPUExecutionProvider"], executor=executor)  # type: ignore[arg-type]
            require(compare(program, session, checked), executor)
        timings = _timings(artifact, serialise(backbone_model(program)), rows, splits, options)
    measured = Measured(
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        measure.machine(), measure.versions(), timings, {},
    )  # fmt: skip
    manifest = replace(draft, measured=measured)
    test = records(recorded["test"], temperatures)
    page = render_report(manifest, records(recorded["select"], temperatures), test, costs(program.backbone, heads))
    measured = replace(measured, files={"report.html": file_spec(page)})
    return replace(manifest, measured=measured), {**files, "report.html": page}


def _timings(
    artifact: Artifact, backbone: bytes, rows: Rows, splits: RowSplits, options: Options
) -> tuple[Timing, ...]:
    if not options.batches:
        return ()
    bench = measure.Bench(artifact, backbone, options.threads or measure.usable_cores())
    return tuple(bench.timing(rows, splits.test, size, options.rounds, options.seed) for size in options.batches)
