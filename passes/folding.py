"""`FoldNumbers`, `FoldWeights`: what is computed from weights alone is computed once, here, and not at every call.

Weight standardisation (which traces as a batch norm in training mode over the weights), weight norm, a table of
relative positions spread over pairs of tokens: such nodes have no row in them, so they are no part of what an exit
could save, and a segment would repeat them for every batch. A value is folded unless it would take more memory than
the weights it is made of, or views of weights are all it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .backbone import Backbone, attribute, copy_graph_module, is_size, is_view
from .contract import Pass, PassResult


class FoldNumbers(Pass[Backbone, Backbone]):
    """Numbers read out of weights, a temperature's `.item()`, are written where they are used."""

    def call(self, subject: Backbone) -> PassResult[Backbone]:
        if not numbers(subject):
            return PassResult(subject, modified=False)
        result = replace(subject, graph_module=copy_graph_module(subject.graph_module))
        values = _computed(result)
        for node in numbers(result):
            written = functools.partial(_written, node, values[node])
            for user in list(node.users):
                user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), written)
        result.graph.eliminate_dead_code()
        result.graph.lint()
        return PassResult(replace(result, graph_module=copy_graph_module(result.graph_module)), modified=True)

    def ensures(self, subject: Backbone) -> list[str]:
        return [f"{n.name} is still read out of weights" for n in numbers(subject)]


def numbers(backbone: Backbone) -> list[fx.Node]:
    """Nodes that are numbers made of weights alone, and read by what is not."""
    constant = _constant(backbone)
    return [n for n in constant if is_size(n) and any(user not in constant for user in n.users)]


def _written(node: fx.Node, value: Any, argument: fx.Node) -> Any:
    return value if argument is node else argument


class FoldWeights(Pass[Backbone, Backbone]):
    """Values made of weights alone become weights, named after the first of those."""

    def call(self, subject: Backbone) -> PassResult[Backbone]:
        if not foldable(subject):
            return PassResult(subject, modified=False)
        result = replace(subject, graph_module=copy_graph_module(subject.graph_module))
        values = _computed(result)
        for node, leaves in foldable(result).items():
            _replace(result.graph_module, node, leaves, values[node])
        result.graph.eliminate_dead_code()
        result.graph.lint()
        # Copied again, for a graph module holds what its graph read when it was made.
        return PassResult(replace(result, graph_module=copy_graph_module(result.graph_module)), modified=True)

    def ensures(self, subject: Backbone) -> list[str]:
        return [f"{n.name} is still computed from weights alone" for n in foldable(subject)]


def foldable(backbone: Backbone) -> dict[fx.Node, list[fx.Node]]:
    """Nodes to fold, in graph order, with the weights (`get_attr` nodes) each is made of."""
    constant = _constant(backbone)
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in constant:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or all(user in constant for user in node.users):
            continue
        made_of = _below(node)
        leaves = [n for n in made_of if n.op == "get_attr"]
        weights = [attribute(backbone.graph_module, str(n.target)) for n in leaves]
        views = all(is_view(n) for n in made_of if n.op == "call_function")
        learned = any(isinstance(w, torch.nn.Parameter) for w in weights)
        if learned and not views and _size([value]) <= _size(weights):
            found[node] = leaves
    return found


def _constant(backbone: Backbone) -> dict[fx.Node, None]:
    """Operators whose arguments are weights or such operators, in graph order; none that draws numbers at random."""
    found: dict[fx.Node, None] = {}
    for node in backbone.graph.nodes:
        sources = node.all_input_nodes
        target = node.target
        if node.op != "call_function" or not sources or not all(s.op == "get_attr" or s in found for s in sources):
            continue
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
            continue
        found[node] = None
    return found


def _below(node: fx.Node) -> list[fx.Node]:
    """The node and all it is made of, first arguments first."""
    seen: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        found = todo.pop()
        if found not in seen:
            seen[found] = None
            todo += reversed(found.all_input_nodes)
    return list(seen)


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _computed(backbone: Backbone) -> dict[fx.Node, Any]:
    """The value of every node that is computed from weights alone."""
    module = backbone.graph_module
    values = {n: attribute(module, str(n.target)) for n in backbone.graph.nodes if n.op == "get_attr"}
    with torch.no_grad():
        for node in _constant(backbone):
            arguments = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            assert callable(node.target)
            values[node] = node.target(*arguments[0], **arguments[1])
    return values


def _replace(module: fx.GraphModule, node: fx.Node, leaves: list[fx.Node], value: torch.Tensor) -> None:
    """In place: `node` reads a new weight beside the first of `leaves`."""
    first = next(n for n in leaves if isinstance(attribute(module, str(n.target)), torch.nn.Parameter))
    path, _, leaf = str(first.target).rpartition(".")
    owner = module.get_submodule(path)
    name = f"{leaf}_folded"
    while hasattr(owner, name):
        name += "_"
    owner.register_parameter(name, torch.nn.Parameter(value.detach().clone(), value.is_floating_point()))
    with module.graph.inserting_before(node):
        read = module.graph.get_attr(f"{path}.{name}" if path else name)
    read.meta = {key: kept for key, kept in node.meta.items() if key in ("val", "nn_module_stack")}
    node.replace_all_uses_with(read)
