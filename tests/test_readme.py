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


@pytest.mark.parametrize("name", ["heads", "search_cost"])
def test_the_tables_of_heads_are_those_the_benchmarks_wrote(name: str) -> None:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    assert block(name) == benchmark.table(json.loads(benchmark.RESULTS.read_text())["results"])


@pytest.mark.parametrize("target", ["demo", "test", "bench"])
def test_every_make_target_the_readme_names_exists(target: str) -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert f"make {target}" in README
    assert f"\n{target}:" in makefile
