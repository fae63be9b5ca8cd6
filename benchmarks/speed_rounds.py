"""How `benchmarks.speed` takes times: rounds in which every variant answers the same batches, in turn.

What a variant takes is compared within a round. Sessions are made anew after every `TOGETHER` rounds, for one that was
unlucky with where its memory lies stays some percent slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.speed_rivals import Batch, Variant
from offramp.compiler import Ready

Opened = Callable[[], dict[str, Variant]]

TOGETHER, WARM = 10, 2  # rounds with the same sessions, and those before them that are not counted
REST = 0.05  # seconds; ONNX Runtime's threads wait for more work for 0.04, on the cores of whoever comes next
WARM_ROWS = 8  # that each answers before its time is taken, for its weights and threads to be at hand
SECONDS = 0.05  # of the plain backbone in a round, or more for so many calls, or one call
CALLS, MORE_SECONDS = 4, 0.3
LONG, LONGEST = 120, 360  # seconds of rounds: before we ask whether they are enough, and at most
MORE_ROUNDS = 10  # at most so many times the least
WANTED, SURE = 1.02, 0.01  # of the plain backbone's time, when nothing leaves and heads are taken off
DRAWS = 2000  # of the bootstrap


def timed(
    opened: Opened, ready: Ready, batch: int, rounds: int, seed: int, handed_over: Callable[[Mapping[str, Any]], Batch]
) -> dict[str, Any]:
    """All variants at one batch size: milliseconds per row and ratios to plain, medians and quartiles over rounds."""
    generator, test = np.random.default_rng([seed, batch]), ready.splits.test

    def draw(calls: int) -> list[Batch]:
        picked = [generator.choice(test, batch, replace=len(test) < batch) for _ in range(calls)]
        return [handed_over(ready.rows.take(rows)) for rows in picked]

    calls = _calls(opened()["plain"], draw(3))
    told = _rounds(opened, lambda: draw(calls), rounds)
    of = _by_variant(told)
    variants = {
        name: {**_spread("ms", taken * 1e3 / (calls * batch)), **_spread("ratio", taken / of["plain"])}
        for name, taken in of.items()
    }
    whole = ("segments", "single_file")
    limits: dict[str, tuple[str, np.ndarray]] = {n: ("over_ideal", of[n] / of["ideal"]) for n in whole if n in of}
    if "none_leaves" in of:
        limits["none_leaves"] = "beyond_heads", _beyond_heads(of)
    for name, (key, values) in limits.items():
        variants[name] |= {**_spread(key, values), f"{key}_error": error(values)}
    return {"batch": batch, "calls": calls, "rounds": len(told), "rest": REST, "variants": variants}


def _calls(plain: Variant, some: Sequence[Batch]) -> int:
    """In a round."""
    plain.seconds(some)
    each = plain.seconds(some) / len(some)
    return int(np.clip(SECONDS / each, max(1, min(CALLS, MORE_SECONDS / each)), 256))


def _rounds(opened: Opened, draw: Callable[[], list[Batch]], rounds: int) -> list[dict[str, float]]:
    """Seconds of each variant, round by round: at least so many, and more until what nobody's leaving costs is sure.

    Where nothing is asked for its exit the least is enough.
    """
    start, told = time.monotonic(), list[dict[str, float]]()
    while True:
        told += _rounds_of(opened(), draw, len(told))
        spent, of = time.monotonic() - start, _by_variant(told)
        sure = "none_leaves" not in of or (spent > LONG and _is_sure(_beyond_heads(of)))
        if len(told) >= rounds and (sure or spent > LONGEST or len(told) >= rounds * MORE_ROUNDS):
            return told


def _rounds_of(variants: Mapping[str, Variant], draw: Callable[[], list[Batch]], first: int) -> list[dict[str, float]]:
    """The same of some that were opened together, the `first` round and those after it."""
    told, names = [], list(variants)
    for index in range(first - WARM, first + TOGETHER):
        work = draw()
        few = [{name: values[:WARM_ROWS] for name, values in work[0].items()}]
        seconds = {}
        turned = names[index % len(names) :] + names[: index % len(names)]
        for name in turned if index % 2 else reversed(turned):
            time.sleep(REST)
            variants[name].seconds(few)
            seconds[name] = variants[name].seconds(work)
        told.append(seconds)
    return told[WARM:]


def _by_variant(told: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([seconds[name] for seconds in told]) for name in told[0]}


def _beyond_heads(of: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a batch that nothing leaves takes less the heads, over the plain backbone, round by round."""
    beyond: np.ndarray = (of["none_leaves"] - of["heads_alone"]) / of["plain"]
    return beyond


def _is_sure(beyond: np.ndarray) -> bool:
    """Whether we know of what is wanted below `WANTED` that it is, that it is not, or what it is to `SURE`."""
    unsure = error(beyond)
    return unsure <= SURE or abs(float(np.median(beyond)) - WANTED) > unsure


def error(values: np.ndarray) -> float:
    """Half of what holds 95 % of the medians, were other sessions drawn: rounds of the same sessions are no new ones.

    The bootstrap over those that were opened together [Efron 1979, "Bootstrap methods: another look at the jackknife"].
    """
    opened = values.reshape(-1, TOGETHER)
    drawn = np.random.default_rng(0).integers(len(opened), size=(DRAWS, len(opened)))
    low, high = np.quantile(np.median(opened[drawn].reshape(DRAWS, -1), axis=1), (0.025, 0.975))
    return float(high - low) / 2


def _spread(name: str, values: np.ndarray) -> dict[str, Any]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {name: middle, f"{name}_quartiles": [low, high]}
