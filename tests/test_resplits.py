"""The certificate on real records: 200 random re-splits of what ResNet-56's heads said of 5,000 CIFAR-10 images.

The records are those of `benchmarks.recorded`, part of the repository; no weights and no images are needed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.recorded import read
from offramp.runtime.selection import disagreement, joint, plan_path, walk

TOLERANCE, DELTA = 0.02, 0.05
SELECTIONS, DEALS = 4, 50  # as many re-splits as their product
SELECT, CERTIFY = 2000, 1500  # rows; the rest judge


def test_the_certificate_on_two_hundred_splits_of_real_records(record_property: Callable[[str, object], None]) -> None:
    """On a finite sample a plan may seem to break what it keeps: the rate found is reported, beside `joint`'s."""
    kept = read("resnet56")
    some = (1, 3, 5)  # of six candidates, for the path over three is drawn in seconds
    every, price = kept.records().among(some), kept.costs.among(some)
    certified_over, joint_over, saving = 0, 0, 0
    for selection in range(SELECTIONS):
        order = np.random.default_rng([selection, 0]).permutation(every.rows)
        selected = every.of(order[:SELECT])
        path, bold = list(plan_path(selected, price, TOLERANCE)), joint(selected, price, TOLERANCE)
        for deal in range(DEALS):
            rest = np.random.default_rng([selection, 1, deal]).permutation(order[SELECT:])
            held_out, test = every.of(rest[:CERTIFY]), every.of(rest[CERTIFY:])
            found = walk(path, held_out, price, TOLERANCE, DELTA).selection
            certified_over += disagreement(test, found.chosen, found.thresholds) > TOLERANCE
            joint_over += disagreement(test, bold.chosen, bold.thresholds) > TOLERANCE
            saving += bool(found.chosen)
    splits = SELECTIONS * DEALS
    record_property("certified over tolerance", certified_over / splits)
    record_property("joint over tolerance", joint_over / splits)
    print(f"over {TOLERANCE:.0%} on the test rows: certified {certified_over}, joint {joint_over} of {splits} splits")
    assert saving == splits, "a promise that nothing leaves is easily kept"
    assert certified_over <= 0.1 * splits
    assert joint_over > 2 * certified_over
