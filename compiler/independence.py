"""Row independence: a row's values must not depend on the rows that share its batch, or rows cannot leave it.

Checked by running: a batch, then a permuted part of it; the same rows must get the same values. At the scores
this is a condition on the model; at a cut, on the candidate: a model may shuffle rows and shuffle them back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offramp.passes import Backbone, Candidates, Refusal
from offramp.passes.taps import tap

# Batch norm, attention and resizing run other kernels at other batch sizes; what differs by no more than this
# share of the values' own scale is rounding, not dependence.
TOLERANCE = 1e-3
INDEPENDENT = "independent"  # the rule, as refusals have it


def permuted_part(rows: int) -> torch.Tensor:
    """Indices of half of the rows, in reverse."""
    return torch.arange(rows).flip(0)[: max(1, rows // 2)]


def difference(values: torch.Tensor, again: torch.Tensor, order: torch.Tensor) -> float:
    """Values of all rows `[B, ...]` and of the rows `order` run by themselves -> largest change over their scale."""
    scale = float(values.abs().max().clamp_min(1e-6))
    return float((again - values[order]).abs().max()) / scale


def keep_independent(backbone: Backbone, found: Candidates, arguments: Sequence[torch.Tensor]) -> Candidates:
    """Refuse the candidates at which a row's value, or one that travels with it, depends on its batch.

    `arguments` are example inputs in order.
    """
    own = {i.name for i in backbone.inputs}
    names = [c.name for c in found.kept]
    sides = sorted({side for c in found.kept for side in c.side_inputs} - own)
    taps = tap(backbone, [*names, *sides])
    order = permuted_part(len(arguments[0]))
    with torch.no_grad():
        _, *values = taps(*arguments)
        _, *again = taps(*(a[order] for a in arguments))
    pairs = list(zip(values, again, strict=True))
    changes = {name: difference(v, w, order) for name, (v, w) in zip(names, pairs[: len(names)], strict=True)}
    bound = {side for side, (v, w) in zip(sides, pairs[len(names) :], strict=True) if not _alike(v[order], w)}
    refused = []
    for candidate in found.kept:
        travelling = [side for side in candidate.side_inputs if side in bound]
        reasons = [f"{side}, which travels with the rows, changes with the rows beside it" for side in travelling]
        if not changes[candidate.name] <= TOLERANCE:
            change = f"{changes[candidate.name]:.1%} of its scale"
            reasons.insert(0, f"a row's value changes by {change} with the rows beside it")
        if reasons:
            refused.append(Refusal(candidate.name, candidate.place, reasons[0], INDEPENDENT))
    gone = {r.name for r in refused}
    return Candidates(tuple(c for c in found.kept if c.name not in gone), (*found.refused, *refused))


def _alike(values: torch.Tensor, again: torch.Tensor) -> bool:
    """Of what may be a mask or indices: infinity is as good a value as any."""
    if values.shape != again.shape:
        return False
    return torch.allclose(values.double(), again.double(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
