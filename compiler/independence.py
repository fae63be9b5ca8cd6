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


def permuted_part(rows: int) -> torch.Tensor:
    """Indices of half of the rows, in reverse."""
    return torch.arange(rows).flip(0)[: max(1, rows // 2)]


def difference(values: torch.Tensor, again: torch.Tensor, order: torch.Tensor) -> float:
    """Values of all rows `[B, ...]` and of the rows `order` run by themselves -> largest change over their scale."""
    scale = float(values.abs().max().clamp_min(1e-6))
    return float((again - values[order]).abs().max()) / scale


def keep_independent(backbone: Backbone, found: Candidates, arguments: Sequence[torch.Tensor]) -> Candidates:
    """Refuse the candidates at which a row's value depends on its batch; `arguments` are example inputs in order."""
    taps = tap(backbone, [c.name for c in found.kept])
    order = permuted_part(len(arguments[0]))
    with torch.no_grad():
        _, *values = taps(*arguments)
        _, *again = taps(*(a[order] for a in arguments))
    changes = {c.name: difference(v, w, order) for c, v, w in zip(found.kept, values, again, strict=True)}
    refused = [
        Refusal(
            c.name, c.place, f"a row's value changes by {changes[c.name]:.1%} of its scale with the rows beside it",
            "independent",
        )
        for c in found.kept
        if not changes[c.name] <= TOLERANCE
    ]  # fmt: skip
    names = {r.name for r in refused}
    return Candidates(tuple(c for c in found.kept if c.name not in names), (*found.refused, *refused))
