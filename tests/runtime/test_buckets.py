"""Which sizes batches are padded to."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Tiny

from offramp.runtime.buckets import WORTH_A_SIZE, Buckets, buckets_for, measured_sizes, worth_having
from offramp.runtime.manifest import Tuned

SIZES = st.lists(st.integers(1, 500), min_size=1, max_size=12, unique=True).map(sorted)


@given(SIZES, st.integers(1, 600))
def test_a_batch_fits_the_least_size_that_holds_it(sizes: list[int], rows: int) -> None:
    fit = Buckets(tuple(sizes)).fit(rows)
    assert fit >= rows
    if rows > sizes[-1]:
        assert fit == rows
    else:
        assert fit in sizes
        assert not [size for size in sizes if rows <= size < fit]


@given(SIZES, st.data())
def test_a_size_is_kept_where_it_saves_time_over_the_next_larger_one(sizes: list[int], data: st.DataObject) -> None:
    times = data.draw(st.lists(st.floats(0.01, 100), min_size=len(sizes), max_size=len(sizes)))
    kept = worth_having(sizes, times)
    took = dict(zip(sizes, times, strict=True))
    assert kept[-1] == sizes[-1]
    assert set(kept) <= set(sizes)
    assert list(kept) == sorted(kept)
    share = 1 - WORTH_A_SIZE
    for smaller, larger in itertools.pairwise(kept):
        assert took[smaller] <= share * took[larger]
    for size in set(sizes) - set(kept):
        larger = next(other for other in kept if other > size)
        assert took[size] > share * took[larger], "it would have saved time"


def test_a_flat_curve_keeps_one_size_and_a_steep_one_all() -> None:
    sizes = (1, 2, 4, 8, 16)
    assert worth_having(sizes, np.full(5, 3.0)) == (16,)
    assert worth_having(sizes, np.array(sizes, float)) == sizes
    assert worth_having(sizes, [1.0, 1.01, 1.02, 1.9, 4.0]) == (4, 8, 16), "a GPU: flat up to some size, steep above"


@given(SIZES | st.just([]), st.integers(1, 3000))
def test_a_batch_beyond_what_was_measured_is_never_padded_to_more_than_it_has(measured: list[int], rows: int) -> None:
    buckets = buckets_for(rows, tuple(measured))
    assert list(buckets.sizes) == sorted(set(buckets.sizes))
    if measured and rows <= measured[-1]:
        assert buckets.sizes == tuple(measured)
    else:
        assert buckets.fit(rows) == buckets.sizes[-1] == rows
        assert set(measured) <= set(buckets.sizes)
        assert all(buckets.fit(left) <= max(2 * left, measured[-1] if measured else 0) for left in range(1, rows))


@pytest.mark.parametrize(("rows", "sizes"), [(1, (1,)), (2, (1, 2)), (33, (1, 2, 4, 8, 16, 32, 33))])
def test_without_measurements_sizes_double(rows: int, sizes: tuple[int, ...]) -> None:
    assert buckets_for(rows).sizes == sizes


def test_sizes_come_from_what_tune_measured(tiny: Tiny) -> None:
    assert measured_sizes(tiny.manifest) == ()
    tuned = Tuned(
        machine="a test",
        threads=1,
        objective="",
        backbone_ms=1.0,
        before_ms=1.0,
        after_ms=1.0,
        batches=(1, 4, 16),
        silent_ms=((1.0, 1.0, 1.0),) * 3,
        asked_ms=((1.0, 1.0, 2.0), (1.0, 1.0, 3.0), (1.0, 1.0, 1.0)),
    )
    measured = replace(tiny.manifest.measured, tuned=tuned)
    assert measured_sizes(replace(tiny.manifest, measured=measured)) == (4, 16)
