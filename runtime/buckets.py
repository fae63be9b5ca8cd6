"""Sizes that batches on a device are padded to.

A GPU takes about as long for 17 rows as for 32, and cuDNN plans every convolution anew for each size it meets. So a
batch that shrinks does so in steps: it is padded up to the next of a few sizes, by repeating one of its rows.

Which sizes, is measured: of those an artifact was timed at (`offramp tune`), a size is kept where it is worth having,
that is where its time is well under that of the next larger one kept. Without measurements, and beyond the largest
size measured, nothing is known of what padding costs: then the sizes are the powers of two below the batch's own size
and that size itself, so that a batch is padded only after rows left it, and never to more than it had.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .manifest import Manifest

WORTH_A_SIZE = 0.05  # of the next larger size's time: less is within what two measurements differ by


@dataclass(frozen=True)
class Buckets:
    """Rows that a batch may have on the device."""

    sizes: tuple[int, ...]  # ascending

    def fit(self, rows: int) -> int:
        """The least size that holds so many rows; beyond the largest, the rows themselves."""
        at = bisect.bisect_left(self.sizes, rows)
        return self.sizes[at] if at < len(self.sizes) else rows


def buckets_for(rows: int, measured: tuple[int, ...] = ()) -> Buckets:
    """For a batch of so many rows; `measured` are the sizes worth having, ascending, as far as they are known."""
    largest = measured[-1] if measured else 0
    if rows <= largest:
        return Buckets(measured)
    doubling = (1 << power for power in range((rows - 1).bit_length()))
    return Buckets((*measured, *(size for size in doubling if size > largest), rows))


def worth_having(sizes: Sequence[int], times: Sequence[float] | np.ndarray) -> tuple[int, ...]:
    """Of sizes, ascending, and the times of a batch of each: those that save time over the next larger one kept.

    The largest is always among them.
    """
    kept: list[int] = []
    above = float("inf")
    for size, taken in zip(reversed(sizes), reversed(np.asarray(times).tolist()), strict=True):
        if not kept or taken <= (1 - WORTH_A_SIZE) * above:
            kept.append(size)
            above = taken
    return tuple(reversed(kept))


def measured_sizes(manifest: Manifest) -> tuple[int, ...]:
    """Sizes worth having by what `offramp tune` measured, all stages and heads together; () where it did not."""
    tuned = manifest.measured.tuned
    return () if tuned is None else worth_having(tuned.batches, np.sum(tuned.asked_ms, axis=0))
