"""The table holds every figure the issue asks for, and stays readable."""

from __future__ import annotations

import dataclasses

import pytest
from tiny import Tiny

from offramp.runtime import Manifest, render
from offramp.runtime.table import at_most, bound, human, percent


def line(text: str, start: str) -> str:
    lines = [" ".join(part.split()) + " " for part in text.splitlines()]
    found = [part for part in lines if part.startswith(start)]
    assert len(found) == 1, (start, text)
    return found[0].strip()


def test_the_table_shows_every_figure(tiny: Tiny) -> None:
    text = render(tiny.manifest)
    assert line(text, "0 layer1.block0 one") == (
        "0 layer1.block0 one dense layer 40 80 40.0 % 0.5500 1.2 50.0 % 99.50 %"
    )
    assert line(text, "2 output the") == "2 output the backbone's own - - 100.0 % - 1 30.0 % 100.00 %"
    assert line(text, "disagreement") == "disagreement 0.60 % 95 % interval 0.27 % to 1.14 %"
    assert line(text, "accuracy") == "accuracy 92.60 % -> 92.50 % -0.10 points"
    assert line(text, "FLOPs per row") == (
        "FLOPs per row 1.00 k -> 760 saves 24.0 %; an oracle over these exits 50.0 %"
    )
    assert line(text, "static model") == "static model 600 smaller saves 40.0 %, disagreement 8.00 %, accuracy 88.00 %"
    assert line(text, "batch 1 ") == "batch 1 1.0000 0.9000 0.900 0.880 - 0.920 10.0 % 0.8500 1.060 1 9"
    assert line(text, "batch 32 ") == "batch 32 0.5000 0.3000 0.600 0.590 - 0.610 40.0 % - - 1 9"
    assert "tiny: 152 parameters, 1.00 k FLOPs per row, 5 classes" in text
    assert "tolerance 1.00 % of disagreement, policy certified: no more disagreement on new rows, wrong with" in text
    assert "(7 of 1,500 certification rows disagree; bound for this plan alone 0.88 %)" in text
    assert "On 1,500 held-out rows" in text


def test_lost_time_is_traced_to_its_stages(tiny: Tiny) -> None:
    text = render(tiny.manifest)
    # Batch 1 saved 10 % of the time for 24 % of the compute; batch 32 saved more time than compute.
    assert line(text, "stage ") == "stage up to rows compute time, batch 1"
    assert line(text, "0 layer1.block0 100") == "0 layer1.block0 100.0 % 48.0 % 40.0 %"
    assert line(text, "1 layer2.block0 50") == "1 layer2.block0 50.0 % 19.0 % 20.0 %"
    assert line(text, "2 output 30") == "2 output 30.0 % 9.0 % 25.0 %"
    assert line(text, "between the stages") == "between the stages 0.0 % 5.0 %"
    assert line(text, "whole") == "whole 76.0 % 90.0 %"


def changed(manifest: Manifest, **measured: object) -> Manifest:
    return dataclasses.replace(manifest, measured=dataclasses.replace(manifest.measured, **measured))  # type: ignore[arg-type]


def test_an_artifact_slower_than_the_model_says_what_to_do(tiny: Tiny) -> None:
    assert "Slower than" not in render(tiny.manifest)
    slow = tuple(dataclasses.replace(timing, ratio=1.01) for timing in tiny.manifest.measured.timings)
    text = render(changed(tiny.manifest, timings=slow))
    assert "Slower than the plain model at batch 1, 32: these exits were chosen by FLOPs" in text
    assert "--cost time --cost-batch 1," in text
    assert max(map(len, text.splitlines())) <= 120
    assert "Slower than" not in render(changed(tiny.manifest, timings=slow, chosen_by="batch 1, 2 threads"))


def test_what_is_not_known_is_left_out(tiny: Tiny) -> None:
    good = tuple(t for t in tiny.manifest.measured.timings if t.batch == 32)
    assert "where it went" not in render(changed(tiny.manifest, timings=good))
    assert "ms per row" not in render(changed(tiny.manifest, timings=()))
    seen = dataclasses.replace(tiny.manifest.evaluation, accuracy=None, static=None)
    unlabelled = render(dataclasses.replace(tiny.manifest, evaluation=seen))
    assert "accuracy" not in unlabelled
    assert "static" not in unlabelled
    quiet = dataclasses.replace(tiny.manifest, default_plan=1)
    assert " never " in line(render(quiet), "0 layer1.block0 one")


def test_long_names_keep_the_table_narrow(tiny: Tiny) -> None:
    long = "backbone.encoder.layers.11.attention.self.output.dense.activation"
    exits = tuple(dataclasses.replace(e, place=long, head=long) for e in tiny.manifest.exits)
    backbone = dataclasses.replace(tiny.manifest.backbone, name=long * 3)
    text = render(dataclasses.replace(tiny.manifest, exits=exits, backbone=backbone))
    assert max(map(len, text.splitlines())) <= 120
    assert "dense.activation" in text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.6, "1.00 k"),
        (1000, "1.00 k"),
        (41_234_567, "41.2 M"),
        (999_960, "1.00 M"),
        (2.5e9, "2.50 G"),
        (1.5e12, "1.50 T"),
        (123.4, "123"),
        (0.5, "0.50"),
    ],
)
def test_numbers_are_human(number: float, text: str) -> None:
    assert human(number) == text


def test_shares_are_percent() -> None:
    assert (percent(0.1234), percent(0.1234, 2), percent(None)) == ("12.3 %", "12.34 %", "-")


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [
        (0.05, 0, "5 %"),
        (0.025, 0, "2.5 %"),
        (0.001, 0, "0.1 %"),
        (0.07, 0, "7 %"),
        (0.00004, 2, "0.004 %"),
        (0.01, 2, "1.00 %"),
    ],
)
def test_a_bound_is_not_rounded_to_less(share: float, digits: int, text: str) -> None:
    assert at_most(share, digits) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0087, "0.87 %"), (0.008_701, "0.88 %"), (0.07, "7.00 %"), (0.0, "0.00 %")]
)
def test_an_upper_bound_is_rounded_up(share: float, text: str) -> None:
    assert bound(share) == text
