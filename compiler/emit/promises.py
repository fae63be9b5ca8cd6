"""Operators whose translation to ONNX breaks what torch promises, or is slow, written so that it does neither.

`scaled_dot_product_attention` gives zeros to a query whose mask leaves it nothing to attend to: a padded token under
a sliding window. Its translation gives such a query the average over all keys. No answer of the backbone reads it,
but a head that pools over tokens does. It also looks for NaN in every weight of attention, of which there is none once
such queries are cared for, and turns the keys by two reshapes. Under a mask of booleans a product cares for them:
ONNX Runtime's `Where` takes up to three times as long. A mask that an `expand` spread over the queries is taken as it
was before: what becomes of it is worked out once, not for every query. (In programs `NumberMasks` has done most of
this.) Queries, keys and values stay three products: as one, sliced, all of a six-layer BERT took 0.99 / 1.02 to 1.06 /
1.07 of its time at batch 1 / 2 / 32 on two threads.

`gelu` is fused into one operator by ONNX Runtime if it is x/2 times (1 + erf), not x times half of it.

Numbers that are nearly neutral: the exporter's optimizer takes a number within 1e-8 of zero for zero, or within a
hundred-thousandth of one for one, and drops the operator. A norm with an epsilon that small then divides nothing by
nothing for a token of zeros. It looks at numbers alone, not at a list of one.

Attention over anything but four dimensions (windows beside heads), and a number less a tensor, have no translation;
both are the same as something that has.

`pad` with zeros before a max pool: ONNX Runtime merges the two into a pool with padding of its own, which is minus
infinity, so where a map is negative at its border the answer changes (seen with 1.31; BiT). Joining zeros to the map
leaves it nothing to merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from offramp.passes.attention import FINITE, unspread
from offramp.passes.backbone import attribute, copy_graph_module

aten = torch.ops.aten
_NEUTRAL = {aten.add.Tensor: 0.0, aten.sub.Tensor: 0.0, aten.mul.Tensor: 1.0, aten.div.Tensor: 1.0}
_NEAR = {"rel_tol": 1e-4, "abs_tol": 1e-7}  # what the optimizer takes for the same, and a margin


def keep_promises(module: fx.GraphModule) -> fx.GraphModule:
    """A copy, over the same weights, whose translation gives what `module` gives."""
    kept = copy_graph_module(module)
    for node in kept.graph.nodes:
        if node.target in PADS and any(user.target in _MAX_POOLS for user in node.users):
            node.target = joined
        if node.target is aten.scaled_dot_product_attention.default:
            node.args = (*node.args[:3], *map(unspread, node.args[3:]))
            node.kwargs = {name: unspread(value) for name, value in node.kwargs.items()}
            if any(mask.meta.get(FINITE) for mask in node.all_input_nodes):
                node.kwargs = {**node.kwargs, "finite": True}
        if any(_nearly(_NEUTRAL.get(node.target), value, kept) for value in node.args[:2]):
            node.target = _listed(node.target)
        node.target = _PROMISES.get(node.target, node.target)
    kept.recompile()
    return kept


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    finite: bool = False,
) -> torch.Tensor:
    """As `aten.scaled_dot_product_attention`: `[..., T, D]` attends to `[..., S, D]` under a mask `[..., T, S]`.

    `finite` says of a mask of numbers that none is infinite.
    """
    four, mask = query.dim() == 4, attn_mask
    q, k, v = (part if four else _four(part) for part in (query, key, value))
    if mask is not None and not four:
        mask = _four(mask.expand(*query.shape[:-2], *mask.shape[-2:]))
    seen = None
    if mask is not None and mask.dtype == torch.bool:
        seen = mask.to(q.dtype)
        mask = (seen - 1.0) * torch.finfo(q.dtype).max  # not infinity: where it is all there is, no weight is NaN
    if is_causal or enable_gqa or dropout_p:
        result: torch.Tensor = aten.scaled_dot_product_attention.default(
            q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    else:
        # Scaled before they are multiplied: float16 would not hold larger ones.
        scores = q * (q.size(-1) ** -0.5 if scale is None else scale) @ k.transpose(-1, -2)
        result = (scores if mask is None else scores + mask).softmax(-1) @ v
    if seen is not None:
        result = result * seen.amax(-1, keepdim=True)
    elif mask is not None and not finite:
        result = torch.where(mask.amax(-1, keepdim=True) > -torch.inf, result, 0.0)
    return result if four else result.reshape(*query.shape[:-1], value.shape[-1])


def gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """As `aten.gelu`."""
    if approximate != "none":
        return torch.nn.functional.gelu(x, approximate=approximate)
    return x * 0.5 * (torch.erf(x / math.sqrt(2)) + 1.0)


def _four(x: torch.Tensor) -> torch.Tensor:
    """`[..., H, T, D]` as `[N, H, T, D]`, `[H, T, D]` as `[1, H, T, D]`."""
    return x[None] if x.dim() == 3 else x.reshape(-1, *x.shape[-3:])


def _nearly(neutral: float | None, value: Any, module: fx.GraphModule) -> bool:
    """Whether an argument is a number, or a weight without dimensions, that is not neutral but may be taken for it."""
    if neutral is None:
        return False
    if isinstance(value, fx.Node) and value.op == "get_attr":
        held = attribute(module, str(value.target))
        value = held.item() if isinstance(held, torch.Tensor) and held.dim() == 0 else None
    return isinstance(value, float) and value != neutral and math.isclose(value, neutral, **_NEAR)


def _listed(operator: Any) -> Callable[..., torch.Tensor]:
    """As an operator of two arguments; what has no dimensions is a list of one."""

    def listed(x: Any, other: Any, **more: Any) -> torch.Tensor:
        if max(value.dim() for value in (x, other) if isinstance(value, torch.Tensor)):
            dtype = torch.result_type(x, other)
            x, other = _list_of_one(x, dtype), _list_of_one(other, dtype)
        made: torch.Tensor = operator(x, other, **more)
        return made

    return listed


def _list_of_one(value: Any, dtype: torch.dtype) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        return torch.full((1,), value, dtype=dtype)
    return value if value.dim() else value.reshape(1).to(dtype)


def rsub(x: torch.Tensor, other: float, alpha: float = 1) -> torch.Tensor:
    """As `aten.rsub.Scalar`: other - alpha x."""
    return (x if alpha == 1 else x * alpha).neg() + other


def joined(x: torch.Tensor, pads: Sequence[int], *rest: Any, **more: Any) -> torch.Tensor:
    """As `aten.pad` and `aten.constant_pad_nd` with a constant, by concatenation."""
    mode, value = mode_and_value(*rest, **more)
    if mode != "constant" or min(pads) < 0:
        return torch.nn.functional.pad(x, list(pads), mode, value)
    for index in range(len(pads) // 2):
        dimension = x.dim() - 1 - index
        sides = []
        for size in pads[2 * index : 2 * index + 2]:
            shape = [*x.shape[:dimension], size, *x.shape[dimension + 1 :]]
            sides.append(torch.full(shape, value or 0.0, dtype=x.dtype))
        x = torch.cat([sides[0], x, sides[1]], dimension)
    return x


def mode_and_value(*rest: Any, mode: str = "constant", value: float | None = None) -> tuple[str, float | None]:
    """`pad` takes a mode and a value, `constant_pad_nd` a value alone."""
    given = list(rest)
    if given and isinstance(given[0], str):
        mode = given.pop(0)
    return mode, (given[0] if given else value)


PADS = (aten.pad.default, aten.constant_pad_nd.default)
_MAX_POOLS = (aten.max_pool2d.default, aten.max_pool2d_with_indices.default, aten.max_pool1d.default)
_PROMISES: Mapping[Any, Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.gelu.default: gelu,
    aten.rsub.Scalar: rsub,
}
