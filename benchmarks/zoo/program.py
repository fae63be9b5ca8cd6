"""An exit program with untrained heads, and an artifact of it that nobody has measured.

Heads are the default ones, their last layer rescaled so that confidences differ from row to row; thresholds lie in
wide gaps between the confidences that the eager run gives, so that rows leave at every exit and rounding decides
for none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from offramp.compiler import build_head, default_head
from offramp.compiler.emit import emit
from offramp.compiler.package import input_specs
from offramp.passes import (
    Backbone,
    Candidate,
    ExitPlan,
    ExitProgram,
    PlannedExit,
    build_program,
    confidence,
    probabilities,
    row_shape,
)
from offramp.passes.taps import tap
from offramp.runtime.artifact import file_spec, write_artifact
from offramp.runtime.manifest import (
    FORMAT_VERSION,
    BackboneSpec,
    Evaluation,
    ExitEvaluation,
    ExitSpec,
    Manifest,
    Measured,
    Plan,
    Splits,
)

METRIC = "max_probability"
_SPREAD = 2.0  # standard deviation over rows of a rescaled head's logits
_LARGEST = 10.0  # a head's logits may be once rescaled, before their mean is taken off; rounding grows with them


def program_with_exits(
    backbone: Backbone, candidates: Sequence[Candidate], inputs: tuple[torch.Tensor, ...]
) -> ExitProgram:
    """A program with an exit at each candidate, under thresholds that split the rows `inputs`."""
    total = candidates[0].flops_before + candidates[0].flops_after
    with torch.no_grad():
        _, *values = tap(backbone, [c.name for c in candidates])(*inputs)
    heads, exits = {}, []
    for seed, (candidate, value) in enumerate(zip(candidates, values, strict=True)):
        torch.manual_seed(seed)
        shape = row_shape(backbone, candidate.name)
        head = build_head(default_head(shape, backbone.classes, total), shape, backbone.classes).eval()
        heads[candidate.name] = head
        with torch.no_grad():
            _rescale(head, head(value))
            sure = confidence(probabilities(head(value), "logits", 1.0), METRIC)
        exits.append(PlannedExit(candidate.name, 1.0, _threshold(sure)))
    return build_program(backbone, ExitPlan(tuple(exits), METRIC), heads)


def _rescale(head: nn.Module, logits: torch.Tensor) -> None:
    """Every class gets mean 0 over the rows behind `logits` [B, K], the logits a spread of `_SPREAD`."""
    last = [m for m in head.modules() if isinstance(m, nn.Linear)][-1]
    spread, largest = float(logits.std(0).mean()), float(logits.abs().max())
    factor = min(_SPREAD / max(spread, 1e-12), _LARGEST / max(largest, 1e-12))
    last.weight.mul_(factor)
    last.bias.sub_(logits.mean(0)).mul_(factor)


def _threshold(sure: torch.Tensor) -> float:
    """The middle of the widest gap between confidences [B] near their median."""
    ordered = sure.sort().values
    low, high = len(ordered) // 3, max(len(ordered) * 2 // 3, len(ordered) // 3 + 2)
    middle = ordered[low:high].double()
    gap = int(middle.diff().argmax())
    return float((middle[gap] + middle[gap + 1]) / 2)


def write(program: ExitProgram, targets: Sequence[str], folder: Path) -> None:
    """The program's artifact with the forms `targets`; what was never measured is zero. Raises as `emit` does."""
    stages, files = emit(program, targets)
    segments, heads = program.segments, program.heads
    exits = [
        ExitSpec(e.cut, e.cut, type(h).__name__, {}, 0, 0, round(s.flops), e.temperature)
        for e, h, s in zip(program.plan.exits, heads, segments[:-1], strict=True)
    ]
    exits.append(ExitSpec("output", "", "backbone", {}, 0, 0, round(segments[-1].flops), 1.0))
    backbone = program.backbone
    flops = round(sum(s.flops for s in segments))
    unmeasured = ExitEvaluation(0.0, None, 0.0, None)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        backbone=BackboneSpec(backbone.name, "", backbone.parameters(), flops, backbone.scores),
        inputs=input_specs(backbone),
        classes=backbone.classes,
        confidence=program.plan.metric,
        stages=tuple(stages),
        exits=tuple(exits),
        risk="disagreement",
        plans=(Plan(0.0, "manual", program.plan.thresholds, None),),
        default_plan=0,
        splits=Splits(0, 0, 0, 0, 0, 0),
        preprocessing=None,
        evaluation=Evaluation(0, (unmeasured,) * len(exits), 0.0, (0.0, 0.0), 0.0, None, None, 0.0, 0.0, 0.0, None),
        files={name: file_spec(data) for name, data in files.items()},
        measured=Measured("", "", {}, (), {}),
    )
    write_artifact(folder, manifest, files)
