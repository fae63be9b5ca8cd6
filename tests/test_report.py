"""The report, opened in a real browser: everything is there, can be seen, lies beside everything else, and is of the
artifact; nothing is fetched and nothing complains."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from models import QUICK, Compiled
from selenium import webdriver
from torch import nn

from offramp.compiler import Signature, compile, prepare, split_rows
from offramp.compiler.demo import Digits
from offramp.compiler.figures import svg
from offramp.runtime import Manifest, render
from offramp.runtime.errors import InputError, ModelError
from offramp.runtime.selection import RISKS
from offramp.runtime.table import human, percent

LARGEST = 600_000  # bytes, with a figure or three per exit

TABLES = """return Object.fromEntries([...document.querySelectorAll("table")].map(t =>
    [t.id, [...t.rows].map(r => [...r.cells].map(c => c.innerText.replaceAll("\\u00a0", " ")))]))"""
BOXES = """return [...document.querySelectorAll(arguments[0])].map(e => { const r = e.getBoundingClientRect();
    return [r.left, r.top, r.right, r.bottom, getComputedStyle(e).visibility == "visible"]})"""
LABELS = """return [...document.querySelectorAll("figure > svg")].map(s => [...s.querySelectorAll("text")].map(e => {
    const r = e.getBoundingClientRect(), f = s.getBoundingClientRect();
    return [r.left, r.top, r.right, r.bottom, e.textContent,
            r.left >= f.left - 1 && r.right <= f.right + 1 && r.top >= f.top - 1 && r.bottom <= f.bottom + 1]}))"""

Box = tuple[float, float, float, float, bool]


def opened(browser: webdriver.Chrome, artifact: Path, width: int = 1280) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get((artifact / "report.html").as_uri())


def boxes(browser: webdriver.Chrome, selector: str) -> list[Box]:
    return [tuple(box) for box in browser.execute_script(BOXES, selector)]


def overlap(a: Box, b: Box, slack: float = 1.0) -> bool:
    return a[0] + slack < b[2] and b[0] + slack < a[2] and a[1] + slack < b[3] and b[1] + slack < a[3]


def figures_of(manifest: Manifest) -> int:
    return 2 + 3 * (len(manifest.exits) - 1)


@pytest.mark.parametrize("width", [1280, 420])
def test_everything_can_be_seen(browser: webdriver.Chrome, compiled: Compiled, width: int) -> None:
    opened(browser, compiled.path, width)
    figures = boxes(browser, "figure > svg")
    assert len(figures) == figures_of(compiled.manifest)
    parts = figures + boxes(browser, "h1, h2, h3, p, .wide, pre, figcaption")
    for left, top, right, bottom, visible in figures:
        assert visible
        assert right - left > 250
        assert 180 < bottom - top < 700
    for index, box in enumerate(parts):
        assert box[0] >= 0
        assert box[2] <= width, "nothing sticks out of the page"
        assert not any(overlap(box, other) for other in parts[:index])
    for labels in browser.execute_script(LABELS):
        assert len(labels) >= 6, "ticks and axes are named"
        for index, label in enumerate(labels):
            assert label[5], f"{label[4]} sticks out of its figure"
            assert not any(overlap(label, other) for other in labels[:index]), label[4]


def test_nothing_is_fetched_and_nothing_complains(browser: webdriver.Chrome, compiled: Compiled) -> None:
    opened(browser, compiled.path)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [(compiled.path / "report.html").as_uri()]
    assert (compiled.path / "report.html").stat().st_size < LARGEST


def test_a_figure_is_the_same_every_time() -> None:
    def drawn() -> str:
        return svg("name", "what it shows", lambda axes: axes.scatter([0, 1], [1, 2]))

    assert drawn() == drawn()
    assert 'aria-label="what it shows"' in drawn()
    assert "metadata" not in drawn()


def test_ids_are_unique_and_what_is_referred_to_is_there(compiled: Compiled) -> None:
    page = (compiled.path / "report.html").read_text()
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len({*ids})
    assert {*re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', page)} <= {*ids}


def test_the_tables_are_of_the_artifact(browser: webdriver.Chrome, compiled: Compiled) -> None:
    opened(browser, compiled.path)
    tables, manifest = browser.execute_script(TABLES), compiled.manifest
    seen = manifest.evaluation
    headings = [e.text for e in browser.find_elements("css selector", "h1, h2, h3")]
    assert headings == [
        "DigitsResNet, with early exits", "Side by side", "What is risked", "What a tolerance buys", "Exit by exit",
        "Against the threshold", "Reliability", "Where exit and backbone differ", "Effect on accuracy",
        "As offramp inspect prints it", "How it was made",
    ]  # fmt: skip
    _, plain, ours = tables["models"]
    assert plain[2:6] == [human(seen.flops_backbone), "0.0 %", "0.00 %", "0.00 %"]
    assert ours[2:7] == [
        human(seen.flops), percent(1 - seen.flops / seen.flops_backbone), percent(seen.disagreement, 2),
        percent(seen.regret, 2), percent(seen.accuracy, 2),
    ]  # fmt: skip
    assert seen.accuracy is not None
    assert seen.accuracy_backbone is not None
    assert ours[7] == f"{(seen.accuracy - seen.accuracy_backbone) * 100:+.2f}"
    values = [row[1] for row in tables["risks"][1:]]
    assert values == [
        percent(seen.disagreement, 2), percent(seen.regret, 2), percent(seen.accuracy_backbone - seen.accuracy, 2)
    ]  # fmt: skip
    assert [row[2] for row in tables["risks"][1:3]] == [RISKS[r].assumption for r in ("disagreement", "regret")]
    assert [row[0].removesuffix(" (default)") for row in tables["dial"][1:]] == [
        percent(plan.tolerance, 2) for plan in manifest.plans
    ]
    pre = browser.find_element("tag name", "pre").text.replace("\u00a0", " ")
    assert [line.rstrip() for line in pre.splitlines()] == [line.rstrip() for line in render(manifest).splitlines()]


def test_the_default_plan_by_the_records_is_that_of_the_program(browser: webdriver.Chrome, compiled: Compiled) -> None:
    """The dial and the categories are judged by the records, the manifest by the eager run."""
    opened(browser, compiled.path)
    tables, seen = browser.execute_script(TABLES), compiled.manifest.evaluation
    head, *rows = tables["dial"]
    default = dict(zip(head, next(row for row in rows if "(default)" in row[0]), strict=True))
    assert default["disagreement"] == percent(seen.disagreement, 2)
    assert default["regret"] == percent(seen.regret, 2)
    assert default["compute saved"] == percent(1 - seen.flops / seen.flops_backbone)
    *exits, whole = [[int(cell) for cell in row[1:7]] for row in tables["categories"][1:]]
    assert [sum(column) for column in zip(*exits, strict=True)] == whole
    assert [row[0] for row in exits] == [round(e.exit_rate * seen.rows) for e in seen.exits[:-1]]
    leave, both, same, lost, won, apart = whole
    assert leave == both + same + lost + won + apart
    assert lost + won + apart == round(seen.disagreement * seen.rows)
    assert seen.accuracy is not None
    assert seen.accuracy_backbone is not None
    assert won - lost == round((seen.accuracy - seen.accuracy_backbone) * seen.rows)
    assert tables["categories"][-1][7] == f"{(won - lost) / seen.rows * 100:+.2f}"


def test_every_candidate_has_what_decides_savings(browser: webdriver.Chrome, compiled: Compiled) -> None:
    opened(browser, compiled.path)
    with np.load(compiled.path / "records.npz", allow_pickle=False) as records:
        agrees = records["test_agrees"]
        temperatures = records["temperatures"]
    head, *rows = browser.execute_script(TABLES)["candidates"]
    assert len(rows) == agrees.shape[1]
    found = [dict(zip(head, row, strict=True)) for row in rows]
    assert [f["agreement of all rows"] for f in found] == [percent(float(a), 2) for a in agrees.mean(0)]
    assert [f["temperature"] for f in found] == [f"{t:.3g}" for t in temperatures]
    assert [f["exit"] for f in found if f["exit"] != "-"] == [str(i) for i in range(len(compiled.manifest.exits) - 1)]
    for each in found:
        assert each["AUROC"] == "-" or 0 <= float(each["AUROC"]) <= 1
        assert re.fullmatch(r"\d+\.\d\d %", each["ECE before"])
        assert re.fullmatch(r"\d+\.\d\d %", each["ECE after"])


def small_model(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


@pytest.fixture(scope="module")
def beside(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """No labels, a static model to compare with, and times."""
    out = tmp_path_factory.mktemp("beside") / "artifact"
    options = dataclasses.replace(QUICK, batches=(1, 8), rounds=2, policy="certified", tolerance=0.1)
    return out, compile(
        digits.model, digits.images, out, options=options, static=small_model(), static_name="one layer"
    )


def test_a_static_model_has_a_row(browser: webdriver.Chrome, digits: Digits, beside: tuple[Path, Manifest]) -> None:
    out, manifest = beside
    static = manifest.evaluation.static
    assert static is not None
    assert (static.name, static.parameters, static.flops, static.accuracy) == ("one layer", 650, 1280.0, None)
    test = split_rows(len(digits.images), 0).test
    with torch.no_grad():
        images = torch.from_numpy(digits.images[test])
        differs = small_model()(images).argmax(1) != digits.model(images).argmax(1)
    assert static.disagreement == pytest.approx(float(differs.double().mean()))
    assert "one layer saves" in render(manifest)
    opened(browser, out)
    row = browser.execute_script(TABLES)["models"][3]
    assert row[:3] == ["static (one layer)", "650", "1.28 k"]
    assert row[4:6] == [percent(static.disagreement, 2), percent(static.regret, 2)]


def test_without_labels_only_the_bound_is_shown(browser: webdriver.Chrome, beside: tuple[Path, Manifest]) -> None:
    out, manifest = beside
    opened(browser, out)
    text = browser.find_element("tag name", "body").text
    assert "true effect" not in text
    assert "true accuracy drop" not in text
    tables = browser.execute_script(TABLES)
    assert tables["categories"][0][2:4] == ["agree", "disagree"]
    seen = manifest.evaluation
    assert int(tables["categories"][-1][3]) == round(seen.disagreement * seen.rows)
    assert "time saved, batch 8" in tables["dial"][0]
    shaded = [p for p in manifest.plans if p.certificate is not None]
    assert shaded
    head, *rows = tables["dial"]
    bounds = [row[head.index("certified bound")] for row in rows]
    assert [b != "-" for b in bounds] == [p.certificate is not None for p in manifest.plans]


def test_an_artifact_without_exits_says_so(browser: webdriver.Chrome, digits: Digits, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, policy="certified", tolerance=0.0)
    manifest = compile(digits.model, digits.images, tmp_path / "out", labels=digits.labels, options=options)
    assert len(manifest.exits) == 1
    opened(browser, tmp_path / "out")
    assert "No exit was chosen" in browser.find_element("tag name", "body").text
    assert len(boxes(browser, "figure > svg")) > 2, "the candidates are drawn instead"
    assert browser.get_log("browser") == []


class Elsewhere(nn.Module):
    """Reads rows of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(7, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.only(x)


class TwoAnswers(nn.Module):
    """Scores beside others of the same shape."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.model(x)
        return {"scores": scores, "others": scores.flip(1)}


@pytest.mark.parametrize("static", [TwoAnswers(small_model()), small_model()])
def test_what_is_said_of_the_outputs_holds_for_the_static_model_if_it_must(digits: Digits, static: nn.Module) -> None:
    options = dataclasses.replace(QUICK, signature=Signature(output="scores"))
    ready = prepare(TwoAnswers(digits.model), digits.images, options=options, static=static)
    assert ready.static is not None
    assert ready.static.classes == 10


@pytest.mark.parametrize(
    ("static", "error", "says"),
    [
        (small_model(9), ModelError, "static Sequential answers 9 classes, DigitsResNet 10; compare with a model"),
        (Elsewhere(), InputError, "static Elsewhere does not run on the data"),
    ],
)
def test_an_unfit_static_model_is_refused_before_training(
    digits: Digits, static: nn.Module, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        prepare(digits.model, digits.images, options=QUICK, static=static)
