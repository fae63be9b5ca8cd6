"""Cutting a backbone at chosen cuts into segments that run one after the other.

Segment i reads the value of cut i-1 and the side inputs it needs, and yields the value of cut i. Rules:

1. A node that carries data belongs to exactly one segment; so does every parameter.
2. Side inputs that must be computed are computed by segment 0 and travel from there.
3. Sizes, constants and side values that cannot travel are computed again in every segment that reads them.
   A size that is a dimension of one of the segment's own inputs is read off that input: after compaction the
   batch is smaller than the one that came in.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from offramp.runtime.errors import PassError, PlanError

from .backbone import Backbone, captured_size, is_size, value_name
from .cuts import ValueGraph, analyse, data_arguments


@dataclass(frozen=True)
class Segment:
    """One piece of the backbone. Values are named as in the backbone's graph."""

    graph_module: fx.GraphModule  # placeholders: `inputs`; returns a tuple: `outputs`
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]  # the cut (or the scores), then in segment 0 the side inputs computed there
    carries: tuple[str, ...]  # of all values known after this segment, those that later ones read
    flops: float  # per row

    def __call__(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Values of `inputs` `[b, ...]` -> values of `outputs` `[b, ...]`; for no rows nothing is computed."""
        if values and not len(values[0]):
            return self._nothing(values[0].device)
        result: tuple[torch.Tensor, ...] = self.graph_module(*values)
        return result

    def _nothing(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        (output,) = self.graph_module.graph.find_nodes(op="output")
        made = [node.meta["val"] for node in output.args[0]]
        return tuple(torch.empty(0, *map(captured_size, v.shape[1:]), dtype=v.dtype, device=device) for v in made)


def split(backbone: Backbone, cuts: Sequence[str]) -> tuple[Segment, ...]:
    """`Backbone` (normalised) and cut names from shallow to deep -> `len(cuts) + 1` segments.

    Raises `PlanError` when a name is not a single dominator, the order is not the graph's, or a side value
    behind a cut cannot travel.
    """
    values = analyse(backbone)
    nodes = _cut_nodes(values, cuts)
    return _Splitter(values, nodes).segments()


def _cut_nodes(values: ValueGraph, cuts: Sequence[str]) -> list[fx.Node]:
    dominators = {node.name: node for node in values.dominators}
    for name in cuts:
        if name not in dominators:
            raise PlanError(f"{name!r} is not a place for an exit in {values.backbone.name}; see `offramp candidates`")
    nodes = [dominators[name] for name in cuts]
    if nodes != sorted(nodes, key=values.order.__getitem__):
        raise PlanError(f"exits must go from shallow to deep, not {', '.join(cuts)}")
    return nodes


class _Splitter:
    """Builds the segments' graphs one node at a time; holds what all segments share."""

    def __init__(self, values: ValueGraph, cuts: list[fx.Node]) -> None:
        self.values = values
        self.cuts = cuts
        self.segment_of = values.segment_of(cuts)
        self.members: list[list[fx.Node]] = [[] for _ in range(len(cuts) + 1)]
        for node in values.backbone.graph.nodes:
            if node in self.segment_of and node.op != "output":
                self.members[self.segment_of[node]].append(node)
        self.sides = [self._sides(index) for index in range(len(cuts) + 1)]

    def _sides(self, index: int) -> tuple[fx.Node, ...]:
        read = [a for n in self.members[index] for a in data_arguments(n)]
        if not index:
            carried, stuck = self.values.carried(read)
            return (*carried, *stuck)
        carried, stuck = self.values.travelling(self.members[index], self.cuts[index - 1], read)
        if stuck:
            cut = self.cuts[index - 1].name
            raise PlanError(f"no exit can go at {cut}: {stuck[0].name} is read behind it and cannot travel")
        return carried

    def segments(self) -> tuple[Segment, ...]:
        segments = []
        for index in range(len(self.members)):
            later = self._later_sides(index)
            end = self.cuts[index] if index < len(self.cuts) else self.values.backbone.score_node
            made = [n for n in later if n.op != "placeholder"] if index == 0 else []
            first = tuple(n for n in self.values.backbone.graph.nodes if n.op == "placeholder")
            inputs = self._first_inputs(made, first) if index == 0 else (self.cuts[index - 1], *self.sides[index])
            outputs = (end, *made)
            module = self._build(index, inputs, outputs)
            carries = (end, *later) if index < len(self.cuts) else ()
            segments.append(
                Segment(
                    module,
                    tuple(value_name(n) for n in inputs),
                    tuple(value_name(n) for n in outputs),
                    tuple(value_name(n) for n in carries),
                    sum(self.values.flops.get(n.name, 0.0) for n in self.members[index]),
                )
            )
        return tuple(segments)

    def _later_sides(self, index: int) -> tuple[fx.Node, ...]:
        later = {n for sides in self.sides[index + 1 :] for n in sides}
        return tuple(sorted(later, key=self.values.order.__getitem__))

    def _first_inputs(self, made: list[fx.Node], placeholders: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """The model inputs that segment 0 reads, for itself or to compute the side inputs."""
        seen: set[fx.Node] = set()
        todo = [*self.members[0], *made]
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += node.all_input_nodes
        return tuple(n for n in placeholders if n in seen)

    def _build(self, index: int, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.GraphModule:
        graph = fx.Graph()
        here: dict[fx.Node, fx.Node] = {}
        for node in inputs:
            here[node] = graph.placeholder(value_name(node))
            here[node].meta = copy.copy(node.meta)
        builder = _GraphBuilder(self.values, graph, here, set(self.members[index]))
        for node in self.members[index]:
            builder.copy(node)
        graph.output(tuple(builder.fetch(n) for n in outputs))
        graph.lint()
        return fx.GraphModule(self.values.backbone.graph_module, graph)


class _GraphBuilder:
    """Copies nodes into one segment's graph, fetching on demand what may be computed anew there."""

    def __init__(
        self, values: ValueGraph, graph: fx.Graph, here: dict[fx.Node, fx.Node], members: set[fx.Node]
    ) -> None:
        self.values = values
        self.graph = graph
        self.here = here
        self.members = members
        self.inputs = list(here)

    def copy(self, node: fx.Node) -> fx.Node:
        if node not in self.here:
            for argument in node.all_input_nodes:
                self.fetch(argument)
            self.here[node] = self.graph.node_copy(node, lambda n: self.here[n])
            self.here[node].meta = copy.copy(node.meta)
        return self.here[node]

    def fetch(self, node: fx.Node) -> fx.Node:
        """The node's value in this segment."""
        if node in self.here:
            return self.here[node]
        if is_size(node):
            return self._size(node)
        if node in self.values.graph and node not in self.members:
            raise PassError(f"split reads {node.name} across a cut it does not pass (a bug in the pass)")
        return self.copy(node)

    def _size(self, node: fx.Node) -> fx.Node:
        value: Any = node.meta["val"]
        for source in self.inputs:
            tensor = source.meta.get("val")
            if not isinstance(value, torch.SymInt) or not isinstance(tensor, torch.Tensor):
                continue
            for dimension, size in enumerate(tensor.shape):
                if str(size) == str(value):
                    with self.graph.inserting_after(self.here[source]):
                        made = self.graph.call_function(torch.ops.aten.sym_size.int, (self.here[source], dimension))
                    made.meta["val"] = value
                    self.here[node] = made
                    return made
        return self.copy(node)
