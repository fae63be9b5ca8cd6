"""Engines propose points of a space, seeded, and the one to fall back on needs no NNI."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable

import pytest

from offramp.compiler.heads import FAMILIES, Space, search_space
from offramp.compiler.search import ENGINES, Engine, Proposal, RandomEngine, check_space, make_engine
from offramp.runtime.errors import UsageError

SPACE: Space = {
    "layers": {"_type": "choice", "_value": [0, 1, 2, 3]},
    "kind": {"_type": "choice", "_value": ["plain", "separable"]},
    "rate": {"_type": "loguniform", "_value": [1e-3, 1e-1]},
}


def asked(make: Callable[[], Engine], seed: int, count: int = 12) -> list[Proposal]:
    engine = make()
    engine.start(SPACE, seed)
    found = []
    for _ in range(count):
        proposal = engine.ask()
        assert proposal is not None
        found.append(proposal)
        engine.tell(proposal, float(proposal.choices["layers"]))
    return found


@pytest.mark.parametrize("name", ENGINES)
def test_proposals_lie_in_the_space_and_follow_the_seed(name: str) -> None:
    make = make_engine(name)
    state = random.getstate()
    first, again, other = asked(make, 1), asked(make, 1), asked(make, 2)
    assert random.getstate() == state, "nobody else's random numbers move"
    assert first == again
    assert name == "grid" or first != other
    for proposal in first:
        assert set(proposal.choices) == set(SPACE)
        assert proposal.choices["layers"] in SPACE["layers"]["_value"]
        assert proposal.choices["kind"] in SPACE["kind"]["_value"]
        assert 1e-3 <= proposal.choices["rate"] <= 1e-1
    assert [p.index for p in first] == list(range(len(first)))


def test_what_it_hears_draws_tpe_to_what_is_good() -> None:
    found = asked(make_engine("tpe"), 0, 80)
    early, late = (sum(p.choices["layers"] for p in part) for part in (found[:20], found[-20:]))
    assert late > early + 10, "the score is the number of layers"


def test_a_grid_without_ranges_ends() -> None:
    engine = make_engine("grid")()
    engine.start({"kind": SPACE["kind"]}, 0)
    assert [engine.ask() is None for _ in range(3)] == [False, False, True]


def test_without_nni_the_built_in_sampler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nni", None)
    monkeypatch.delitem(sys.modules, "offramp.compiler.search.nni_engine", raising=False)
    lines: list[str] = []
    assert make_engine("tpe", lines.append) is RandomEngine
    assert len(lines) == 1
    assert "the built-in random sampler searches instead of tpe" in lines[0]


@pytest.mark.parametrize("kind", ["randint", "uniform", "loguniform", "quniform", "qloguniform"])
def test_the_built_in_sampler_draws_every_kind(kind: str) -> None:
    engine = RandomEngine()
    value = [1, 9, 2] if kind.startswith("q") else [1, 9]
    engine.start({"x": {"_type": kind, "_value": value}}, 0)
    drawn = [engine.ask().choices["x"] for _ in range(50)]
    assert all(1 <= x <= 9 for x in drawn)
    assert len(set(drawn)) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_space_is_sound(family: str) -> None:
    check_space(search_space(family))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, "is empty"),
        ({"x": [1, 2]}, "x: write"),
        ({"x": {"_type": "sometimes", "_value": [1]}}, "x: write"),
        ({"x": {"_type": "choice", "_value": []}}, "x: choice wants a list"),
        ({"x": {"_type": "quniform", "_value": [0, 1]}}, "x: quniform wants a list of 3"),
        ({"x": {"_type": "uniform", "_value": [2, 1]}}, "no range for uniform"),
        ({"x": {"_type": "uniform", "_value": [0.1, math.inf]}}, "no range for uniform"),
        ({"x": {"_type": "uniform", "_value": [math.nan, 1]}}, "no range for uniform"),
        ({"x": {"_type": "quniform", "_value": [0.01, 0.03, 0]}}, "no range for quniform"),
        ({"x": {"_type": ["choice"], "_value": [1]}}, "with a type of choice"),
        ({"x": {"_type": "loguniform", "_value": [0, 1]}}, "no range for loguniform"),
        ({"x": {"_type": "uniform", "_value": ["a", "b"]}}, "no range for uniform"),
    ],
)
def test_a_space_that_is_none_is_refused(space: Space, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_space(space)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UsageError, match="search engine 'oracle' is unknown; use one of tpe"):
        make_engine("oracle")


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "grid"])
def test_a_wave_asks_for_many_heads_before_one_is_told(name: str) -> None:
    engine = make_engine(name)()
    engine.start(search_space("conv"), 0)
    proposals = [engine.ask() for _ in range(48)]
    for proposal in proposals:
        assert proposal is not None
        engine.tell(proposal, 0.1)
    assert engine.ask() is not None
