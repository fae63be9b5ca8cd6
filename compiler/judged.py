"""What decides how much an exit saves and what it costs, as numbers. Pure functions of arrays over judged rows.

auroc         can its confidence tell the rows on which it will agree? 1 always, 0.5 no better than a coin
reliability   does it agree as often as it says? Binned as Guo et al. (2017) do; the mean gap is their ECE
curves        exit rate, agreement and accuracy over all thresholds
categories    exit, backbone and label: the five ways they agree or not (the papers' Table 1), and from them the
              true effect on accuracy (Eq. 2) and its bound when there are no labels (Eq. 3)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit
from scipy.stats import rankdata

BINS = 15  # of equal width, as Guo et al. use
POINTS = 121  # of a curve
_LOWEST, _HIGHEST = 0.02, 0.9999  # thresholds of a curve
_BEYOND = 0.2  # in log(t / (1 - t))


def auroc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """[rows], [rows] bool -> P(a positive row scores above a negative one), ties for a half; None if all are alike."""
    ahead, behind = int(positive.sum()), int((~positive).sum())
    if not ahead or not behind:
        return None
    ranks = rankdata(score)
    return float(ranks[positive].sum() - ahead * (ahead + 1) / 2) / (ahead * behind)


@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence against agreement, in bins of confidence that hold any row."""

    confidence: np.ndarray  # [filled bins] mean, in [0, 1]
    agreement: np.ndarray  # [filled bins] share
    share: np.ndarray  # [filled bins] of all rows; sums to 1

    @property
    def error(self) -> float:
        """Expected calibration error, in [0, 1]."""
        return float(self.share @ np.abs(self.confidence - self.agreement))


def reliability(confidence: np.ndarray, agrees: np.ndarray, bins: int = BINS) -> Reliability:
    """[rows] in [0, 1], [rows] bool -> bins of equal width, closed above as in Guo et al."""
    where = np.clip(np.ceil(confidence.astype(np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)
    rows = np.bincount(where, minlength=bins)
    filled = rows > 0
    sure = np.bincount(where, confidence.astype(np.float64), bins)[filled]
    right = np.bincount(where, agrees.astype(np.float64), bins)[filled]
    return Reliability(sure / rows[filled], right / rows[filled], rows[filled] / len(where))


@dataclass(frozen=True, eq=False)
class Curves:
    """One exit over all thresholds, were it the only one: every row is asked."""

    thresholds: np.ndarray  # [points] float32, rising
    exit_rate: np.ndarray  # [points] of all rows
    agreement: np.ndarray  # [points] among rows that leave; not a number where none does
    bound: np.ndarray  # [points] Eq. 3: the accuracy that may be lost, as a share of all rows
    accuracy: np.ndarray | None  # [points] among rows that leave
    effect: np.ndarray | None  # [points] Eq. 2: the accuracy that is won, or lost if negative


def curves(
    confidence: np.ndarray, agrees: np.ndarray, right: np.ndarray | None = None, before: np.ndarray | None = None
) -> Curves:
    """Confidence, agreement and, with labels, whether the exit and the backbone are right, each [rows] -> curves.

    Thresholds are evenly spaced in log(t / (1 - t)): half of a good exit's rows lie between 0.99 and 1. They end a
    little above the largest confidence.
    """
    order = np.argsort(confidence, kind="stable")
    low = logit(np.clip(float(confidence.min()), _LOWEST, 0.5))
    high = max(logit(np.clip(float(confidence.max()), _LOWEST, _HIGHEST)) + _BEYOND, low + 1)
    logits = np.linspace(low, min(high, logit(_HIGHEST)), POINTS)
    thresholds = expit(logits).astype(np.float32)
    first = np.searchsorted(confidence[order], thresholds, "left")

    def behind(values: np.ndarray) -> np.ndarray:
        """[rows] -> [points] the sum over rows that leave."""
        found: np.ndarray = np.append(np.cumsum(values[order][::-1].astype(np.float64))[::-1], 0.0)[first]
        return found

    rows, leave = len(confidence), (len(confidence) - first).astype(np.float64)
    some = np.where(leave > 0, leave, np.nan)
    effect = None if right is None or before is None else behind(right.astype(np.int64) - before) / rows
    return Curves(
        thresholds, leave / rows, behind(agrees) / some, behind(~agrees) / rows,
        None if right is None else behind(right) / some, effect,
    )  # fmt: skip


@dataclass(frozen=True)
class Categories:
    """Rows that leave at an exit, by who is right; the papers' Table 1 with B the backbone, C the exit."""

    both_right: int  # BC
    same_wrong: int  # both wrong, with the same answer
    backbone_only: int  # the exit loses a right answer
    exit_only: int  # the exit wins one
    both_wrong: int  # with different answers

    @property
    def rows(self) -> int:
        """All rows that leave here."""
        return self.both_right + self.same_wrong + self.backbone_only + self.exit_only + self.both_wrong

    def effect(self, rows: int) -> float:
        """Eq. 2: what the exit adds to the accuracy over all `rows`; negative where it costs."""
        return (self.exit_only - self.backbone_only) / rows

    def bound(self, rows: int) -> float:
        """Eq. 3: exit rate times disagreement, the most it can cost over all `rows`; needs no label."""
        return (self.backbone_only + self.exit_only + self.both_wrong) / rows


def categories(given: np.ndarray, backbone: np.ndarray, labels: np.ndarray) -> Categories:
    """Classes that the exit and the backbone give to the rows that leave, and their labels, each [rows]."""
    same, ours, theirs = given == backbone, given == labels, backbone == labels
    return Categories(
        both_right=int((same & ours).sum()),
        same_wrong=int((same & ~ours).sum()),
        backbone_only=int((theirs & ~ours).sum()),
        exit_only=int((ours & ~theirs).sum()),
        both_wrong=int((~same & ~ours & ~theirs).sum()),
    )
