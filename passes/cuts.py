"""Cuts: nodes whose value, together with side inputs, determines the backbone's output.

The graph walked has one vertex per node that carries data computed from an input; sizes, parameters and what
is computed from them alone are left out. Values computed from the inputs alone without parameters or counted
compute (a mask spread over heads, token ids) are *side values*: edges out of them do not break a cut. From a
virtual source in front of everything that reads only side values, the immediate post-dominators up to the
output are the cuts: no path from source to output goes round one of them.

Streams that run side by side until late (encoder and decoder, two towers) would have no cut before they meet. So the
stream with the most compute runs first and has cuts of its own; the others wait: they start behind the last cut
before they are needed, from side values carried there. What a waiting stream made is never carried over a cut.

A side value still read behind a cut is a *side input*: it travels with the live rows. It can travel only if
its dimension 0 is the batch; otherwise, and where it is another one spread (`expand`), it is computed again behind the
cut from side values that can. So does the smallest side value that has a size which is read behind the cut, where the
cut's own value has no such dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import fx

from .backbone import Backbone, attribute, captured_size, is_size, tensor_values
from .flops import node_flops

SOURCE = "<source>"
_TOGETHER = 0.05  # of the compute: streams that meet before it is spent are one


@dataclass(frozen=True)
class Cut:
    """A single dominator and what must travel with it."""

    node: fx.Node
    side_inputs: tuple[fx.Node, ...]  # side values read behind the cut that can be carried
    stuck: tuple[fx.Node, ...]  # side values and sizes read behind the cut that cannot
    side_bytes: int  # per row, at the captured sizes


@dataclass(frozen=True, eq=False)
class ValueGraph:
    """What the analyses know of a backbone: its value-carrying nodes, side values, cuts and FLOPs."""

    backbone: Backbone
    carrying: frozenset[fx.Node]  # nodes whose value is computed from an input
    side: frozenset[fx.Node]  # of those, the side values
    flops: Mapping[str, float]  # per row, by node name
    graph: nx.DiGraph = field(repr=False)  # non-side carrying nodes, SOURCE and the output node

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """Position of each node in the backbone's graph."""
        return {node: index for index, node in enumerate(self.backbone.graph.nodes)}

    @cached_property
    def dominators(self) -> tuple[fx.Node, ...]:
        """The post-dominators of the source in order, output excluded."""
        output = next(n for n in self.graph if isinstance(n, fx.Node) and n.op == "output")
        immediate = nx.immediate_dominators(self.graph.reverse(copy=False), output)
        return self._without_leaks(_chain(immediate, SOURCE)[1:-1])

    def _without_leaks(self, chain: list[fx.Node]) -> tuple[fx.Node, ...]:
        """The chain without those cuts that a value of a waiting stream would have to pass."""
        waiting = set(self.graph) - nx.descendants(self.graph, SOURCE) - {SOURCE}
        segment = self.segment_of(chain)
        leaks: set[int] = set()
        for node in waiting:
            leaks.update(range(segment[node], max(segment[user] for user in self.graph.successors(node))))
        return tuple(cut for index, cut in enumerate(chain) if index not in leaks)

    def segment_of(self, cuts: Iterable[fx.Node]) -> dict[fx.Node, int]:
        """Non-side carrying node -> index of its segment, for cuts (dominators) from shallow to deep.

        A node belongs to the first segment that any of its users belongs to: whoever feeds an ancestor of a
        cut is one too.
        """
        cuts = list(cuts)
        position = {cut: index for index, cut in enumerate(cuts)}
        segment: dict[fx.Node, int] = {}
        for node in sorted((n for n in self.graph if n != SOURCE), key=self.order.__getitem__, reverse=True):
            users = [segment[user] for user in self.graph.successors(node)]
            segment[node] = position.get(node, min(users, default=len(cuts)))
        return segment

    @cached_property
    def _flops_until(self) -> dict[fx.Node, float]:
        segment = self.segment_of(self.dominators)
        spent = [0.0] * (len(self.dominators) + 1)
        for node, index in segment.items():
            spent[index] += self.flops.get(node.name, 0.0)
        return dict(zip(self.dominators, itertools.accumulate(spent), strict=False))

    def flops_until(self, cut: fx.Node) -> float:
        """FLOPs per row spent when `cut`, one of `dominators`, is known."""
        return self._flops_until[cut]

    def bypass(self, node: fx.Node) -> tuple[fx.Node | None, fx.Node]:
        """For a node that is no dominator: (a value that goes round it, None for an input; where they join)."""
        dominators = set(self.dominators)
        reached = {node}
        todo = [node]
        while todo:
            for user in sorted(self.graph.successors(todo.pop(0)), key=self.order.__getitem__):
                for source in self.graph.predecessors(user):
                    if source not in reached and not nx.has_path(self.graph, node, source):
                        return (None if source == SOURCE else source), user
                if user not in reached and user not in dominators:
                    todo.append(user)
                reached.add(user)
        raise AssertionError(f"{node.name} is a dominator")

    def total_flops(self) -> float:
        """FLOPs per row of the whole backbone."""
        return sum(self.flops.values())

    def cut(self, node: fx.Node) -> Cut:
        """What must travel with `node`, were it a cut. `node` must be one of `dominators`."""
        behind = {n for n, index in self.segment_of([node]).items() if index == 1}
        read: list[fx.Node] = []
        for n in sorted(behind, key=self.order.__getitem__):
            read += data_arguments(n)
        carried, stuck = self.travelling(behind, node, read)
        size = sum(row_bytes(n.meta["val"]) for n in carried)
        return Cut(node, carried, stuck, size)

    def carried(self, read: Iterable[fx.Node]) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
        """Nodes read somewhere -> (side values to carry so that all can be had there, those that cannot be).

        A side value that travels is carried itself; any other is computed again from its arguments, which are
        carried in its place. Sizes and constants are computed where they are read.
        """
        carried: dict[fx.Node, None] = {}
        stuck: dict[fx.Node, None] = {}
        seen: set[fx.Node] = set()
        todo = list(read)
        while todo:
            node = todo.pop(0)
            if node in seen:
                continue
            seen.add(node)
            if self._travels(node):
                carried[node] = None
            elif node in self.side and node.op == "placeholder":
                stuck[node] = None
            elif node not in self.graph:
                todo += data_arguments(node)
        return tuple(sorted(carried, key=self.order.__getitem__)), tuple(stuck)

    def travelling(
        self, members: Collection[fx.Node], cut: fx.Node, read: Iterable[fx.Node]
    ) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
        """As `carried`, for `members` that read `read` behind a cut: with what has the sizes that they read as well."""
        carried, stuck = self.carried(read)
        for size in self._sizes_unknown(members, (cut, *carried)):
            bearers = [n for n in self.side if self._could_travel(n) and str(size.meta["val"]) in _sizes_of(n)]
            if not bearers:
                stuck = (*stuck, size)
            elif not {*bearers} & {*carried}:
                smallest = min(bearers, key=lambda n: (row_bytes(n.meta["val"]), self.order[n]))
                carried = tuple(sorted((*carried, smallest), key=self.order.__getitem__))
        return carried, stuck

    def _sizes_unknown(self, members: Collection[fx.Node], inputs: Sequence[fx.Node]) -> list[fx.Node]:
        """Sizes read by members, or by what they compute anew, that neither inputs nor members have."""
        own = {*members, *inputs}
        known = {size for node in inputs for size in _sizes_of(node)}
        unknown: list[fx.Node] = []
        seen: set[fx.Node] = set()
        todo = [argument for node in members for argument in node.all_input_nodes]
        while todo:
            node = todo.pop()
            if node in seen or node in own or (is_size(node) and str(node.meta["val"]) in known):
                continue
            seen.add(node)
            if is_size(node) and any(a not in own and self._is_elsewhere(a) for a in data_arguments(node)):
                unknown.append(node)
            else:
                todo += node.all_input_nodes
        return sorted(unknown, key=self.order.__getitem__)

    def _is_elsewhere(self, node: fx.Node) -> bool:
        """Whether a value is never computed anew."""
        return node in self.graph or node.op == "placeholder" or self._travels(node)

    def _travels(self, node: fx.Node) -> bool:
        """Whether it is a side value that can be carried over a cut, and is worth more than one it repeats."""
        spread = node.target is torch.ops.aten.expand.default and self._could_travel(node.all_input_nodes[0])
        return self._could_travel(node) and not spread

    def _could_travel(self, node: fx.Node) -> bool:
        return node in self.side and self.is_compactable(node)

    def is_compactable(self, node: fx.Node) -> bool:
        """Whether dimension 0 of the value is exactly the batch symbol."""
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.dim() > 0 and str(value.shape[0]) == self.backbone.batch_symbol


