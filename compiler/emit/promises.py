"""Operators whose translation to ONNX does not keep what torch promises, written so that it does.

`scaled_dot_product_attention` gives zeros to a query whose mask leaves it nothing to attend to: a padded token under
a sliding window. Its translation gives such a query the average over all keys. No answer of the backbone reads it,
but a head that pools over tokens does.

`add` of a tiny number: the exporter's optimizer takes a constant within 1e-8 of zero for zero and drops the addition.
A norm with an epsilon that small then divides nothing by nothing for a token of zeros.

Attention over anything but four dimensions (windows beside heads), and a number less a tensor, have no translation;
both are the same as something that has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from offramp.passes.backbone import copy_graph_module

aten = torch.ops.aten
_TAKEN_FOR_ZERO = 1e-7  # by the optimizer, and a margin
_SCALE = 2.0**20


def keep_promises(module: fx.GraphModule) -> fx.GraphModule:
    """A copy, over the same weights, whose translation gives what `module` gives."""
    kept = copy_graph_module(module)
    for node in kept.graph.nodes:
        node.target = _PROMISES.get(node.target, node.target)
    kept.recompile()
    return kept


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *rest: Any,
    **more: Any,
) -> torch.Tensor:
    """As `aten.scaled_dot_product_attention`: `[..., T, D]` attends to `[..., S, D]` under a mask `[..., T, S]`."""
    given = (query, key, value) if query.dim() == 4 else tuple(_four(part) for part in (query, key, value))
    mask = attn_mask
    if mask is not None and query.dim() != 4:
        mask = _four(mask.expand(*query.shape[:-2], *mask.shape[-2:]))
    result: torch.Tensor = aten.scaled_dot_product_attention.default(*given, mask, *rest, **more)
    if mask is not None:
        allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
        result = torch.where(allowed.any(-1, keepdim=True), result, 0.0)
    return result.reshape(*query.shape[:-1], value.shape[-1]) if query.dim() != 4 else result


def _four(x: torch.Tensor) -> torch.Tensor:
    """`[..., H, T, D]` as `[N, H, T, D]`, `[H, T, D]` as `[1, H, T, D]`."""
    return x[None] if x.dim() == 3 else x.reshape(-1, *x.shape[-3:])


def add(x: torch.Tensor, other: Any, **more: Any) -> torch.Tensor:
    """As `aten.add`. Scaling by a power of two is exact, and beside the scaled number nothing is lost."""
    tiny = isinstance(other, float) and 0 < abs(other) <= _TAKEN_FOR_ZERO and not more
    if not tiny or not x.is_floating_point():
        added: torch.Tensor = torch.add(x, other, **more)
        return added
    scaled: torch.Tensor = (x * _SCALE + other * _SCALE) / _SCALE
    return scaled


def rsub(x: torch.Tensor, other: float, alpha: float = 1) -> torch.Tensor:
    """As `aten.rsub.Scalar`: other - alpha x."""
    return (x if alpha == 1 else x * alpha).neg() + other


_PROMISES: Mapping[Any, Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.add.Tensor: add,
    aten.rsub.Scalar: rsub,
}
