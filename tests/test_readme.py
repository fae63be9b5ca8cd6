"""The README tells the truth: its figures are those the benchmarks wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cifar10_resnet import RESULTS, table

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(name: str) -> str:
    return README.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def test_the_cifar10_table_is_the_one_the_benchmark_wrote() -> None:
    results = json.loads(RESULTS.read_text())["results"]
    assert block("cifar10_resnet") == table(results)


@pytest.mark.parametrize("target", ["demo", "test", "bench"])
def test_every_make_target_the_readme_names_exists(target: str) -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert f"make {target}" in README
    assert f"\n{target}:" in makefile
