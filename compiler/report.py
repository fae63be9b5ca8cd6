"""The report: one self-contained page a person can believe the artifact by.

The table of `offramp inspect`, and two figures from the records: what every candidate's confidence is worth
(share of rows that would leave there against disagreement among them, over all thresholds, test rows), and
what each tolerance buys (the exits chosen anew by the risk predicted on the selection rows, their disagreement
and saving on the test rows).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from importlib import resources

import matplotlib as mpl
import numpy as np
from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offramp.runtime.manifest import Manifest
from offramp.runtime.selection import Costs, Records, disagreement, expected_cost, select
from offramp.runtime.table import render

TOLERANCES = (0.0, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05)


def render_report(manifest: Manifest, selected: Records, test: Records, costs: Costs) -> bytes:
    """Manifest and the records of the selection and test rows -> the page, UTF-8."""
    template = resources.files(__package__).joinpath("report.html.j2").read_text()
    page = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            manifest=manifest,
            plan=manifest.plans[manifest.default_plan],
            table=render(manifest),
            coverage=_svg(lambda axes: _coverage(axes, test)),
            dial=_svg(lambda axes: _dial(axes, selected, test, costs)),
        )
    )
    return page.encode()


def _svg(draw: Callable[[Axes], None]) -> str:
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "offramp"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _coverage(axes: Axes, test: Records) -> None:
    """Rows a candidate would take, most confident first, against disagreement among them."""
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.9, test.candidates))
    for index in range(test.candidates):
        order = np.argsort(-test.confidence[:, index], kind="stable")
        wrong = np.cumsum(~test.agrees[order, index])
        taken = np.arange(1, test.rows + 1)
        axes.plot(taken / test.rows * 100, wrong / taken * 100, color=colours[index], lw=1.4)
    axes.set_xlabel("rows that leave, % (most confident first)")
    axes.set_ylabel("of those, % that disagree with the backbone")
    axes.set_title(f"{test.candidates} candidates, dark = shallow, {test.rows:,} test rows", fontsize=10)


def _dial(axes: Axes, selected: Records, test: Records, costs: Costs) -> None:
    """Compute saved and disagreement on the test rows for exits chosen at each tolerance."""
    plans = [select("joint", replace(selected, predicted=True), costs, t) for t in TOLERANCES]
    saved = [1 - expected_cost(test, costs, p.chosen, p.thresholds) / costs.segment.sum() for p in plans]
    risk = [disagreement(test, p.chosen, p.thresholds) for p in plans]
    tolerance = np.array(TOLERANCES) * 100
    axes.plot(tolerance, np.array(saved) * 100, marker="o", label="compute saved, %")
    axes.plot(tolerance, np.array(risk) * 100, marker="s", label="disagreement, %")
    axes.plot(tolerance, tolerance, ls=":", color="grey", label="tolerance")
    axes.set_xlabel("tolerance, % (risk predicted on the selection rows)")
    axes.set_ylabel("% on the test rows")
    axes.set_title("what a tolerance buys, before any certificate", fontsize=10)
    axes.legend(frameon=False)
