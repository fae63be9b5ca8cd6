"""Engines: what proposes heads. Three methods, so another one is one small file.

    engine.start(space, seed)      a search space in NNI's JSON form
    proposal = engine.ask()        one value for every key; None when the space is used up
    engine.tell(proposal, score)   how good it was, more is better

NNI's tuners (`nni_engine`) and a sampler of our own that takes over where NNI cannot be imported.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from offramp.runtime.errors import UsageError

from ..heads import Space

NNI_ENGINES = ("tpe", "evolution", "random", "grid")
BUILT_IN = "built-in"
ENGINES = (*NNI_ENGINES, BUILT_IN)


@dataclass(frozen=True)
class Proposal:
    """One value for every key of the space; `index` counts what its engine was asked for."""

    index: int
    choices: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """Proposes points of a space and hears how good they were."""

    def start(self, space: Space, seed: int) -> None:
        """Begin anew on a space."""

    def ask(self) -> Proposal | None:
        """A point to try; None when there is none left. May be asked again before it is told."""

    def tell(self, proposal: Proposal, score: float) -> None:
        """The score of a point it proposed; more is better."""


class RandomEngine:
    """Draws every key on its own."""

    def start(self, space: Space, seed: int) -> None:
        """See `Engine`. Raises `UsageError` for a kind of entry this sampler does not know."""
        check_space(space)
        self._space = space
        self._generator = np.random.default_rng(seed)
        self._count = itertools.count()

    def ask(self) -> Proposal:
        """See `Engine`; never None."""
        choices = {key: _DRAWS[entry["_type"]](self._generator, entry["_value"]) for key, entry in self._space.items()}
        return Proposal(next(self._count), choices)

    def tell(self, proposal: Proposal, score: float) -> None:
        """What it hears does not change what it draws."""


def _uniform(generator: np.random.Generator, value: list[float]) -> float:
    return float(generator.uniform(value[0], value[1]))


def _loguniform(generator: np.random.Generator, value: list[float]) -> float:
    return float(np.exp(generator.uniform(np.log(value[0]), np.log(value[1]))))


_DRAWS: Mapping[str, Callable[[np.random.Generator, list[Any]], Any]] = {
    "choice": lambda generator, value: value[int(generator.integers(len(value)))],
    "randint": lambda generator, value: int(generator.integers(value[0], value[1])),
    "uniform": _uniform,
    "loguniform": _loguniform,
    "quniform": lambda g, value: float(np.clip(round(_uniform(g, value) / value[2]) * value[2], value[0], value[1])),
    "qloguniform": lambda g, v: float(np.clip(round(_loguniform(g, v) / v[2]) * v[2], v[0], v[1])),
}
_VALUES = {"randint": 2, "uniform": 2, "loguniform": 2, "quniform": 3, "qloguniform": 3}


def check_space(space: Space) -> None:
    """Raises `UsageError` for a space that is not NNI's JSON form, naming the key."""
    if not isinstance(space, Mapping) or not space:
        raise UsageError("the search space is empty or no mapping; see `offramp space` for its form")
    for key, entry in space.items():
        if not isinstance(entry, Mapping) or set(entry) != {"_type", "_value"} or entry["_type"] not in (*_DRAWS,):
            known = ", ".join(_DRAWS)
            raise UsageError(f'search space, {key}: write {{"_type": ..., "_value": [...]}} with a type of {known}')
        kind, value = entry["_type"], entry["_value"]
        if not isinstance(value, list) or len(value) != _VALUES.get(kind, max(1, len(value))):
            raise UsageError(f"search space, {key}: {kind} wants a list of {_VALUES.get(kind, '1 or more')} values")
        if kind != "choice":
            numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value)
            steps = numbers and all(step > 0 for step in value[2:])
            if not steps or value[0] >= value[1] or ("log" in kind and value[0] <= 0):
                raise UsageError(f"search space, {key}: {value} is no range for {kind}; give low, then high")


def read_spaces(path: Path) -> dict[str, Space]:
    """A file as `offramp space` prints it -> spaces by family. Raises `UsageError` for one that is not."""
    try:
        spaces = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); print one with `offramp space`") from error
    except ValueError as error:
        raise UsageError(f"{path}: is no JSON ({error}); print one with `offramp space`") from error
    if not isinstance(spaces, dict):
        raise UsageError(f"{path}: holds no spaces by head family; print some with `offramp space`")
    return spaces


def make_engine(name: str, say: Callable[[str], None] = lambda line: None) -> Callable[[], Engine]:
    """Name of an engine -> what makes a fresh one. Where NNI is missing, the built-in sampler, and one line.

    Raises `UsageError` for an unknown name.
    """
    if name not in ENGINES:
        raise UsageError(f"search engine {name!r} is unknown; use one of {', '.join(ENGINES)}")
    if name == BUILT_IN:
        return RandomEngine
    try:
        module = importlib.import_module(".nni_engine", __package__)
    except ImportError as error:
        say(f"NNI cannot be imported ({error}); the built-in random sampler searches instead of {name}")
        return RandomEngine
    maker: Callable[[], Engine] = module.nni_engine(name)
    return maker
