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


def split_rows(rows: int, seed: int) -> RowSplits:
    """Number of rows -> disjoint index arrays. Raises `InputError` with the number needed when too few."""
    needed = int(np.ceil(FEWEST / min(SHARES.values())))
    if rows < needed:
        raise InputError(f"the data has {rows} rows; the splits need at least {needed}: collect more unlabelled rows")
    order = np.random.default_rng(seed).permutation(rows)
    ends = np.round(np.cumsum(list(SHARES.values())) * rows).astype(int)
    parts = np.split(order, ends[:-1])
    return RowSplits(seed, *parts)
