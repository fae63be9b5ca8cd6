"""Features: what the backbone's last layer reads of a row, which says more of it than the scores do."""

from __future__ import annotations

from .backbone import Backbone
from .candidates import Context, Limits, batch_first, one_tensor
from .cuts import analyse


def last_features(backbone: Backbone) -> str | None:
    """`Backbone` (normalised) -> name of the deepest value that decides the scores and has compute behind it.

    It is `[B, D]`, `[B, T, D]` or `[B, C, H, W]` float32, as a head could read it. None where no value is.
    """
    values = analyse(backbone)
    context, total = Context(values, Limits(), {}), values.total_flops()
    for node in reversed(values.dominators):
        one_to_read = one_tensor(node, context) is None and batch_first(node, context) is None
        if one_to_read and values.flops_until(node) < total:
            return node.name
    return None
