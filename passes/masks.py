"""`SpreadMasks`: what a mask holds true whatever the batch is no part of it.

Libraries make a mask as a function of (query, key) and join what is always so, a position that is not negative, to what
the batch says of its keys. Written as the latter alone, spread over the queries, it is known to be the same for all of
them: it can travel as one row and be looked at once. Rules:

1. True everywhere are booleans made as ones, positions (`arange`, a number added or not) that are no less than a number
   they are compared with, `and`s of such values, and views of them.
2. `a & b` with a true everywhere is b, spread to the shape of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .backbone import Backbone, copy_graph_module, is_size, is_view
from .contract import Pass, PassResult

aten = torch.ops.aten
ANDS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_ONES = (aten.ones.default, aten.new_ones.default, aten.ones_like.default)
_COMPARISONS: dict[Any, Callable[[float, float], bool]] = {
    aten.ge.Scalar: lambda least, bound: least >= bound,
    aten.gt.Scalar: lambda least, bound: least > bound,
}


class SpreadMasks(Pass[Backbone, Backbone]):
    """Rule 2, wherever there is such an `and`."""

    def call(self, subject: Backbone) -> PassResult[Backbone]:
        if not any(map(_other_side, subject.graph.nodes)):
            return PassResult(subject, modified=False)
        result = replace(subject, graph_module=copy_graph_module(subject.graph_module))
        for node in result.graph.nodes:
            if (mask := _other_side(node)) is not None:
                _replace(result.graph, node, mask)
        result.graph.eliminate_dead_code()
        result.graph.lint()
        result.graph_module.recompile()
        return PassResult(result, modified=True)

    def ensures(self, subject: Backbone) -> list[str]:
        return [f"{node.name} still asks what is always true" for node in subject.graph.nodes if _other_side(node)]


def _other_side(node: fx.Node) -> fx.Node | None:
    """Of an `and` with what is true everywhere, the other side."""
    if node.target not in ANDS or not node.users:
        return None
    one, other = node.args
    if not (isinstance(one, fx.Node) and isinstance(other, fx.Node) and _is_boolean(one) and _is_boolean(other)):
        return None
    return other if _is_true(one) else one if _is_true(other) else None


def _replace(graph: fx.Graph, node: fx.Node, mask: fx.Node) -> None:
    """In place: `node` is `mask`, spread where the shapes differ."""
    # Sizes that vary are compared by name: as numbers they may be the same by chance.
    wanted, given = (list(map(str, one.meta["val"].shape)) for one in (node, mask))
    if wanted == given:
        node.replace_all_uses_with(mask)
        return
    ahead = len(wanted) - len(given)
    with graph.inserting_before(node):
        sizes = [
            -1 if at >= ahead and size == given[at - ahead] else _size(graph, node, at)
            for at, size in enumerate(wanted)
        ]
    node.target, node.args, node.kwargs = aten.expand.default, (mask, sizes), {}
    # As `expand` lays it out: one row, read again and again.
    node.meta["val"] = mask.meta["val"].expand(node.meta["val"].shape)


def _size(graph: fx.Graph, node: fx.Node, dimension: int) -> int | fx.Node:
    """A size of the node's value: a number, or who says it."""
    size = node.meta["val"].shape[dimension]
    if isinstance(size, int):
        return size
    known: fx.Node
    for known in graph.nodes:
        if known is node:
            break
        if is_size(known) and str(known.meta["val"]) == str(size):
            return known
    sides = ((side, dimension - node.meta["val"].dim() + side.meta["val"].dim()) for side in node.all_input_nodes)
    side, at = next((side, at) for side, at in sides if at >= 0 and str(side.meta["val"].shape[at]) != "1")
    made: fx.Node = graph.call_function(aten.sym_size.int, (side, at))
    made.meta["val"] = size
    return made


def _is_boolean(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _is_true(node: object) -> bool:
    """Rule 1."""
    if not isinstance(node, fx.Node) or not _is_boolean(node):
        return False
    if node.target in _ONES:
        return True
    if node.target in _COMPARISONS:
        positions, bound = node.args
        return isinstance(bound, int | float) and _COMPARISONS[node.target](_least(positions), bound)
    if node.target in ANDS:
        return all(map(_is_true, node.args))
    return is_view(node) and _is_true(node.args[0])


def _least(node: object) -> float:
    """A bound that no value of positions is below; minus infinity where none is known."""
    if not isinstance(node, fx.Node):
        return -math.inf
    if node.target is aten.arange.default:
        return 0
    if node.target is aten.arange.start:
        return node.args[0] if isinstance(node.args[0], int) else -math.inf
    if node.target is aten.add.Tensor and isinstance(node.args[1], int) and not node.kwargs:
        return _least(node.args[0]) + node.args[1]
    return _least(node.args[0]) if is_view(node) else -math.inf
