"""The table a person judges an artifact by: exits, agreement, compute and time, before and after.

Plain text from a `Manifest` alone, at most 120 columns where no more than three batch sizes were timed. All rates and
the accuracy are on the held-out test rows; times are medians of what was measured when the artifact was made, on the
machine it names. Where the time saved is less than the compute saved, every stage's share of both shows to which
stages it went.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .manifest import Certificate, Evaluation, Manifest, Plan, StaticEvaluation, Timing, Tuned

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_NONE = "-"


def render(manifest: Manifest) -> str:
    """The whole table, without a trailing newline."""
    parts = [_title(manifest), _exits(manifest), _whole(manifest)]
    if manifest.measured.timings:
        parts.append(_times(manifest))
        parts += _stages(manifest)
    if manifest.measured.tuned is not None:
        parts.append(_tuned(manifest, manifest.measured.tuned))
    return "\n\n".join(parts)


def human(number: float) -> str:
    """Three significant digits and a unit: 41234567 -> '41.2 M'."""
    for size, unit in _UNITS:
        # 999,950 would round to '1000 k'.
        if abs(number) >= size * 0.9995:
            return f"{_three(number / size)} {unit}"
    return _three(number) if number % 1 else f"{number:.0f}"


def percent(share: float | None, digits: int = 1) -> str:
    """0.1234 -> '12.3 %'"""
    return _NONE if share is None else f"{share * 100:.{digits}f} %"


def at_most(share: float, digits: int = 0) -> str:
    """As `percent`, with more digits where that would say less than it is."""
    text = percent(share, digits)
    return text if float(text.split()[0]) >= share * 100 * (1 - 1e-9) else f"{share * 100:.4g} %"


def bound(share: float, digits: int = 2) -> str:
    """As `percent`, rounded up: an upper bound rounded down is none."""
    steps = 100 * 10**digits
    return percent(math.ceil(share * steps * (1 - 1e-9)) / steps, digits)


def _title(manifest: Manifest) -> str:
    plan = manifest.plans[manifest.default_plan]
    backbone = manifest.backbone
    promise = _promise(plan, manifest.risk)
    chosen_by = manifest.measured.chosen_by
    by = "" if chosen_by is None else f"\nexits chosen to save time at {chosen_by}"
    by += _precision(manifest)
    return (
        f"{_short(backbone.name, 60)}: {human(backbone.parameters)} parameters, "
        f"{human(backbone.flops)} FLOPs per row, {manifest.classes} classes\n"
        f"tolerance {at_most(plan.tolerance, 2)} of {manifest.risk}, policy {plan.policy}{promise}{by}"
    )


def _precision(manifest: Manifest) -> str:
    """What the stages' precision costs without any exit, on the test rows."""
    if manifest.precision == "fp32":
        return ""
    alone = percent(1 - manifest.evaluation.exits[-1].agreement_all, 2)
    return f"\nstages in {manifest.precision}, which alone changes {alone} of the answers"


def _promise(plan: Plan, risk: str) -> str:
    evidence = plan.certificate
    if evidence is None:
        return ": kept on the rows the exits were chosen on, not certified for others"
    return (
        f": no more {risk} on new rows, wrong with probability {at_most(evidence.delta)} at most\n"
        f"({_seen(evidence, risk)}; "
        f"bound for this plan alone {bound(evidence.bound)})"
    )


def _seen(evidence: Certificate, risk: str) -> str:
    if risk == "disagreement":
        return f"{evidence.observed:.0f} of {evidence.rows:,} certification rows disagree"
    return f"{risk} {percent(evidence.observed / max(evidence.rows, 1), 2)} on {evidence.rows:,} certification rows"


