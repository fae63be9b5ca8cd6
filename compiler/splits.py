"""Splits: which rows of the data may touch what.

    distil     the heads learn from it
    calibrate  each head's temperature, and when its training stops
    select     which exits, which thresholds
    certify    the guarantee; nothing tunes on it
    test       the report; nothing at all touches it but the report

Disjoint, cut in this order from one permutation seeded with the seed the manifest records.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.runtime.errors import InputError

SHARES = {"distil": 0.45, "calibrate": 0.05, "select": 0.20, "certify": 0.15, "test": 0.15}
FEWEST = 8  # rows in the smallest split: fewer than this say nothing about anything


@dataclass(frozen=True)
class RowSplits:
    """Row indices into the data, int64, disjoint."""

    seed: int
    distil: np.ndarray
    calibrate: np.ndarray
    select: np.ndarray
    certify: np.ndarray
    test: np.ndarray


PARTS = tuple(SHARES)


def check_splits(splits: RowSplits, rows: int) -> None:
    """Raises `InputError` for splits that are too small, share a row, or name one that is not there."""
    for part in PARTS:
        size = len(getattr(splits, part))
        if size < FEWEST:
            raise InputError(f"split {part} has {size} rows; it needs at least {FEWEST}: give it more rows")
    every = np.concatenate([getattr(splits, part) for part in PARTS])
    if every.min() < 0 or every.max() >= rows:
        raise InputError(f"the splits name row {every.max()} (or a negative one), the data has {rows}; name rows of it")
    if len(np.unique(every)) < len(every):
        raise InputError("the splits share rows; no row may be in two of them, or what they say is worth nothing")


def split_rows(rows: int, seed: int) -> RowSplits:
    """Number of rows -> disjoint index arrays. Raises `InputError` with the number needed when too few."""
    needed = int(np.ceil(FEWEST / min(SHARES.values())))
    if rows < needed:
        raise InputError(f"the data has {rows} rows; the splits need at least {needed}: collect more unlabelled rows")
    order = np.random.default_rng(seed).permutation(rows)
    ends = np.round(np.cumsum(list(SHARES.values())) * rows).astype(int)
    parts = np.split(order, ends[:-1])
    return RowSplits(seed, *parts)