def analyse(backbone: Backbone) -> ValueGraph:
    """`Backbone` (normalised) -> `ValueGraph`."""
    flops = node_flops(backbone.graph_module, backbone.batch_symbol)
    carrying: set[fx.Node] = set()
    side: set[fx.Node] = set()
    graph = nx.DiGraph()
    graph.add_node(SOURCE)
    for node in backbone.graph.nodes:
        sources = [n for n in data_arguments(node) if n in carrying]
        if node.op == "placeholder":
            carrying.add(node)
            side.add(node)
        elif sources:
            carrying.add(node)
            if node.op != "output" and _is_free(node, flops, backbone.graph_module) and all(n in side for n in sources):
                side.add(node)
                continue
            inner = [n for n in sources if n not in side]
            graph.add_edges_from((source, node) for source in inner or (SOURCE,))
    graph = _needed(graph)
    _let_wait(graph, flops)
    return ValueGraph(backbone, frozenset(carrying), frozenset(side), flops, graph)


def _needed(graph: nx.DiGraph) -> nx.DiGraph:
    """The part of the graph that reaches the output."""
    outputs = [n for n in graph if isinstance(n, fx.Node) and n.op == "output"]
    keep = {SOURCE, *outputs}
    for output in outputs:
        keep |= nx.ancestors(graph, output)
    return graph.subgraph(keep).copy()


