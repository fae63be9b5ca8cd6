"""`NumberMasks`: what attention makes of a mask of booleans is made once.

A backend adds numbers to attention's scores, nothing where a key may be seen and a very negative number where not, and
a query that may see no key at all gets zeros [torch.nn.functional.scaled_dot_product_attention]. Both are made of the
mask by a few small operators. In one graph they are shared by all layers; cut into stages, every stage would make
them again, which small batches feel. As values of the backbone they are side values like the mask was, computed in the
first segment, and travel in its place. Rules:

1. Only masks `[B, ..., 1, T]` of booleans, alike for all queries, are looked at: as numbers they take four times as
   much to carry.
2. Such a mask is taken as it was before an `expand` spread it, and made into numbers where it is known.
3. The attention node's name goes to the product behind it, which has its value.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .backbone import Backbone, copy_graph_module
from .contract import Pass, PassResult

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
FINITE = "finite"  # in a node's meta: a mask of numbers, none of which is infinite
# Half as low as float16 goes, for stages may be converted, and a score is added. A weight is zero long before.
_UNSEEN = torch.finfo(torch.float16).min / 2
_MASK = 3  # its place among attention's arguments


class NumberMasks(Pass[Backbone, Backbone]):
    """All such masks of a backbone."""

    def call(self, subject: Backbone) -> PassResult[Backbone]:
        if not any(_mask_of(node) for node in subject.graph.nodes):
            return PassResult(subject, modified=False)
        result = replace(subject, graph_module=copy_graph_module(subject.graph_module))
        made: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for node in list(result.graph.nodes):
            if (mask := _mask_of(node)) is not None:
                if mask not in made:
                    made[mask] = _numbers(result.graph, mask)
                _replace(result.graph, node, *made[mask])
        result.graph.eliminate_dead_code()
        result.graph.lint()
        result.graph_module.recompile()
        return PassResult(result, modified=True)

    def ensures(self, subject: Backbone) -> list[str]:
        return [f"{node.name} still reads a mask of booleans" for node in subject.graph.nodes if _mask_of(node)]


def unspread(mask: Any) -> Any:
    """Rule 2: the mask that was spread over as many dimensions to give this one."""
    while isinstance(mask, fx.Node) and mask.target is aten.expand.default:
        source = mask.args[0]
        assert isinstance(source, fx.Node)
        if source.meta["val"].dim() != mask.meta["val"].dim():
            break
        mask = source
    return mask


def _mask_of(node: fx.Node) -> fx.Node | None:
    """Rule 1, and 2."""
    if node.target is not ATTENTION or len(node.args) <= _MASK:
        return None
    mask = unspread(node.args[_MASK])
    value = mask.meta.get("val") if isinstance(mask, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.dim() != node.meta["val"].dim():
        return None
    return mask if value.shape[-2] == 1 else None


def _numbers(graph: fx.Graph, mask: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What is added to scores `[..., 1, T]`, and whether there is any key `[..., 1, 1]`: one or zero."""
    stack = {"nn_module_stack": mask.meta["nn_module_stack"]} if "nn_module_stack" in mask.meta else {}
    value = mask.meta["val"].to(torch.float32)

    def call(name: str, value: torch.Tensor, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.create_node("call_function", target, args, kwargs, name=f"{mask.name}_{name}")
        made.meta = {"val": value, **stack}
        return made

    *_, last_input = graph.find_nodes(op="placeholder")
    known = last_input if mask.op == "placeholder" else mask
    with graph.inserting_before(known.next):
        seen = call("seen", value, aten._to_copy.default, mask, dtype=torch.float32)
        less = call("less", value, aten.sub.Tensor, seen, 1.0)
        added = call("added", value, aten.mul.Tensor, less, -_UNSEEN)
        some = call("some", value.amax(-1, keepdim=True), aten.amax.default, seen, [-1], True)
    added.meta[FINITE] = True
    return added, some


def _replace(graph: fx.Graph, node: fx.Node, added: fx.Node, some: fx.Node) -> None:
    """Rule 3."""
    with graph.inserting_before(node):
        attended = graph.call_function(ATTENTION, (*node.args[:_MASK], added, *node.args[_MASK + 1 :]), node.kwargs)
    attended.meta = dict(node.meta)
    node.target, node.args, node.kwargs = aten.mul.Tensor, (attended, some), {}