def _exits(manifest: Manifest) -> str:
    head = (
        "exit",
        "place",
        "head",
        "params",
        "FLOPs",
        "depth",
        "threshold",
        "temp.",
        "exit rate",
        "agreement",
    )
    lines = [head]
    depth = 0
    thresholds = [*manifest.plans[manifest.default_plan].thresholds, None]
    for index, (spec, measured) in enumerate(zip(manifest.exits, manifest.evaluation.exits, strict=True)):
        depth += spec.segment_flops
        threshold, last = thresholds[index], index == len(manifest.exits) - 1
        lines.append(
            (
                str(index),
                _short(spec.place, 22),
                _short(spec.head, 26),
                _NONE if last else human(spec.parameters),
                _NONE if last else human(spec.head_flops),
                percent(depth / manifest.backbone.flops if manifest.backbone.flops else None),
                _NONE if last else "never" if threshold is None else f"{threshold:.4f}",
                f"{spec.temperature:.3g}",
                percent(measured.exit_rate),
                percent(measured.agreement, 2),
            )
        )
    return _columns(lines, left=(1, 2))


def _whole(manifest: Manifest) -> str:
    seen = manifest.evaluation
    low, high = seen.disagreement_interval
    lines = [
        (
            "disagreement",
            percent(seen.disagreement, 2),
            f"95 % interval {percent(low, 2)} to {percent(high, 2)}",
        ),
        ("regret", percent(seen.regret, 2), "what the backbone itself expects the differing answers to cost"),
    ]
    if seen.accuracy is not None and seen.accuracy_backbone is not None:
        change = (seen.accuracy - seen.accuracy_backbone) * 100
        before_after = f"{percent(seen.accuracy_backbone, 2)} -> {percent(seen.accuracy, 2)}"
        lines.append(("accuracy", before_after, f"{change:+.2f} points"))
    lines.append(
        (
            "FLOPs per row",
            f"{human(seen.flops_backbone)} -> {human(seen.flops)}",
            f"saves {percent(_saved(seen))}; an oracle over these exits {percent(_saved_by_oracle(seen))}",
        )
    )
    if seen.static is not None:
        lines.append(("static model", human(seen.static.flops), _static(seen, seen.static)))
    return f"On {seen.rows:,} held-out rows\n" + _indent(_columns(lines, left=(0, 1, 2)))


def _static(seen: Evaluation, static: StaticEvaluation) -> str:
    """What the smaller model named to compare with saves and costs."""
    saved = 1 - static.flops / seen.flops_backbone if seen.flops_backbone else 0.0
    parts = [f"{_short(static.name, 24)} saves {percent(saved)}", f"disagreement {percent(static.disagreement, 2)}"]
    if static.accuracy is not None:
        parts.append(f"accuracy {percent(static.accuracy, 2)}")
    return ", ".join(parts)


def _times(manifest: Manifest) -> str:
    head = ("ms per row", "before", "after", "ratio", "quartiles", "saves", "ideal", "over ideal", "threads", "rounds")
    lines = [head]
    for timing in manifest.measured.timings:
        low, high = timing.ratio_quartiles
        lines.append(
            (
                f"batch {timing.batch}",
                f"{timing.backbone_ms:.4f}",
                f"{timing.offramp_ms:.4f}",
                f"{timing.ratio:.3f}",
                f"{low:.3f} - {high:.3f}",
                percent(1 - timing.ratio),
                _NONE if timing.ideal_ms is None else f"{timing.ideal_ms:.4f}",
                _NONE if timing.ideal_over is None else f"{timing.ideal_over:.3f}",
                str(timing.threads),
                str(timing.rounds),
            )
        )
    return f"Measured on {manifest.measured.machine}\n" + _indent(_columns(lines, left=(0,))) + _advice(manifest)


def _advice(manifest: Manifest) -> str:
    """What to do about an artifact that takes longer than the model it stands for."""
    slow = [str(timing.batch) for timing in manifest.measured.timings if timing.ratio > 1]
    if not slow or manifest.measured.chosen_by is not None:
        return ""
    return (
        f"\n  Slower than the plain model at batch {', '.join(slow)}: these exits were chosen by FLOPs, which a small"
        f"\n  model's many small operators exceed. Choose by milliseconds: compile with --cost time"
        f" --cost-batch {slow[0]},\n  or run offramp tune on the machine that serves."
    )


