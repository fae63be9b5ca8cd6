"""How much memory training takes, and candidates in groups that keep to a bound.

What grows with the number of candidates are the values of one batch, which all are there at once, and every head
with its gradient, two moments and its best weights so far. What one head makes of its value lives only while that
head takes its step. A group too many costs another pass through the backbone, not memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from offramp.passes import Backbone, Candidate, row_shape
from offramp.runtime.errors import UsageError

from .heads import build_head, default_head

_FLOAT = 4
_COPIES = 5  # weights, gradient, two moments, best weights
_STEP = 6  # times a value's size that a head's own step may take, forward and backward


def groups(
    backbone: Backbone, candidates: Sequence[Candidate], batch: int, heads: int, budget: int | None
) -> list[tuple[Candidate, ...]]:
    """Candidates in order, in groups whose training keeps to `budget` bytes beside the model and the data.

    `heads` of the default size learn at each candidate at a time. None: no bound, one group. Raises `UsageError`
    when a single candidate is over the bound.
    """
    if budget is None:
        return [tuple(candidates)]
    found: list[list[Candidate]] = []
    held = step = 0
    for candidate in candidates:
        value, state = _needed(backbone, candidate, batch, heads)
        if value * _STEP + value + state > budget:
            raise UsageError(
                f"training at {candidate.place} takes about {_mib(value * _STEP + value + state)}, the memory budget "
                f"is {_mib(budget)}; give it more, or make batches of fewer than {batch} rows"
            )
        if not found or held + value + state + max(step, value * _STEP) > budget:
            found.append([])
            held = step = 0
        found[-1].append(candidate)
        held, step = held + value + state, max(step, value * _STEP)
    return [tuple(group) for group in found]


def _needed(backbone: Backbone, candidate: Candidate, batch: int, heads: int) -> tuple[int, int]:
    """Bytes of one batch's value, and of the heads."""
    shape = row_shape(backbone, candidate.name)
    config = default_head(shape, backbone.classes, candidate.flops_before + candidate.flops_after)
    with torch.device("meta"):  # nothing is allocated, and nobody's random numbers move
        size = sum(p.numel() for p in build_head(config, shape, backbone.classes).parameters())
    return batch * int(np.prod(shape)) * _FLOAT, heads * size * _FLOAT * _COPIES


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
