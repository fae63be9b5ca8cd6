"""`compile`: the flow of the design as one call, and nothing else.

capture -> candidates -> distil -> calibrate -> record -> select -> build -> emit -> check -> measure -> write
"""

from __future__ import annotations

import contextlib
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from offramp.passes import (
    Backbone,
    Candidate,
    Candidates,
    Refusal,
    Trace,
    build_program,
    find_candidates,
    observed,
)
from offramp.runtime.artifact import check_output, write_artifact
from offramp.runtime.data import ArrayRows, Rows, fit_rows
from offramp.runtime.errors import InputError, NoCandidateError, UsageError
from offramp.runtime.manifest import Manifest
from offramp.runtime.process import threads_are_shared
from offramp.runtime.selection import (
    CERTIFIED,
    check_rows,
    dial,
)

from .augment import apply, find_augmentation
from .capture import bind, capture
from .checkpoint import alone_in
from .choose import choose_exits, exit_plan, observers, records
from .costs import TIME, costs, measured_costs
from .distill import Head, default_heads, distil
from .emit import plain_model
from .independence import INDEPENDENT, keep_independent
from .lower import lowered
from .memory import give_back, groups
from .package import Job, Options, Ready, input_specs, pack
from .precision import FP32, INT8
from .progress import Say
from .record import Recording, calibrate, record
from .search import NONE, Found, search_heads, shortlist_over
from .splits import RowSplits, check_splits, split_rows
from .static import capture_static
from .stream import largest_batch, tensors

_EXAMPLE_ROWS = 8
_HEADS, _SEARCH = "heads", "search"  # folders of checkpoints, a number behind each
_MARGIN = 0.05  # by which a head's loss must be under that of a constant answer


def compile(
    model: nn.Module | ExportedProgram,
    data: Rows | np.ndarray | Mapping[str, np.ndarray],
    out: str | Path,
    *,
    labels: np.ndarray | None = None,
    options: Options | None = None,
    splits: RowSplits | None = None,
    name: str | None = None,
    static: nn.Module | ExportedProgram | None = None,
    static_name: str | None = None,
    work: Path | None = None,
    say: Say = lambda line: None,
) -> Manifest:
    """Trained classifier + unlabelled inputs -> artifact at `out`; returns its manifest.

    `data` holds preprocessed rows (an array for a single input, arrays by input name, or any `Rows`); `labels`
    `[rows]` are used in the report only. `splits` says which rows may touch what, for those who know better than
    the shuffle by `options.seed`: to certify on rows of another day, say. `static` is a smaller model for the same
    classes and inputs, which the report sets beside the artifact; it changes nothing else. Heads in training are kept
    in `<out>.work` until the artifact stands, so that an interrupted call goes on where it was; with `work` they are
    kept there and stay, so that the next call under another tolerance or policy need not train them again. `say`
    receives one line per step. Whatever the precision, agreement is with the model as it came: see `lower`.

    Raises `ModelError`, `NoCandidateError`, `InputError`, `UsageError` or `StorageError`; then `out` is as it was.
    """
    out, options = Path(out), options or Options()
    check_output(out)
    if work is not None and out.absolute() in (work.absolute(), *work.absolute().parents):
        raise UsageError(f"{work}: lies in the output {out}, which holds the artifact alone; choose another folder")
    ready = prepare(
        model, data, labels=labels, options=options, splits=splits, name=name, static=static, static_name=static_name,
        say=say,
    )  # fmt: skip
    kept = work or out.absolute().with_name(out.name + ".work")
    with alone_in(kept):
        try:
            heads = train(ready, options, kept, say)
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"training does not fit into the memory of {options.training.device}; "
                "give a memory budget (--memory-budget) of what is free there, or train on the cpu"
            ) from error
    manifest = finish(ready, heads, out, options, say)
    if work is None:
        _clear(kept)
    return manifest


def _clear(work: Path) -> None:
    """Remove what training left there, and the folder where nothing else is in it."""
    for part in work.glob("*[0-9]"):
        if part.name.rstrip("0123456789") in (_HEADS, _SEARCH):
            shutil.rmtree(part, ignore_errors=True)
    with contextlib.suppress(OSError):
        work.rmdir()


