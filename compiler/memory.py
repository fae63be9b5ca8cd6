"""How much memory training takes, and candidates in groups that keep to a bound.

Every batch goes through the backbone, however few the candidates. What grows with their number are the values of one
batch, which all are there at once, and every head with its gradient, two moments and its best weights so far. What one
head makes of its value lives only while that head takes its step. A group too many costs another pass through the
backbone, not memory.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
import torch

from offramp.passes import Backbone, Candidate, row_shape
from offramp.passes.cuts import row_bytes
from offramp.runtime.errors import UsageError
from offramp.runtime.process import hand_back

from .heads import build_head, default_head
from .hint import last_dense
from .stream import hinted

_FLOAT = 4
_COPIES = 5  # weights, gradient, two moments, best weights
_STEP = 6  # times a value's size that a head's own step may take, forward and backward
_ON_TOP = 2.25  # times as much is really taken: the allocator's gaps and scratch space (tests/compiler/test_memory.py)


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
    passing, (_, features) = _passing(backbone, batch), hinted(backbone)
    held = step = 0
    for candidate in candidates:
        value, state = _needed(backbone, candidate, batch, heads, features)
        alone = passing + value * _STEP + value + state
        if alone > budget:
            raise UsageError(
                f"training at {candidate.place} takes about {_mib(alone)}, the memory budget is {_mib(budget)}; "
                f"give it more, or let heads learn from fewer than {batch} rows at a time (Training.batch)"
            )
        if not found or passing + held + value + state + max(step, value * _STEP) > budget:
            found.append([])
            held = step = 0
        found[-1].append(candidate)
        held, step = held + value + state, max(step, value * _STEP)
    return [tuple(group) for group in found]


def give_back() -> None:
    """Hand freed memory to the operating system. glibc keeps what lies between live blocks, a little more with every
    group of candidates (16 groups of ResNet-like maps: twice the bound)."""
    gc.collect()
    hand_back()


def _needed(backbone: Backbone, candidate: Candidate, batch: int, heads: int, features: int) -> tuple[int, int]:
    """Bytes of one batch's value, and of the heads with what tells `features` of the backbone from them."""
    shape = row_shape(backbone, candidate.name)
    config = default_head(shape, backbone.classes, candidate.flops_before + candidate.flops_after)
    with torch.device("meta"):  # nothing is allocated, and nobody's random numbers move
        head = build_head(config, shape, backbone.classes)
    last = last_dense(head)
    size = sum(p.numel() for p in head.parameters()) + (0 if last is None else features * (last.in_features + 1))
    value, state = batch * int(np.prod(shape)) * _FLOAT, heads * size * _FLOAT * _COPIES
    return round(value * _ON_TOP), round(state * _ON_TOP)


def _passing(backbone: Backbone, batch: int) -> int:
    """Bytes that a batch takes on its way through the backbone: the largest value, and what it is made of and into."""
    values = (node.meta.get("val") for node in backbone.graph.nodes)
    rows = [row_bytes(v) for v in values if isinstance(v, torch.Tensor) and v.dim() and not isinstance(v.shape[0], int)]
    return round(3 * max(rows, default=0) * batch * _ON_TOP)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
