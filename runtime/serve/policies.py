"""Which part of which model leaves memory first.

A part is one segment, or all of a model where models are loaded whole. Within a model the deepest goes first, so that
it keeps what answers most rows. Which model's deepest is the policy's choice:

    lru    least recently used
    lfu    least often used
    cost   least load_seconds x rate / bytes: what it would cost to have it back, for the memory it gives

`rate` counts uses with a half-life, or yesterday's favourite would stay for ever. It halves with uses of anything
rather than with time: a quiet night forgets nothing, and a replayed trace gives the same choices at any speed.
The size-aware rule is that of GreedyDual-Size-Frequency, without its inflation: the half-life ages in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

HALF_LIFE = 1000  # uses of anything


@dataclass(frozen=True)
class Resident:
    """A part that is in memory."""

    model: int  # a number of the version it belongs to
    depth: int  # 0 is the shallowest part of its model
    bytes: int
    used: float  # when it was last used, on any clock
    rate: float  # uses, decayed to now
    load_seconds: float
    taken: bool = False  # in use now: it can be told to go, but goes later


Policy = Callable[[Resident], float]

POLICIES: dict[str, Policy] = {
    "lru": lambda resident: resident.used,
    "lfu": lambda resident: resident.rate,
    "cost": lambda resident: resident.load_seconds * resident.rate / max(resident.bytes, 1),
}


def decayed(rate: float, uses: int) -> float:
    """A rate after so many further uses of anything."""
    return float(rate * 0.5 ** (uses / HALF_LIFE))


def victims(
    residents: Iterable[Resident], excess: int, policy: Policy, wanted: tuple[int, int] | None = None
) -> list[Resident]:
    """Those that must go for `excess` bytes to come back, in order; all of them where that is not enough.

    `wanted` is the model and depth that room is made for. What is free goes first, then earlier parts of the wanted
    one's own model, then what is taken: to wait is worse than to load again only where nothing else is left.
    """
    left: dict[int, list[Resident]] = {}
    for resident in sorted(residents, key=lambda resident: (not resident.taken, resident.depth)):
        left.setdefault(resident.model, []).append(resident)  # what goes first stands last
    chosen: list[Resident] = []
    while excess > 0 and left:
        first = min((parts[-1] for parts in left.values()), key=lambda resident: _order(resident, policy, wanted))
        left[first.model].pop()
        if not left[first.model]:
            del left[first.model]
        chosen.append(first)
        excess -= first.bytes
    return chosen


def _order(
    resident: Resident, policy: Policy, wanted: tuple[int, int] | None
) -> tuple[bool, bool, float, float, int, int]:
    earlier = wanted is not None and resident.model == wanted[0] and resident.depth < wanted[1]
    return resident.taken, earlier, policy(resident), resident.used, -resident.depth, resident.model
