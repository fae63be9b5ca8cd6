"""What is loaded and evicted next, job by job, with no thread and a clock that is turned by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from host_help import CPU, STAGES, write_models
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.runtime.artifact import Artifact, open_artifact
from offramp.runtime.errors import ArtifactError, OfframpError, StorageError, UsageError
from offramp.runtime.execution import Stage
from offramp.runtime.serve.loader import Loaded, Loader
from offramp.runtime.serve.parts import Part, Slot
from offramp.runtime.serve.policies import POLICIES
from offramp.runtime.serve.shelf import REFUSAL, Evict, LoadPart, Refused, Shelf

GRACE = 2.0


class Bench:
    """A shelf with models of one part per stage, and what the loader thread would do."""

    def __init__(
        self,
        artifact: Artifact,
        stage: Stage,
        budget: int | None,
        sizes: Sequence[Sequence[int]],
        policy: str = "lru",
        file_bytes: int = 1,
    ) -> None:
        self.now = 0.0
        self.stage = stage
        self.shelf = Shelf(budget, POLICIES[policy], lambda: self.now, GRACE)
        self.sizes = sizes
        self.models = [
            [Part(f"m{m}", m, artifact, depth, [Slot(depth, file_bytes)]) for depth in range(len(own))]
            for m, own in enumerate(sizes)
        ]
        for parts in self.models:
            self.shelf.add(parts)

    def take(self, model: int, depth: int) -> Stage | None:
        part = self.models[model][depth]
        self.now += 0.001
        return self.shelf.take(part, part.slots[0])

    def give(self, model: int, depth: int) -> None:
        self.shelf.give(self.models[model][depth])

    def use(self, model: int, depth: int) -> None:
        """Take a stage that is there, and give it back."""
        assert self.take(model, depth) is not None
        self.give(model, depth)

    def load(self, model: int, depth: int) -> None:
        """Ask for a stage, do what that takes, and use it once."""
        assert self.take(model, depth) is None
        self.work()
        self.use(model, depth)

    def step(self, fail: bool = False) -> Evict | LoadPart | Refused | None:
        """One job of the loader."""
        job = self.shelf.poll()
        if isinstance(job, LoadPart):
            part = job.part
            if fail:
                self.shelf.failed(part, ArtifactError("altered"))
            else:
                size = self.sizes[part.version][part.depth]
                self.shelf.loaded(job, [Loaded(self.stage, size, 0.5)])
        return job

    def work(self) -> None:
        """All there is to do."""
        for _ in range(1000):
            if self.step() is None:
                return
        raise AssertionError("there is no end to it")

    def inside(self) -> set[tuple[int, int]]:
        """(model, depth) of what is in memory."""
        return {(p.version, p.depth) for parts in self.models for p in parts if p.loaded}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Stage]:
    artifact = open_artifact(write_models(tmp_path_factory.mktemp("shelf"), ["m"])["m"])
    return artifact, Loader(1, CPU)(artifact, 0).stage


def test_spare_room_takes_the_shallow_ones_first_and_nothing_goes(made: tuple[Artifact, Stage]) -> None:
    bench = Bench(*made, 55, [[10] * 3] * 2)
    order = [job.part for _ in range(5) if isinstance(job := bench.step(), LoadPart)]
    assert [(part.depth, part.version) for part in order] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    # Its file says 1 byte, so the last is tried; it takes more than is left, and goes itself.
    job, gone = bench.step(), bench.step()
    assert isinstance(job, LoadPart)
    assert isinstance(gone, Evict)
    assert gone.parts == [job.part]
    assert bench.step() is None
    assert bench.shelf.bytes() == 50


def test_what_did_not_fit_is_loaded_on_demand_for_the_least_recently_used(made: tuple[Artifact, Stage]) -> None:
    bench = Bench(*made, 50, [[10] * 3] * 2)
    bench.work()
    for model, depth in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        bench.use(model, depth)
    bench.load(1, 2)
    assert bench.inside() == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}
    bench.use(0, 1)
    bench.use(1, 2)
    bench.load(0, 2)  # its own (0, 1) was used before (1, 2), but stays while anything else can go
    assert bench.inside() == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)}


def test_earlier_stages_go_for_a_deep_one_of_the_same_model(made: tuple[Artifact, Stage]) -> None:
    bench = Bench(*made, 40, [[10, 10, 35]])
    bench.work()
    assert bench.inside() == {(0, 0), (0, 1)}
    bench.load(0, 2)
    assert bench.inside() == {(0, 2)}
    bench.load(0, 0)
    assert bench.inside() == {(0, 0)}


def test_what_is_taken_stays_but_is_taken_by_nobody_else(made: tuple[Artifact, Stage]) -> None:
    bench = Bench(*made, 10, [[10], [10]])
    bench.work()
    assert bench.take(0, 0) is not None
    assert bench.take(1, 0) is None
    assert bench.step() is None
    assert bench.inside() == {(0, 0)}
    assert bench.take(0, 0) is None, "or two who take turns would keep it for ever"
    bench.give(0, 0)
    assert isinstance(bench.step(), Evict)
    assert isinstance(bench.step(), LoadPart)
    assert bench.inside() == {(1, 0)}


def test_what_was_loaded_for_somebody_waits_for_him(made: tuple[Artifact, Stage]) -> None:
    bench = Bench(*made, 10, [[10], [10]])
    bench.work()
    bench.use(0, 0)
    assert bench.take(1, 0) is None
    bench.work()
    assert bench.take(0, 0) is None
    assert bench.step() is None, "(1, 0) was not used once"
    bench.use(1, 0)
    bench.work()
    assert bench.inside() == {(0, 0)}
    assert bench.take(1, 0) is None
    assert bench.step() is None
    bench.now += GRACE  # whoever asked for (0, 0) does not come
    bench.work()
    assert bench.inside() == {(1, 0)}


def test_larger_than_the_budget_is_refused_each_time_it_is_asked_for(made: tuple[Artifact, Stage]) -> None:
    bench = Bench(*made, 40, [[10, 41]])
    bench.work()
    for _ in range(3):
        assert bench.take(0, 1) is None
        bench.work()
        with pytest.raises(StorageError, match=r"m0: stage 1 takes 0\.00 MiB of memory, the budget .* raise the"):
            bench.take(0, 1)


def test_one_spoilt_figure_refuses_nobody(made: tuple[Artifact, Stage]) -> None:
    sizes = [[150]]
    bench = Bench(*made, 100, sizes)  # nothing runs, and the one loading there is seems too much
    bench.work()
    sizes[0][0] = 10
    bench.load(0, 0)
    assert bench.shelf.bytes() == 10


def test_what_seems_too_large_is_loaded_again_while_somebody_waits(made: tuple[Artifact, Stage]) -> None:
    sizes = [[10, 150]]
    bench = Bench(*made, 100, sizes)
    bench.step()
    assert bench.take(0, 1) is None
    jobs = [bench.step() for _ in range(2)]
    assert [type(job) for job in jobs] == [LoadPart, Evict]
    sizes[0][1] = 20
    bench.work()
    bench.use(0, 1)
    assert bench.shelf.bytes() <= 100


def test_a_refusal_is_measured_again_after_a_while_and_not_at_every_ask(made: tuple[Artifact, Stage]) -> None:
    sizes = [[10, 150]]
    bench = Bench(*made, 100, sizes)
    bench.work()
    for _ in range(3):
        assert bench.take(0, 1) is None
        bench.work()
        with pytest.raises(StorageError):
            bench.take(0, 1)
    bench.load(0, 0)  # had to go for the loadings that measured
    assert bench.take(0, 1) is None
    assert isinstance(bench.step(), Refused)
    assert bench.inside() == {(0, 0)}, "nothing went for what is known to be too large"
    with pytest.raises(StorageError):
        bench.take(0, 1)
    sizes[0][1] = 20
    bench.now += REFUSAL
    bench.load(0, 1)
    assert bench.shelf.bytes() == 20 + 10


def test_a_file_larger_than_the_budget_is_refused_without_loading(made: tuple[Artifact, Stage]) -> None:
    bench = Bench(*made, 40, [[50]], file_bytes=45)
    assert bench.take(0, 0) is None
    assert isinstance(bench.step(), Refused)
    with pytest.raises(StorageError, match="the budget"):
        bench.take(0, 0)


def test_a_figure_too_low_does_not_break_the_budget(made: tuple[Artifact, Stage]) -> None:
    sizes = [[-40], [90]]
    bench = Bench(*made, 100, sizes, file_bytes=80)  # while the first was loaded others gave memory back
    bench.work()
    assert bench.inside() == {(0, 0)}
    bench.use(0, 0)
    bench.load(1, 0)
    assert bench.inside() == {(1, 0)}


def test_a_failure_is_told_once_and_tried_again(made: tuple[Artifact, Stage]) -> None:
    bench = Bench(*made, None, [[10]])
    assert bench.take(0, 0) is None
    bench.step(fail=True)
    with pytest.raises(ArtifactError):
        bench.take(0, 0)
    bench.load(0, 0)


def test_released_versions_go_and_are_refused(made: tuple[Artifact, Stage]) -> None:
    bench = Bench(*made, None, [[10, 10]])
    bench.work()
    assert bench.take(0, 1) is not None
    bench.shelf.forget(bench.models[0])
    bench.work()
    assert bench.inside() == {(0, 1)}
    bench.give(0, 1)
    bench.work()
    assert bench.inside() == set()
    with pytest.raises(UsageError, match="released by all"):
        bench.take(0, 1)
    with pytest.raises(UsageError, match="more often"):
        bench.give(0, 1)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "take", "give", "step", "step", "step", "fail", "wait"]),
        st.integers(0, 3),
        st.integers(0, STAGES - 1),
    ),
    max_size=150,
)
SIZES = st.lists(st.lists(st.integers(1, 30), min_size=STAGES, max_size=STAGES), min_size=2, max_size=4)


@settings(max_examples=200)
@given(OPERATIONS, SIZES, st.integers(5, 90), st.sampled_from(sorted(POLICIES)))
def test_whatever_is_asked_and_in_whatever_order(
    made: tuple[Artifact, Stage],
    operations: list[tuple[str, int, int]],
    sizes: list[list[int]],
    budget: int,
    policy: str,
) -> None:
    bench = Bench(*made, budget, sizes, policy)
    taken: list[tuple[int, int]] = []
    for kind, number, depth in operations:
        model = number % len(sizes)
        before, known = bench.inside(), {p for parts in bench.models for p in parts if 0 < p.bytes <= budget}
        job: Any = None
        if kind == "take":
            try:
                if bench.take(model, depth) is not None:
                    taken.append((model, depth))
            except OfframpError:
                assert (model, depth) not in bench.inside() or bench.models[model][depth].leaving
        elif kind == "give" and taken:
            bench.give(*taken.pop(number % len(taken)))
        elif kind == "wait":
            bench.now += GRACE / 2
        else:
            job = bench.step(fail=kind == "fail")
        assert set(taken) <= bench.inside(), "what is taken is in memory"
        if isinstance(job, LoadPart) and job.part in known:
            assert bench.shelf.bytes() <= budget, "a known size never leads beyond the budget"
        if isinstance(job, Evict):
            assert before - bench.inside() == {(p.version, p.depth) for p in job.parts}
            assert all(slot.stage is None for part in job.parts for slot in part.slots)
        elif kind != "wait":
            assert before <= bench.inside()
    for model, depth in taken:
        bench.give(model, depth)
    for _ in range(2):  # what waited for somebody may go, then what is loaded for somebody now
        bench.work()
        bench.now += GRACE
    bench.work()
    assert bench.shelf.bytes() <= budget
    for model, own in enumerate(sizes):  # and whatever happened, each still comes when it is asked for
        for depth, size in enumerate(own):
            wants_one(bench, model, depth, size <= budget)


def wants_one(bench: Bench, model: int, depth: int, possible: bool) -> None:
    """Ask for a stage until it is there, or refused for its size."""
    for _ in range(4):
        bench.now += GRACE
        try:
            if bench.take(model, depth) is not None:
                bench.give(model, depth)
                assert possible
                return
        except StorageError:
            assert not possible
            return
        except ArtifactError:
            continue
        bench.work()
    raise AssertionError("it never came")


def test_an_error_does_not_outlive_a_loading_that_worked(made: tuple[Artifact, Stage]) -> None:
    bench = Bench(*made, 15, [[10], [10]])
    assert bench.take(0, 0) is None
    bench.step(fail=True)
    bench.shelf.forget([])  # another version went, so that all may be tried again
    bench.models[0][0].error = ArtifactError("of long ago")
    bench.step()
    assert bench.inside() == {(0, 0)}
    assert bench.models[0][0].error is None
