"""The report's numbers against values worked out by hand and by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from offramp.compiler.judged import POINTS, Categories, auroc, categories, curves, reliability

SURE = np.array([0.95, 0.9, 0.9, 0.6, 0.55, 0.3], np.float32)
AGREES = np.array([True, True, False, True, False, False])


def test_auroc_counts_pairs_and_halves_ties() -> None:
    # 0.95 is above all three others, 0.9 above two and level with one, 0.6 above two: 7.5 of 9 pairs.
    assert auroc(SURE, AGREES) == pytest.approx(7.5 / 9)
    assert auroc(SURE, np.ones(6, np.bool_)) is None
    assert auroc(SURE, np.zeros(6, np.bool_)) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=60))
def test_auroc_is_scikit_learn_s(rows: list[tuple[int, bool]]) -> None:
    score = np.array([s for s, _ in rows], np.float32) / 10
    agrees = np.array([a for _, a in rows])
    if agrees.all() or not agrees.any():
        assert auroc(score, agrees) is None
    else:
        assert auroc(score, agrees) == pytest.approx(roc_auc_score(agrees, score))


def test_reliability_by_hand() -> None:
    seen = reliability(SURE, AGREES, bins=2)
    # (0, 0.5] holds 0.3, which disagrees; (0.5, 1] the other five, of which three agree.
    assert seen.confidence == pytest.approx([0.3, 0.78])
    assert seen.agreement == pytest.approx([0.0, 0.6])
    assert seen.share == pytest.approx([1 / 6, 5 / 6])
    assert seen.error == pytest.approx(0.3 / 6 + 0.18 * 5 / 6)


def test_the_ends_of_the_scale_have_a_bin() -> None:
    seen = reliability(np.array([0.0, 1.0], np.float32), np.array([False, True]))
    assert seen.error == 0.0
    assert len(seen.share) == 2


def test_curves_by_hand() -> None:
    right = np.array([True, False, True, True, False, False])
    before = np.array([True, False, False, True, True, False])
    seen = curves(SURE, AGREES, right, before)
    assert len(seen.thresholds) == POINTS
    assert seen.accuracy is not None
    assert seen.effect is not None
    at = int(np.flatnonzero(seen.thresholds > 0.6)[0])  # three rows leave; a label is won by one that disagrees
    assert seen.exit_rate[at] == pytest.approx(0.5)
    assert seen.agreement[at] == pytest.approx(2 / 3)
    assert seen.accuracy[at] == pytest.approx(2 / 3)
    assert seen.bound[at] == pytest.approx(1 / 6)
    assert seen.effect[at] == pytest.approx(1 / 6)
    assert seen.exit_rate[0] == 1.0
    assert seen.effect[0] == pytest.approx(0.0)
    assert seen.exit_rate[-1] == 0.0
    assert np.isnan(seen.agreement[-1])


def test_a_threshold_takes_the_rows_that_have_it() -> None:
    """As the exit program compares: confidence >= threshold, both float32."""
    first = curves(SURE, AGREES).thresholds[40]
    again = curves(np.append(SURE, first), np.append(AGREES, True))
    at = int(np.flatnonzero(again.thresholds == first)[0])
    assert round(again.exit_rate[at] * 7) == int((again.thresholds[at] <= SURE).sum()) + 1


def test_five_categories_by_hand() -> None:
    exits, backbone, labels = (np.array(x) for x in ([1, 2, 3, 4, 5, 6], [1, 2, 0, 0, 0, 6], [1, 0, 0, 4, 9, 6]))
    found = categories(exits, backbone, labels)
    assert found == Categories(both_right=2, same_wrong=1, backbone_only=1, exit_only=1, both_wrong=1)
    assert found.rows == 6
    assert found.effect(10) == 0.0
    assert found.bound(10) == pytest.approx(0.3)


classes = st.integers(0, 3)


@given(st.lists(st.tuples(classes, classes, classes), min_size=1, max_size=50))
def test_effect_and_bound_are_what_they_say(rows: list[tuple[int, int, int]]) -> None:
    exits, backbone, labels = np.array(rows).T
    found = categories(exits, backbone, labels)
    change = (exits == labels).mean() - (backbone == labels).mean()
    assert found.rows == len(rows)
    assert found.effect(len(rows)) == pytest.approx(change)
    assert found.bound(len(rows)) == pytest.approx((exits != backbone).mean())
    assert -found.bound(len(rows)) <= found.effect(len(rows)) <= found.bound(len(rows))
