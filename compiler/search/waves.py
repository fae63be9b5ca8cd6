"""The search: waves of trials, all of a wave on one stream, the better half of each candidate's going on.

    wave 1   the default head of every candidate, and what the engine proposes without having heard anything
             all learn for half of the epochs; each is scored on the selection rows; the worse half is dropped
             the rest learn to the end and are scored again; the engine is told how much better than the
             default head each was
             of the candidates half go on, those whose best heads save most together; never fewer than the shortlist
    wave 2   ... proposals that know of wave 1; the same rows, augmented the same way, are read from disk
    last     the shortlist, by the same rule

A family has one engine for all its candidates: its space speaks of shares of compute, so what is learned at one depth
tells of another. Where several families read a value, a person's own among them, they propose in turn. Interrupted
after an epoch, the search goes on from its checkpoint: engines are asked and told again what they were, which costs
nothing, and the trials of the wave under way are restored.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp.passes import Backbone, Candidate
from offramp.runtime.data import Rows
from offramp.runtime.errors import UsageError
from offramp.runtime.selection import Costs, Records

from ..checkpoint import load_state, make_folder, save_state
from ..distill import fresh_head, job_fingerprint
from ..heads import FAMILIES, HeadConfig, Space, search_space
from ..kept import Kept
from ..learner import Learner
from ..progress import bar
from ..stream import Stream, mix
from ..training import Training
from .engine import ENGINES, Engine, Proposal, check_space, make_engine
from .objective import shortlist
from .trial import Answers, Place, Trial, better_half, learning_rate, places, score

NONE = "none"
CHECKPOINT = "search.pt"


@dataclass(frozen=True)
class Search:
    """How heads are searched; `engine` "none" takes the default heads."""

    engine: str = NONE
    trials: int = 4  # per candidate, beside its default head
    waves: int = 2
    epochs: int = 4  # that the better half of a wave learns for
    shortlist: int = 8  # candidates that stay, to be trained to the end
    spaces: Mapping[str, Space] = field(default_factory=dict)  # by family, in place of the family's own

    def __post_init__(self) -> None:
        if self.engine not in (NONE, *ENGINES):
            raise UsageError(f"search engine {self.engine!r} is unknown; use one of {', '.join((NONE, *ENGINES))}")
        if not 1 <= self.waves <= self.trials:
            raise UsageError(f"{self.trials} trials in {self.waves} waves; give 1 wave or more, and a trial for each")
        if self.epochs < 2:
            raise UsageError(
                f"{self.epochs} epochs of search; give 2 or more, for half of them come before the halving"
            )
        if self.shortlist < 1:
            raise UsageError(f"a shortlist of {self.shortlist} candidates; give 1 or more")
        for name, space in self.spaces.items():
            if name not in FAMILIES:
                raise UsageError(f"search space for head family {name!r}, which is none of {', '.join(FAMILIES)}")
            check_space(space)
            if missing := set(FAMILIES[name].space) - set(space):
                raise UsageError(
                    f"search space of {name} lacks {', '.join(sorted(missing))}; start from `offramp space`"
                )


@dataclass(frozen=True, eq=False)
class Best:
    """The best head of a candidate so far."""

    score: float
    price: float  # its share of the backbone's compute
    answers: Answers


@dataclass(frozen=True)
class Found:
    """The head of every candidate, by candidate name, which candidates to go on with, what was tried on the way."""

    configs: Mapping[str, HeadConfig]
    rates: Mapping[str, float]
    shortlist: tuple[str, ...]  # names, shallow to deep
    trials: tuple[Mapping[str, Any], ...]  # see `Trial.record`
    best: Mapping[str, Best] = field(default_factory=dict, compare=False)  # of every candidate, by its name


def search_heads(
    backbone: Backbone,
    candidates: Sequence[Candidate],
    data: Rows,
    *,
    learn: np.ndarray,
    select: np.ndarray,
    tolerance: float,
    search: Search,
    training: Training,
    seed: int,
    folder: Path,
    report: Callable[[str], None] = lambda line: None,
) -> Found:
    """The best head found for every candidate.

    `learn` are the row indices that heads learn from, `select` those that score them. In `folder` lie the checkpoint
    and, while the search runs, kept values. Same arguments, same heads, interrupted or not.
    """
    stream = training.stream(backbone, candidates, data, seed)
    return _Searcher(stream, learn, select, tolerance, search, training, folder, report).run()


def shortlist_over(
    backbone: Backbone, candidates: Sequence[Candidate], found: Sequence[Found], tolerance: float, limit: int
) -> tuple[str, ...]:
    """Of what several searches would go on with the `limit` that save most together; names, shallow to deep."""
    best = {name: one.best[name] for one in found for name in one.shortlist}
    spots = [place for place in places(backbone, candidates) if place.candidate.name in best]
    kept = _best_together(spots, [best[place.candidate.name] for place in spots], tolerance, limit)
    return tuple(place.candidate.name for place in kept)


def _best_together(spots: Sequence[Place], best: Sequence[Best], tolerance: float, limit: int) -> list[Place]:
    depths = [place.candidate.flops_before / place.total if place.total else 0.0 for place in spots]
    said = Records(
        np.column_stack([b.answers.confidence for b in best]), np.column_stack([b.answers.agrees for b in best])
    )
    price = Costs(np.diff([0.0, *depths, 1.0]), np.array([b.price for b in best]))
    return [spots[i] for i in shortlist(said, price, tolerance, limit)]


class _Searcher:
    """The state of one search: engines, finished waves, and the wave under way."""

    def __init__(
        self,
        stream: Stream,
        learn: np.ndarray,
        select: np.ndarray,
        tolerance: float,
        search: Search,
        training: Training,
        folder: Path,
        report: Callable[[str], None],
    ) -> None:
        self.stream, self.learn, self.select, self.tolerance = stream, learn, select, tolerance
        self.search, self.training, self.folder, self.report = search, training, folder, report
        self.seed = stream.seed
        self.places = places(stream.backbone, stream.candidates)
        self.open = list(self.places)  # where the next wave tries heads
        self.opened: list[list[int]] = []  # by wave, candidates it tried heads at
        self.batches = len(stream.shuffled(learn, 0))  # of every epoch
        self.halfway = search.epochs // 2
        self.finished: list[list[dict[str, Any]]] = []  # records by wave
        self.baselines: dict[tuple[int, int], float] = {}  # (candidate, epochs) -> the default head's score
        self.best: dict[int, Best] = {}  # by candidate, of those that learned to the end
        self.fingerprint = self._fingerprint()

    def run(self) -> Found:
        make_folder(self.folder)
        self.engines = self._started()
        under_way = self._resume()
        kept = Kept(self.stream, self.folder / "values", self.training.kept_bytes)
        try:
            for wave in range(len(self.finished), self.search.waves):
                trials = self._proposed(wave)
                self._learn(trials, kept, under_way)
                under_way = None
                self._finish(trials)
                self._close()
                self._save(None)
        finally:
            kept.close()
        return self._found()

    def _started(self) -> dict[str, Engine]:
        make = make_engine(self.search.engine, self.report)
        engines = {}
        for index, family in enumerate(dict.fromkeys(f for place in self.places for f in place.families)):
            engines[family] = make()
            engines[family].start(self.search.spaces.get(family, search_space(family)), mix(self.seed, index) % 2**31)
        return engines

    def _resume(self) -> Mapping[str, Any] | None:
        """Bring engines and records to where the checkpoint left them -> the wave that was under way, if one was."""
        state = load_state(self.folder / CHECKPOINT, self.fingerprint)
        if state is None:
            return None
        for records, tried in zip(state["finished"], state["opened"], strict=False):
            self.open = [self.places[index] for index in tried]
            trials = self._proposed(len(self.finished))
            for trial, record in zip(trials, records, strict=True):
                trial.scores = record["scores"]
            self._finish(trials)
        self.opened = [*state["opened"][: len(self.finished)]]
        self.open = [self.places[index] for index in state["open"]]
        for index, best in state["best"].items():
            said = Answers(best["confidence"].numpy(), best["agrees"].numpy())
            self.best[index] = Best(best["score"], best["price"], said)
        under_way: Mapping[str, Any] | None = state["wave"]
        epochs = f" and {under_way['epoch']} epochs" if under_way else ""
        self.report(f"search goes on after {len(self.finished)} waves{epochs}")
        return under_way

    def _proposed(self, wave: int) -> list[Trial]:
        """The trials of a wave. Asked again after a restart, the engines propose the same."""
        count, more = divmod(self.search.trials, self.search.waves)
        trials = []
        for place in self.open:
            proposals: list[tuple[str, Proposal | None]] = [(place.families[0], None)] if wave == 0 else []
            turns = itertools.islice(itertools.cycle(place.families), count + (wave < more))
            asked = ((family, self.engines[family].ask()) for family in turns)
            proposals += [(family, proposal) for family, proposal in asked if proposal is not None]
            trials += [self._trial(place, *proposal, wave * 1000 + i) for i, proposal in enumerate(proposals)]
        return trials

    def _trial(self, place: Place, family: str, proposal: Proposal | None, number: int) -> Trial:
        config = place.config(family, proposal)
        training, steps = self.training, self.batches * self.search.epochs
        rate = learning_rate(proposal, training.learning_rate)
        module = fresh_head(config, place.shape, place.classes, mix(mix(self.seed, place.index), number))
        learner = Learner(module, steps, rate, training, self.stream.features)
        after = place.candidate.flops_after / place.total if place.total else 0.0
        return Trial(place.index, config, rate, proposal, learner, after, place.price(config))

    def _learn(self, trials: Sequence[Trial], kept: Kept, under_way: Mapping[str, Any] | None) -> None:
        """Take a wave from its first epoch, or from where it was left, to its last."""
        alive, first = list(trials), 0
        if under_way is not None:
            alive, first = restored(trials, under_way["trials"]), int(under_way["epoch"])
        for epoch in range(first, self.search.epochs):
            self._learn_epoch(epoch, alive, kept)
            if epoch + 1 in (self.halfway, self.search.epochs):
                score(alive, kept.plain("select", self.select), self.tolerance, epoch + 1)
            if epoch + 1 == self.halfway:
                alive = better_half(alive)
            if epoch + 1 == self.search.epochs:
                self._remember(alive)
            self._save({"epoch": epoch + 1, "trials": states(trials, alive)})

    def _learn_epoch(self, epoch: int, alive: Sequence[Trial], kept: Kept) -> None:
        for trial in alive:
            trial.learner.module.train()
        where = f"wave {len(self.finished) + 1}/{self.search.waves} epoch {epoch + 1}/{self.search.epochs}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self.seed, epoch + 3_000_003))
            for observed in bar(kept.epoch(self.learn, epoch), f"search {where}, {len(alive)} heads", self.batches):
                for trial in alive:
                    trial.learner.learn(observed.target, observed.values[trial.candidate], observed.hint)
                observed.values.clear()

    def _finish(self, trials: Sequence[Trial]) -> None:
        """Tell the engines by how much each trial beat its candidate's default head after as many epochs."""
        for trial in trials:
            if trial.proposal is None:
                self.baselines.update(((trial.candidate, epochs), found) for epochs, found in trial.scores.items())
        for trial in trials:
            if trial.proposal is not None:
                gain = trial.score - self.baselines[trial.candidate, trial.epochs]
                self.engines[trial.config.family].tell(trial.proposal, gain)
        self.finished.append([trial.record() for trial in trials])

    def _close(self) -> None:
        """After a wave: fewer candidates."""
        self.opened.append([place.index for place in self.open])
        last = len(self.finished) == self.search.waves
        limit = self.search.shortlist if last else max(self.search.shortlist, -(-len(self.open) // 2))
        best = [self.best[place.index] for place in self.open]
        self.open = _best_together(self.open, best, self.tolerance, limit)

    def _remember(self, trials: Sequence[Trial]) -> None:
        """What the best head of every candidate said of the selection rows."""
        for trial in trials:
            before = self.best.get(trial.candidate)
            if trial.answers is not None and (before is None or trial.score > before.score):
                self.best[trial.candidate] = Best(trial.score, trial.price, trial.answers)

    def _found(self) -> Found:
        """Of those that learned to the end the best at every candidate; of equals the earlier, the default first."""
        records = [record for wave in self.finished for record in wave]
        configs, rates, other = {}, {}, 0
        for place in self.places:
            whole = [r for r in records if r["candidate"] == place.index and self.search.epochs in r["scores"]]
            best = max(whole, key=lambda r: r["scores"][self.search.epochs])
            configs[place.candidate.name] = HeadConfig(best["family"], best["settings"])
            rates[place.candidate.name] = best["rate"]
            other += not best["default"]
        self.report(
            f"searched {len(records)} heads at {len(self.places)} candidates; {other} take another than the default one"
        )
        kept = tuple(place.candidate.name for place in self.open)
        if len(kept) < len(self.places):
            self.report(f"{len(kept)} of {len(self.places)} candidates go on, those whose exits save most together")
        told = {self.places[index].candidate.name: best for index, best in self.best.items()}
        return Found(configs, rates, kept, tuple(records), told)

    def _fingerprint(self) -> str:
        """What the checkpoint belongs to: everything the search is asked to do."""
        told = (
            asdict(self.search),
            # Trials have epochs of their own, and none stops early.
            asdict(replace(self.training, augment=None, epochs=1, patience=None)),
            self.seed,
            self.tolerance,
            sorted(FAMILIES),
        )
        digest = hashlib.sha256(job_fingerprint(self.stream, self.learn, self.select).encode())
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
        digest.update(repr([place.candidate.name for place in self.places]).encode())
        return digest.hexdigest()

    def _save(self, under_way: Mapping[str, Any] | None) -> None:
        best = {i: {"score": b.score, "price": b.price, **b.answers.state()} for i, b in self.best.items()}
        state: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "finished": self.finished,
            "wave": under_way,
            "best": best,
        }
        state.update({"open": [place.index for place in self.open], "opened": self.opened})
        save_state(state, self.folder / CHECKPOINT)


def states(trials: Sequence[Trial], alive: Sequence[Trial]) -> list[dict[str, Any]]:
    """What `restored` needs of every trial."""
    return [{"scores": dict(t.scores), "learner": t.learner.state() if t in alive else None} for t in trials]


def restored(trials: Sequence[Trial], kept: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Trials made anew, in place as they were -> those that were still learning."""
    alive = []
    for trial, state in zip(trials, kept, strict=True):
        trial.scores = dict(state["scores"])
        if state["learner"] is not None:
            trial.learner.restore(state["learner"])
            alive.append(trial)
    return alive