def _let_wait(graph: nx.DiGraph, flops: Mapping[str, float]) -> None:
    """In place: no edge from the source to the entries of streams that wait."""
    entries = list(graph.successors(SOURCE))
    output = next(n for n in graph if isinstance(n, fx.Node) and n.op == "output")
    immediate = nx.immediate_dominators(graph.reverse(copy=False), output)
    limit = _TOGETHER * sum(flops.values())

    def spent(nodes: Iterable[object]) -> float:
        return sum(flops.get(n.name, 0.0) for n in nodes if isinstance(n, fx.Node))

    def before(node: fx.Node) -> set[object]:
        return {node, *nx.ancestors(graph, node)}

    joined = immediate[SOURCE]
    if len(entries) < 2 or spent(before(joined)) <= limit:
        return
    first = max(entries, key=lambda e: spent(before(joined) & nx.descendants(graph, e)))
    own = _chain(immediate, first)
    for entry in entries:
        if entry is first:
            continue
        others = set(_chain(immediate, entry))
        if spent(before(next(n for n in own if n in others))) > limit:
            graph.remove_edge(SOURCE, entry)


def _chain(immediate: Mapping[object, object], start: object) -> list[fx.Node]:
    """`start` and its dominators up to the root."""
    chain = [start]
    while immediate.get(chain[-1], chain[-1]) not in (None, chain[-1]):
        chain.append(immediate[chain[-1]])
    return chain  # type: ignore[return-value]


def _is_free(node: fx.Node, flops: Mapping[str, float], module: torch.nn.Module) -> bool:
    """No counted compute and no parameter read; buffers and constants (a mask's minus infinity) are none."""
    read = [attribute(module, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
    return not flops.get(node.name) and not any(isinstance(value, torch.nn.Parameter) for value in read)


def _sizes_of(node: fx.Node) -> set[str]:
    """A value's dimensions that vary."""
    sizes: Iterable[Any] = value.shape if isinstance(value := node.meta.get("val"), torch.Tensor) else ()
    return {str(size) for size in sizes if isinstance(size, torch.SymInt)}


def data_arguments(node: fx.Node) -> list[fx.Node]:
    """Arguments that hold data: SymInt edges are dropped, or a ViT would have cuts only in its last block."""
    return [n for n in node.all_input_nodes if n.op != "get_attr" and not is_size(n)]


def row_bytes(value: object) -> int:
    """Bytes one row of a fake value takes, at the captured sizes."""
    total = 0
    for tensor in tensor_values(value):
        elements = 1
        for size in tensor.shape[1:]:
            elements *= captured_size(size)
        total += elements * tensor.element_size()
    return total
