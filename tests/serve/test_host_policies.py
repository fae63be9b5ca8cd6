"""Who goes first, as pure functions, and the memory figures they go by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.runtime.serve.memory import Sizes
from offramp.runtime.serve.policies import HALF_LIFE, POLICIES, Resident, decayed, victims

ANY = st.floats(0, 100, allow_nan=False)


@st.composite
def memories(draw: st.DrawFn) -> list[Resident]:
    """Parts of a few models, any of their depths in memory."""
    residents = []
    for model in range(draw(st.integers(1, 5))):
        for depth in draw(st.sets(st.integers(0, 5), max_size=6)):
            rates = draw(ANY), draw(ANY), draw(ANY)
            size = draw(st.integers(1, 50))
            residents.append(Resident(model, depth, size, *rates, taken=draw(st.booleans())))
    return draw(st.permutations(residents))


@given(
    memories(), st.integers(-5, 400), st.sampled_from(sorted(POLICIES)), st.tuples(st.integers(0, 5), st.integers(0, 5))
)
def test_each_victim_is_the_deepest_free_one_left_of_its_model(
    memory: list[Resident], excess: int, policy: str, wanted: tuple[int, int]
) -> None:
    chosen = victims(memory, excess, POLICIES[policy], wanted)
    assert len(set(chosen)) == len(chosen)
    left = set(memory)
    for victim in chosen:
        own = [resident for resident in left if resident.model == victim.model and resident.taken == victim.taken]
        assert victim.depth == max(resident.depth for resident in own)
        if victim.taken:
            assert all(resident.taken for resident in left), "something free could have gone instead"
        left.remove(victim)


@given(memories(), st.integers(-5, 400), st.sampled_from(sorted(POLICIES)))
def test_enough_goes_and_no_more(memory: list[Resident], excess: int, policy: str) -> None:
    chosen = victims(memory, excess, POLICIES[policy])
    freed = sum(victim.bytes for victim in chosen)
    assert freed >= excess or len(chosen) == len(memory)
    if chosen:
        assert freed - chosen[-1].bytes < excess


def of(policy: str, *memory: Resident) -> int:
    """The model that gives way first."""
    return victims(memory, 1, POLICIES[policy])[0].model


def test_each_policy_goes_by_its_own_measure() -> None:
    old = Resident(0, 0, bytes=10, used=1, rate=9, load_seconds=5)
    rare = Resident(1, 0, bytes=10, used=3, rate=2, load_seconds=5)
    bulky = Resident(2, 0, bytes=1000, used=2, rate=4, load_seconds=5)
    assert of("lru", old, rare, bulky) == 0
    assert of("lfu", old, rare, bulky) == 1
    assert of("cost", old, rare, bulky) == 2
    quick = Resident(3, 0, bytes=10, used=3, rate=2, load_seconds=0.01)
    assert of("cost", old, rare, bulky, quick) == 3


def test_earlier_parts_of_the_wanted_model_go_after_all_else_that_is_free() -> None:
    own = [Resident(0, depth, 10, used=0, rate=0, load_seconds=0) for depth in (0, 1, 3)]
    other = Resident(1, 0, 10, used=9, rate=9, load_seconds=9)
    busy = Resident(2, 0, 10, used=0, rate=0, load_seconds=0, taken=True)
    chosen = victims([*own, other, busy], 1000, POLICIES["lru"], wanted=(0, 2))
    assert chosen == [own[2], other, own[1], own[0], busy]


def test_rates_halve_with_use() -> None:
    assert decayed(8, 0) == 8
    assert decayed(8, 3 * HALF_LIFE) == pytest.approx(1)


def test_a_file_is_expected_until_measured_and_quiet_figures_count() -> None:
    sizes = Sizes(70)
    assert (sizes.bytes, sizes.expected, sizes.least, sizes.certain) == (0, 70, 70, False)
    for figure in (900, 100):
        sizes.add(figure, quiet=False)
    assert (sizes.bytes, sizes.expected, sizes.least, sizes.certain) == (100, 100, 100, False)
    sizes.add(120, quiet=True)
    assert (sizes.bytes, sizes.least, sizes.certain) == (120, 100, True)
    for _ in range(9):
        sizes.add(80, quiet=True)
        sizes.add(110, quiet=False)
    assert (sizes.bytes, sizes.least) == (80, 80)
    sizes.drop()
    assert (sizes.bytes, sizes.expected, sizes.certain) == (0, 70, False)


def test_one_spoilt_figure_does_not_count_for_long() -> None:
    high, low = Sizes(70), Sizes(70)
    high.add(1500, quiet=True)
    assert not high.certain
    low.add(-400, quiet=True)  # another thread gave back what it had
    assert (low.bytes, low.certain) == (70, False)
    for sizes in (high, low):
        for _ in range(3):
            sizes.add(90, quiet=True)
        assert (sizes.bytes, sizes.certain) == (90, True)
