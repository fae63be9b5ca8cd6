"""NNI's tuners as engines: in this process, by ask and tell. Importing this module imports NNI."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import nni
import numpy as np
from nni.algorithms.hpo.evolution_tuner import EvolutionTuner
from nni.algorithms.hpo.gridsearch_tuner import GridSearchTuner
from nni.algorithms.hpo.random_tuner import RandomTuner
from nni.algorithms.hpo.tpe_tuner import TpeTuner

from ..heads import Space
from .engine import Engine, Proposal, check_space

_POPULATION = 8  # NNI's own default, 32, is more than a search of heads asks for


class _SeededEvolution(EvolutionTuner):  # type: ignore[misc]  # NNI has no types
    """NNI's draws its first population from a generator it seeds itself; this one keeps to ours."""

    def __init__(self, seed: int) -> None:
        self._seeded = np.random.RandomState(seed)
        super().__init__(optimize_mode="maximize", population_size=_POPULATION)

    def generate_parameters(self, parameter_id: int, **more: Any) -> Any:
        """NNI's refuses more at a time than its population; a wave asks for all its heads before one is told."""
        if not self.population:
            self._random_generate_individual()
        return super().generate_parameters(parameter_id, **more)

    @property
    def random_state(self) -> np.random.RandomState:
        return self._seeded

    @random_state.setter
    def random_state(self, value: object) -> None:
        """NNI sets its own in passing."""


_TUNERS: dict[str, Callable[[int], Any]] = {
    "tpe": lambda seed: TpeTuner(optimize_mode="maximize", seed=seed),
    "evolution": _SeededEvolution,
    "random": lambda seed: RandomTuner(seed=seed),
    "grid": lambda seed: GridSearchTuner(),
}


class NniEngine:
    """One of NNI's tuners behind the protocol of `Engine`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def start(self, space: Space, seed: int) -> None:
        """See `Engine`."""
        check_space(space)
        self._random = random.Random(seed)
        self._count = itertools.count()
        with self._alone():
            self._tuner = _TUNERS[self._name](seed)
            self._tuner.update_search_space({key: dict(entry) for key, entry in space.items()})

    def ask(self) -> Proposal | None:
        """See `Engine`; None when a grid is used up."""
        index = next(self._count)
        with self._alone():
            try:
                choices = self._tuner.generate_parameters(index)
            except nni.NoMoreTrialError:
                return None
        return Proposal(index, {key: v.item() if isinstance(v, np.generic) else v for key, v in choices.items()})

    def tell(self, proposal: Proposal, score: float) -> None:
        """See `Engine`."""
        with self._alone():
            self._tuner.receive_trial_result(proposal.index, dict(proposal.choices), float(score))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Within, Python's own generator is ours, for some tuners draw from it; and NNI logs nothing."""
        outside, disabled = random.getstate(), logging.root.manager.disable
        random.setstate(self._random.getstate())
        logging.disable(logging.INFO)
        try:
            yield
        finally:
            self._random.setstate(random.getstate())
            random.setstate(outside)
            logging.disable(disabled)


def nni_engine(name: str) -> Callable[[], Engine]:
    """Name of a tuner -> what makes a fresh engine of it."""
    return functools.partial(NniEngine, name)