def prepare(
    model: nn.Module | ExportedProgram,
    data: Rows | np.ndarray | Mapping[str, np.ndarray],
    *,
    labels: np.ndarray | None = None,
    options: Options | None = None,
    splits: RowSplits | None = None,
    name: str | None = None,
    static: nn.Module | ExportedProgram | None = None,
    static_name: str | None = None,
    say: Say = lambda line: None,
) -> Ready:
    """The first part of `compile`: capture, candidates, and whether the rest can be done at all."""
    options, rows = options or Options(), as_rows(data, labels)
    splits = split_rows(len(rows), options.seed) if splits is None else splits
    check_splits(splits, len(rows))
    say("capturing the model's graph")
    example = tensors(rows, np.arange(min(_EXAMPLE_ROWS, len(rows))))
    trace, said = Trace(), options.signature
    with observed(*observers(trace, options)):
        backbone = capture(
            model, example, name=name, dynamic=said.dynamic, output=said.output, scores=said.scores, say=say
        )
    rows = fit_rows(rows, input_specs(backbone))
    _check_labels(rows.labels, backbone.classes)
    beside = None if static is None else capture_static(static, example, static_name, backbone, said)
    found = find_candidates(backbone, limits=options.limits)
    found = keep_independent(backbone, found, bind(backbone.inputs, example, backbone.name))
    plain = plain_model(backbone, options.forms)  # an operator no target can express is better found before training
    if options.precision == INT8 and threads_are_shared():
        raise UsageError(
            "int8 is made by ONNX Runtime's own tools, whose sessions want threads of their own; "
            "compile in a process that does not call share_threads"
        )
    if options.precision != FP32 and options.targets is None:
        say(f"{options.precision} stages are emitted as {' and '.join(options.forms)} only")
    candidates = choose_candidates(backbone, found, options.max_candidates)
    say(f"{backbone.name}: {len(found.kept)} candidates, {len(found.refused)} places refused; {len(candidates)} taken")
    if options.policy == CERTIFIED:
        check_rows(len(splits.certify), options.tolerance, options.delta)
    _, augment = find_augmentation(options.training.augment, backbone.inputs)
    apply(augment, tensors(rows, np.arange(min(_EXAMPLE_ROWS, len(rows)))), torch.Generator())
    return Ready(backbone, candidates, rows, splits, plain, trace, beside)


def _check_labels(labels: np.ndarray | None, classes: int) -> None:
    if labels is None:
        return
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise InputError(
            f"row {wrong[0]} has the label {labels[wrong[0]]}, the model's classes are 0 to {classes - 1}; "
            "correct the labels, or leave them out"
        )


def finish(
    ready: Ready, heads: Sequence[Head], out: str | Path, options: Options, say: Say = lambda line: None
) -> Manifest:
    """The last part of `compile`: trained heads -> artifact."""
    backbone, rows, splits = ready.backbone, ready.rows, ready.splits
    calibration = record(backbone, heads, rows, splits.calibrate, "calibrate")
    heads, calibration = keep_beyond_chance(heads, calibration, say)
    if options.precision != FP32:
        program, job = lowered(ready, heads, options, say)
        manifest, files = pack(program, job)
        write_artifact(Path(out), manifest, files)
        return manifest
    temperatures = calibrate(calibration)
    said = {p: record(backbone, heads, rows, getattr(splits, p), p) for p in ("select", "certify", "test")}
    recorded = {p: records(one, temperatures, options.metric, options.risk) for p, one in said.items()}
    price = costs(backbone, heads)
    spent = price
    if options.cost == TIME:
        some = rows.take(splits.select[np.arange(options.cost_batch) % len(splits.select)])
        spent = measured_costs(backbone, heads, temperatures, some, options.threads)
    selection, certificate, sets = choose_exits(recorded, spent, options)
    seen = f"{selection.risk:.2%} {options.risk} on the {len(splits.select)} rows they were chosen on"
    say(f"{len(selection.chosen)} exits chosen by {options.policy}: {seen}")
    with observed(*observers(ready.trace, options)):
        program = build_program(
            backbone,
            exit_plan(selection, heads, temperatures, options.metric),
            {h.candidate.name: h.module for h in heads},
        )
    plans = dial(selection, certificate, recorded, spent, options.dial, options.policy, options.delta, sets)
    job = Job(
        rows, splits, heads, temperatures, recorded, said["test"], sets, price, selection, plans, ready.plain, options,
        ready.trace, ready.static,
    )  # fmt: skip
    manifest, files = pack(program, job)
    write_artifact(Path(out), manifest, files)
    return manifest


def as_rows(data: Rows | np.ndarray | Mapping[str, np.ndarray], labels: np.ndarray | None = None) -> Rows:
    """Whatever a caller has -> `Rows`."""
    if isinstance(data, np.ndarray):
        return ArrayRows({"input": data}, labels)
    if isinstance(data, Mapping):
        return ArrayRows(data, labels)
    if not hasattr(data, "input_names"):
        raise InputError(f"the data is a {type(data).__name__}; give a numpy array, arrays by input name, or Rows")
    if labels is not None:
        raise UsageError("rows that are opened already bring their own labels; leave labels out")
    return data


