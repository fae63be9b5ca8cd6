"""The report: one self-contained page a person can believe the artifact by.

In the order of the questions a person asks: what it saves and costs beside the plain backbone (and a smaller static
model, where one was named), what each risk is worth and under which assumption, what other tolerances buy, and exit
by exit what decides the savings. Everything is of the test rows; what labels add is left out where there are none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from offramp.runtime.manifest import Evaluation, Manifest
from offramp.runtime.selection import DISAGREEMENT, REGRET, RISKS
from offramp.runtime.table import at_most, bound, human, percent, render

from . import figures
from .evidence import Evidence, Judged
from .judged import Categories

TEMPLATE = "page.html.j2"
PANELS = 12  # exits that are drawn
_NONE = "-"


@dataclass(frozen=True)
class Table:
    """Cells as a person reads them; the first `words` columns hold words, the others numbers."""

    id: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    faint: frozenset[int] = frozenset()  # rows


@dataclass(frozen=True)
class Panel:
    """A figure with its title."""

    title: Markup
    svg: str


def render_report(evidence: Evidence) -> bytes:
    """-> the page, UTF-8."""
    manifest = evidence.manifest
    template = resources.files(__package__).joinpath(TEMPLATE).read_text()
    page = (
        Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            manifest=manifest,
            plan=manifest.plans[manifest.default_plan],
            labelled=evidence.labels is not None,
            silent=not evidence.chosen,
            promise=_promise(manifest),
            alone=percent(1 - manifest.evaluation.exits[-1].agreement_all, 2),
            models=_models(manifest),
            risks=_risks(manifest),
            dial=_dial(evidence),
            candidates=_candidates(evidence),
            categories=_categories(evidence),
            colours=figures,
            batches=[t.batch for t in manifest.measured.timings],
            certified=[p.tolerance for p in manifest.plans if p.certificate is not None],
            inspected=render(manifest),
            **_panels(evidence),
        )
    )
    return _unbroken(page).encode()


def _unbroken(page: str) -> str:
    """No line ends between a number and what belongs to it."""
    return re.sub(r"(?<=\d) (?=%)|(?<=batch) (?=\d)|(?<=Eq\.) (?=\d)", "\u00a0", page)


def _promise(manifest: Manifest) -> str:
    """What the default plan keeps to, and where."""
    plan, evidence = manifest.plans[manifest.default_plan], manifest.plans[manifest.default_plan].certificate
    most = f"{at_most(plan.tolerance, 2)} {manifest.risk}"
    if evidence is None:
        return f"At most {most} on the rows the exits were chosen on; not certified for other rows."
    share = evidence.observed / max(evidence.rows, 1)
    seen = f"{evidence.observed:.0f} of" if manifest.risk == DISAGREEMENT else f"{percent(share, 2)} on"
    return (
        f"At most {most} on new rows drawn as these were; wrong with probability {at_most(evidence.delta)} at most "
        f"({seen} {evidence.rows:,} certification rows, which nothing else has seen; "
        f"bound for this plan alone {bound(evidence.bound)})."
    )


def _models(manifest: Manifest) -> Table:
    """The plain backbone, the artifact and the static model, a row each."""
    seen, timings, static = manifest.evaluation, manifest.measured.timings, manifest.evaluation.static
    labelled = seen.accuracy_backbone is not None
    head = ["model", "parameters", "FLOPs per row", "compute saved", "disagreement", "regret"]
    head += ["accuracy", "change, points"] if labelled else []
    head += [f"ms per row (saved), batch {t.batch}" for t in timings]
    own = manifest.backbone.parameters + sum(e.parameters for e in manifest.exits)
    plain = (f"plain backbone ({manifest.backbone.name})", manifest.backbone.parameters, seen.flops_backbone, 0.0, 0.0)
    ours = ("with early exits", own, seen.flops, seen.disagreement, seen.regret)
    given = [
        (plain, seen.accuracy_backbone, [f"{t.backbone_ms:.4f}" for t in timings]),
        (ours, seen.accuracy, [f"{t.offramp_ms:.4f} ({percent(1 - t.ratio)})" for t in timings]),
    ]
    if static is not None:
        named = (f"static ({static.name})", static.parameters, static.flops, static.disagreement, static.regret)
        given.append((named, static.accuracy, [_NONE] * len(timings)))
    rows = []
    for (name, parameters, flops, differs, lost), accuracy, times in given:
        saved = 1 - flops / seen.flops_backbone if seen.flops_backbone else 0.0
        cells = [name, human(parameters), human(flops), percent(saved), percent(differs, 2), percent(lost, 2)]
        rows.append([*cells, *(_accuracy(seen, accuracy) if labelled else []), *times])
    return Table("models", head, rows)


def _accuracy(seen: Evaluation, accuracy: float | None) -> tuple[str, str]:
    before = seen.accuracy_backbone
    change = _NONE if accuracy is None or before is None else _points(accuracy - before)
    return percent(accuracy, 2), change


def _risks(manifest: Manifest) -> Table:
    """Disagreement, regret and the true drop of the default plan, each with what it assumes."""
    seen, bounded = manifest.evaluation, ", which the tolerance bounds"
    low, high = seen.disagreement_interval
    rows = [
        [DISAGREEMENT, percent(seen.disagreement, 2), f"{percent(low, 2)} to {percent(high, 2)}"],
        [REGRET, percent(seen.regret, 2), _NONE],
    ]
    rows = [[r + bounded * (r == manifest.risk), value, RISKS[r].assumption, span] for r, value, span in rows]
    if seen.accuracy is not None and seen.accuracy_backbone is not None:
        drop = percent(seen.accuracy_backbone - seen.accuracy, 2)
        rows.append(["true accuracy drop", drop, "what labels show of these rows; nothing was chosen by it", _NONE])
    return Table("risks", ["risk", "on the test rows", "what it says", "95 % interval"], rows)


def _dial(evidence: Evidence) -> Table:
    """Every plan of the dial."""
    timings, labelled = evidence.manifest.measured.timings, evidence.labels is not None
    head = ["tolerance", "policy", "certified bound", "compute saved"]
    head += [f"time saved, batch {t.batch}" for t in timings] + ["disagreement", "regret"]
    head += ["accuracy drop"] if labelled else []
    rows = []
    for index, point in enumerate(evidence.points):
        proof, default = point.plan.certificate, index == evidence.manifest.default_plan
        cells = [percent(point.plan.tolerance, 2) + (" (default)" if default else ""), point.plan.policy]
        cells += [_NONE if proof is None else bound(proof.bound), percent(point.saved)]
        cells += [percent(saved) for saved in point.saved_time]
        cells += [percent(point.disagreement, 2), percent(point.regret, 2)]
        rows.append([*cells, *([percent(point.drop, 2)] if labelled else [])])
    return Table("dial", head, rows, words=2)


def _candidates(evidence: Evidence) -> Table:
    """Every candidate; those that became no exit are faint."""
    head = ["exit", "place", "depth", "exit rate", "agreement of those", "agreement of all rows", "AUROC"]
    head += ["temperature", "ECE before", "ECE after"]
    rows, faint = [], set()
    for index, judged in enumerate(evidence.candidates):
        seen = None if judged.exit is None else evidence.manifest.evaluation.exits[judged.exit]
        if seen is None:
            faint.add(index)
        rows.append([
            _NONE if judged.exit is None else str(judged.exit), _breakable(judged.place), percent(judged.depth),
            _NONE if seen is None else percent(seen.exit_rate),
            _NONE if seen is None else percent(seen.agreement, 2), percent(judged.agreement, 2),
            _NONE if judged.auroc is None else f"{judged.auroc:.3f}", f"{judged.temperature:.3g}",
            percent(judged.before.error, 2), percent(judged.after.error, 2),
        ])  # fmt: skip
    return Table("candidates", head, rows, words=2, faint=frozenset(faint))


def _categories(evidence: Evidence) -> Table:
    """Rows that leave under the default plan: who is right, the true effect (Eq. 2) and its bound (Eq. 3)."""
    places, rows = [evidence.places[i] for i in evidence.chosen], evidence.records.rows
    names = [Markup("{}: {}").format(index, _breakable(place)) for index, place in enumerate(places)]
    left = [*evidence.disagreeing, (sum(n for n, _ in evidence.disagreeing), sum(d for _, d in evidence.disagreeing))]
    found = evidence.categories
    if found is None:
        cells = [[str(n), str(n - d), str(d), _bound(d / rows)] for n, d in left]
        head = ["exit", "rows that leave", "agree", "disagree", "bound (Eq. 3), points"]
    else:
        whole = Categories(*(sum(getattr(c, f) for c in found) for f in Categories.__dataclass_fields__))
        cells = [
            [str(c.rows), *(str(getattr(c, f)) for f in Categories.__dataclass_fields__), _points(c.effect(rows)),
             _bound(c.bound(rows))]
            for c in (*found, whole)
        ]  # fmt: skip
        head = ["exit", "rows that leave", "both right", "both wrong, same answer", "only the backbone right"]
        head += ["only the exit right", "both wrong, answers differ", "true effect (Eq. 2), points"]
        head += ["bound (Eq. 3), points"]
    return Table("categories", head, [[n, *c] for n, c in zip([*names, "all exits"], cells, strict=True)])


def _panels(evidence: Evidence) -> dict[str, object]:
    """Figures by the name the template knows them by."""
    manifest, points = evidence.manifest, evidence.points
    thresholds = manifest.plans[manifest.default_plan].thresholds
    shown = [j for j in evidence.candidates if j.exit is not None or not evidence.chosen][:PANELS]

    def panels(
        kind: str, draw: Callable[[str, Judged, float | None], str], title: Callable[[Judged], Markup]
    ) -> object:
        limits = [None if j.exit is None else thresholds[j.exit] for j in shown]
        return [
            Panel(title(j), draw(f"{kind}{index}", j, limit))
            for index, (j, limit) in enumerate(zip(shown, limits, strict=True))
        ]

    rows = evidence.records.rows
    return {
        "savings": figures.savings_figure("savings", points),
        "risked": figures.risks_figure("risked", points),
        "curves": panels("curves", lambda n, j, t: figures.thresholds_figure(n, j, rows, t), _name),
        "reliability": panels("reliability", lambda n, j, t: figures.reliability_figure(n, j), _calibrated),
        "effects": panels("effect", figures.effect_figure, _name),
        "left_out": len(evidence.chosen) - len(shown) if evidence.chosen else 0,
    }


def _name(judged: Judged) -> Markup:
    place = _breakable(judged.place)
    return place if judged.exit is None else Markup("exit {}: {}").format(judged.exit, place)


def _calibrated(judged: Judged) -> Markup:
    errors = percent(judged.before.error, 2), percent(judged.after.error, 2)
    return Markup("{}, ECE {} to {}").format(_name(judged), *errors)


def _breakable(place: str) -> Markup:
    """A module path whose lines may end after its dots; escaped."""
    return Markup(".<wbr>").join(place.split("."))


def _points(share: float) -> str:
    """0.0123 -> '+1.23'"""
    return f"{share * 100:+.2f}"


def _bound(share: float) -> str:
    return "0.00" if math.isclose(share, 0) else f"-{share * 100:.2f}"