def _stages(manifest: Manifest) -> list[str]:
    """Every stage's compute and time in percent of the whole backbone's; nothing if no time was lost."""
    saved = _saved(manifest.evaluation)
    short = [t for t in manifest.measured.timings if 1 - t.ratio < saved and t.stage_ms and t.backbone_ms]
    if not short:
        return []
    head = ["stage", "up to", "rows", "compute", *(f"time, batch {t.batch}" for t in short)]
    lines = [head]
    reach = 1.0
    for index, (spec, measured) in enumerate(zip(manifest.exits, manifest.evaluation.exits, strict=True)):
        flops = reach * (spec.segment_flops + spec.head_flops) / max(manifest.evaluation.flops_backbone, 1e-9)
        times = [percent(_stage_share(t, index)) for t in short]
        lines.append([str(index), _short(spec.place, 40), percent(reach), percent(flops), *times])
        reach = max(0.0, reach - measured.exit_rate)
    between = [percent((t.offramp_ms - sum(t.stage_ms)) / t.backbone_ms) for t in short]
    lines.append(["", "between the stages", "", percent(0.0), *between])
    whole = manifest.evaluation.flops / max(manifest.evaluation.flops_backbone, 1e-9)
    lines.append(["", "whole", "", percent(whole), *(percent(t.offramp_ms / t.backbone_ms) for t in short)])
    return [
        "Less time saved than compute: where it went, in percent of the backbone's own compute and time\n"
        + _indent(_columns(lines, left=(1,)))
    ]


def _tuned(manifest: Manifest, tuned: Tuned) -> str:
    """What was measured, stage by stage, and what the new plan is expected to take."""
    shown = sorted({0, len(tuned.batches) - 1})
    head = ["stage", "up to", "asked", *(f"ms, {tuned.batches[i]} rows" for i in shown), "of it the exit"]
    lines = [head]
    thresholds = [*manifest.plans[manifest.default_plan].thresholds, None]
    for index, spec in enumerate(manifest.exits):
        silent, asked = tuned.silent_ms[index], tuned.asked_ms[index]
        exit_ms, last = asked[-1] - silent[-1], index == len(manifest.exits) - 1
        asks = _NONE if last else "yes" if thresholds[index] is not None else "no"
        share = _NONE if last else percent(exit_ms / max(asked[-1], 1e-9))
        lines.append([str(index), _short(spec.place, 30), asks, *(f"{asked[i]:.4f}" for i in shown), share])
    gains = [
        ("every exit silent", f"{tuned.backbone_ms:.4f}", ""),
        ("before", f"{tuned.before_ms:.4f}", percent(1 - tuned.before_ms / max(tuned.backbone_ms, 1e-9))),
        ("after", f"{tuned.after_ms:.4f}", percent(1 - tuned.after_ms / max(tuned.backbone_ms, 1e-9))),
    ]
    threads = "ONNX Runtime's choice" if tuned.threads is None else str(tuned.threads)
    return (
        f"Tuned on {tuned.machine}, threads: {threads}, for {tuned.objective}\n"
        + _indent(_columns(lines, left=(1,)))
        + "\n  expected on the selection rows, and saved\n"
        + _indent(_indent(_columns(gains, left=(0,))))
    )


def _stage_share(timing: Timing, index: int) -> float | None:
    return timing.stage_ms[index] / timing.backbone_ms if index < len(timing.stage_ms) else None


def _saved(seen: Evaluation) -> float:
    return 1 - seen.flops / seen.flops_backbone if seen.flops_backbone else 0.0


def _saved_by_oracle(seen: Evaluation) -> float:
    return 1 - seen.oracle_flops / seen.flops_backbone if seen.flops_backbone else 0.0


def _columns(lines: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Align; columns in `left` to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    rendered = []
    for line in lines:
        cells = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        rendered.append("  ".join(cells).rstrip())
    return "\n".join(rendered)


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def _short(text: str, width: int) -> str:
    """The end of a module path says more than its beginning."""
    line = " ".join(text.split())
    return line if len(line) <= width else "…" + line[-(width - 1) :]


def _three(number: float) -> str:
    size = abs(number)
    return f"{number:.2f}" if size < 9.995 else f"{number:.1f}" if size < 99.95 else f"{number:.0f}"