def choose_candidates(backbone: Backbone, found: Candidates, limit: int) -> tuple[Candidate, ...]:
    """At most `limit` of the candidates, spread evenly along the backbone's compute.

    Raises `NoCandidateError` with the most frequent refusals when there is none.
    """
    if not found.kept:
        rules: dict[str, list[Refusal]] = defaultdict(list)
        for refusal in found.refused:
            rules[refusal.rule].append(refusal)
        # What running the model tells is told first: reading the graph tells it of no other place.
        frequent = sorted(rules.values(), key=lambda same: (same[0].rule == INDEPENDENT, len(same)), reverse=True)[:3]
        reasons = [f"{len(same)} such as {same[-1].name} ({same[-1].place}): {same[-1].reason}" for same in frequent]
        raise NoCandidateError(
            f"{backbone.name} has no place for an exit among {len(found.refused)} considered: "
            f"{'; '.join(reasons) or 'none at all'}; see `offramp candidates` for all of them"
        )
    if len(found.kept) <= limit:
        return found.kept
    depths = np.array([c.flops_before for c in found.kept])
    wanted = np.linspace(depths[0], depths[-1], limit + 2)[1:-1]
    return tuple(found.kept[i] for i in sorted({int(np.abs(depths - w).argmin()) for w in wanted}))


def train(ready: Ready, options: Options, folder: Path, say: Say = lambda line: None) -> tuple[Head, ...]:
    """A trained head for every candidate, of the default kind or as a search finds; checkpoints lie in `folder`."""
    backbone, candidates, rows, splits = ready.backbone, ready.candidates, ready.rows, ready.splits
    training, search = options.training, options.search
    share = -(-search.trials // search.waves) + 1 if search.engine != NONE else 1
    parts = groups(backbone, candidates, largest_batch(splits.distil, training.batch), share, options.memory_budget)
    if len(parts) > 1:
        say(f"the memory budget takes the {len(candidates)} candidates in {len(parts)} groups, one after the other")
    found = [_proposed(ready, group, options, folder / f"{_SEARCH}{index}", say) for index, group in enumerate(parts)]
    kept = tuple(name for one in found for name in one.shortlist)
    if search.engine != NONE and len(kept) > search.shortlist:
        kept = shortlist_over(backbone, candidates, found, options.tolerance, search.shortlist)
        say(f"of all groups' candidates {len(kept)} go on")
    heads: list[Head] = []
    for index, (group, one) in enumerate(zip(parts, found, strict=True)):
        give_back()
        taken = tuple(candidate for candidate in group if candidate.name in kept)
        if taken:
            heads += distil(
                backbone, taken, one.configs, rows, learn=splits.distil, validate=splits.calibrate, training=training,
                seed=options.seed, rates=one.rates, folder=folder / f"{_HEADS}{index}", report=say,
            )  # fmt: skip
    return tuple(heads)


def _proposed(ready: Ready, group: tuple[Candidate, ...], options: Options, folder: Path, say: Say) -> Found:
    """The heads that candidates which are trained together shall have."""
    give_back()
    if options.search.engine == NONE:
        return Found(default_heads(ready.backbone, group), {}, tuple(c.name for c in group), ())
    return search_heads(
        ready.backbone, group, ready.rows, learn=ready.splits.distil, select=ready.splits.select,
        tolerance=options.tolerance, search=options.search, training=options.training, seed=options.seed,
        folder=folder, report=say,
    )  # fmt: skip


def keep_beyond_chance(heads: Sequence[Head], recording: Recording, say: Say) -> tuple[tuple[Head, ...], Recording]:
    """Drop the heads that tell hardly more of the backbone's answers than one answer for all rows does.

    Hardly: their divergence on the validation rows, which `recording` is of, is not below that of the mean answer by
    a twentieth. Where none would be left all stay: what their exits may answer is the thresholds' affair.
    """
    answers = recording.backbone.astype(np.float64)
    mean = answers.mean(0)
    constant = float(
        np.where(answers > 0, answers * np.log(np.maximum(answers, 1e-300) / np.maximum(mean, 1e-300)), 0.0)
        .sum(1)
        .mean()
    )
    kept = [index for index, head in enumerate(heads) if head.loss < (1 - _MARGIN) * constant]
    if not kept:
        say(
            f"no head learned more than one answer for all of {len(answers)} rows would tell, so expect few exits; "
            "give more rows or epochs, or rows that the model answers differently"
        )
        return tuple(heads), recording
    for index, head in enumerate(heads):
        if index not in kept:
            told = f"{head.loss:.3g} nats from the backbone's answers, one answer for all rows {constant:.3g}"
            say(f"dropped {head.candidate.place}: its head learned hardly anything ({told})")
    return tuple(heads[i] for i in kept), Recording(recording.logits[kept], recording.backbone)
