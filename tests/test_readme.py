"""The README tells the truth: its figures are those the benchmarks wrote."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.cifar10_resnet import RESULTS, spread_table, stage_table, table

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(name: str) -> str:
    return README.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def test_the_cifar10_tables_are_those_the_benchmark_wrote() -> None:
    written = json.loads(RESULTS.read_text())
    assert block("cifar10_resnet") == table(written["results"])
    assert block("cifar10_splits") == spread_table(written["splits"])
    assert block("cifar10_stages") == stage_table([r for r in written["results"] if r["policy"] == "certified"])


BLOCKS = {  # README block: the benchmark, and what it writes the block of its results with
    "heads": ("heads", "table"), "aims": ("heads", "aims_table"),
    "search_cost": ("search_cost", "table"), "tuned": ("tuned", "table"),
    "variants": ("variants", "table"), "ablation": ("ablation", "table"), "thresholds": ("thresholds", "table"),
    "equal_risk": ("thresholds", "equal_risk_table"), "whole_compile": ("whole_compile", "line"),
    "single_file": ("single_file", "table"),
    "speed": ("speed", "tables"), "footprint": ("footprint", "line"), "precision": ("precision", "table"),
    "serve": ("serve", "table"), "cache_trace": ("cache_trace", "table"),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_are_those_the_benchmarks_wrote(name: str) -> None:
    module, writer = BLOCKS[name]
    benchmark = importlib.import_module(f"benchmarks.{module}")
    if not benchmark.RESULTS.is_file():
        assert block(name) == f"*Not measured yet: `python -m benchmarks.{module}`.*"
        return
    told = json.loads(benchmark.RESULTS.read_text())
    assert block(name) == getattr(benchmark, writer)(told.get("results", told))


@pytest.mark.parametrize("target", ["demo", "test", "bench", "wheels"])
def test_every_make_target_the_readme_names_exists(target: str) -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert f"make {target}" in README
    assert f"\n{target}:" in makefile
