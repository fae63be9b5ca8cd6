"""Passes that bring a captured graph into the form the analyses read.

1. `RemoveAssertions` drops run-time checks: they hold no value, and across a cut they would ask for one.
2. `RemoveIdentities` drops nodes that return their input at inference (dropout, detach, alias, clone, a slice of
   everything).
3. `FoldNumbers` and `FoldWeights` compute once what is made of weights alone; see `folding`.
4. `ReshapeViews` turns `view` into `reshape`: tracing wrote down views because of the strides it saw, but another
   kernel of the same operator (attention for no rows, or on another device) may lay its result out otherwise, and a
   `clone` that made them right may be gone by rule 2.
5. `NameSqueezed` says which dimensions a `squeeze` drops: those that are always one. Left to find out at run time, one
   of everything would drop the batch as well when one row is left, and ONNX has none that leaves alone what is larger.
6. `SpreadMasks` takes out of masks what is true whatever the batch; see `masks`.

All are safe on a functional graph: no node writes to its input, so two names for one value are one value, and
whether a reshape copies shows nowhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx

from .backbone import Backbone, copy_graph_module
from .contract import Pass, PassResult
from .folding import FoldNumbers, FoldWeights
from .masks import SpreadMasks

aten = torch.ops.aten

IDENTITIES: frozenset[Any] = frozenset(
    {
        aten.detach.default,
        aten.alias.default,
        aten.clone.default,
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.lift_fresh_copy.default,
    }
)
SQUEEZES = (aten.squeeze.default, aten.squeeze.dim)
VIEWS = (aten.view.default, aten._unsafe_view.default)
_TRAIN_ARGUMENT: dict[Any, int] = {
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
}


def is_assertion(node: fx.Node) -> bool:
    """A node that only checks something."""
    name = getattr(node.target, "__name__", str(node.target))
    return node.op == "call_function" and ("_assert" in name or name.startswith("sym_constrain_range"))


def is_identity(node: fx.Node) -> bool:
    """A node whose value at inference is its first argument."""
    if node.op != "call_function":
        return False
    if node.target is aten.slice.Tensor:
        return _takes_all(*node.args[2:], **{k: v for k, v in node.kwargs.items() if k in ("start", "end", "step")})
    if node.target not in IDENTITIES:
        return False
    position = _TRAIN_ARGUMENT.get(node.target)
    return position is None or len(node.args) <= position or not node.args[position]


def _takes_all(start: Any = None, end: Any = None, step: Any = 1) -> bool:
    return start in (None, 0) and end in (None, sys.maxsize) and step == 1


class RemoveAssertions(Pass[Backbone, Backbone]):
    """Drops nodes that only check."""

    def call(self, subject: Backbone) -> PassResult[Backbone]:
        return _without(subject, is_assertion)

    def ensures(self, subject: Backbone) -> list[str]:
        return [f"{n.name} still checks" for n in subject.graph.nodes if is_assertion(n)]


class RemoveIdentities(Pass[Backbone, Backbone]):
    """Drops nodes that return their input; their users read the input instead."""

    def call(self, subject: Backbone) -> PassResult[Backbone]:
        return _without(subject, is_identity)

    def ensures(self, subject: Backbone) -> list[str]:
        return [f"{n.name} still returns its input" for n in subject.graph.nodes if is_identity(n)]


class ReshapeViews(Pass[Backbone, Backbone]):
    """Views ask for strides; reshapes take what comes."""

    def call(self, subject: Backbone) -> PassResult[Backbone]:
        def reshape(node: fx.Node) -> None:
            node.target, node.args = aten.reshape.default, (node.args[0], _sizes_written_out(node))

        return _rewritten(subject, _views, reshape)

    def ensures(self, subject: Backbone) -> list[str]:
        return [f"{n.name} is still a view" for n in _views(subject)]


class NameSqueezed(Pass[Backbone, Backbone]):
    """Squeezes name the dimensions they drop."""

    def call(self, subject: Backbone) -> PassResult[Backbone]:
        def name_dimensions(node: fx.Node) -> None:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            sizes = source.meta["val"].shape
            meant = list(range(len(sizes)))
            if node.target is aten.squeeze.dim and sizes:
                meant = [meant[cast(int, node.args[1])]]
            always_one = [d for d in meant if isinstance(sizes[d], int) and sizes[d] == 1]
            node.target, node.args = aten.squeeze.dims, (source, always_one)
            if not always_one:
                node.replace_all_uses_with(source)
                node.graph.erase_node(node)

        return _rewritten(subject, _squeezes, name_dimensions)

    def ensures(self, subject: Backbone) -> list[str]:
        return [f"{n.name} squeezes whatever is one" for n in _squeezes(subject)]


NORMALISATION: tuple[Pass[Backbone, Backbone], ...] = (
    RemoveAssertions(),
    RemoveIdentities(),
    FoldNumbers(),
    FoldWeights(),
    ReshapeViews(),
    NameSqueezed(),
    SpreadMasks(),
)


def normalise(backbone: Backbone) -> Backbone:
    """All of them in a row."""
    for step in NORMALISATION:
        backbone = step(backbone).subject
    return backbone


def _rewritten(
    backbone: Backbone, find: Callable[[Backbone], list[fx.Node]], rewrite: Callable[[fx.Node], None]
) -> PassResult[Backbone]:
    """Every node found rewritten in place, in a copy."""
    if not find(backbone):
        return PassResult(backbone, modified=False)
    result = replace(backbone, graph_module=copy_graph_module(backbone.graph_module))
    for node in find(result):
        rewrite(node)
    result.graph.lint()
    result.graph_module.recompile()
    return PassResult(result, modified=True)


def _squeezes(backbone: Backbone) -> list[fx.Node]:
    return [node for target in SQUEEZES for node in backbone.graph.find_nodes(op="call_function", target=target)]


def _views(backbone: Backbone) -> list[fx.Node]:
    return [node for target in VIEWS for node in backbone.graph.find_nodes(op="call_function", target=target)]


def _sizes_written_out(node: fx.Node) -> Any:
    """The sizes a view is given, none left to be inferred: when there are no rows that one could be anything."""
    sizes = node.args[1]
    assert isinstance(sizes, list | tuple)
    known = node.meta["val"].shape
    return [k if s == -1 and isinstance(k, int) else s for s, k in zip(sizes, known, strict=True)]


def _without(backbone: Backbone, drop: Any) -> PassResult[Backbone]:
    if not any(drop(node) for node in backbone.graph.nodes):
        return PassResult(backbone, modified=False)
    module = copy_graph_module(backbone.graph_module)
    for node in reversed(list(module.graph.nodes)):
        if drop(node):
            if is_identity(node):
                node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return PassResult(replace(backbone, graph_module=module), modified=True)
