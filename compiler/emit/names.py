"""Names a person recognises when the model is open in a viewer: module paths, as in the model's own source.

Nodes are called `<place>/<operator>` (`layer2.0.conv1/Conv`, `exits.0.head.classify/Gemm`), the values they make
likewise, weights as in the state dict (`layer2.0.conv1.weight`), constants after the operator's input that reads
them first (`layer2.0/Reshape/shape`). A name that is taken gets a number, in graph order, so the same model has
the same names. Inputs and outputs keep the names they are asked for: they are the contract between stages.

Places come through torch's exporter in its record of module scopes. A segment is a flat graph and has none, so
`with_places` calls each of its nodes as a small module of its own, and the table beside it says where that node
came from. An operator that the exporter's optimizer merged (batch norm into a convolution) takes the place of
its weight.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from torch import fx, nn

from offramp.passes.backbone import module_path

_SCOPES = "pkg.torch.onnx.name_scopes"
_NOWHERE = "_empty_nn_module_stack_from_metadata_hook"  # torch.export's word for the scope of sizes it asks for itself
_REWRITTEN = "pkg.onnxscript.rewriter.rule_name"
_FOLDED = ".weight_bias"  # what the exporter calls the bias that a batch norm left in a convolution
_OPERATIONS = "operations"

Shape = tuple[int, ...]


class _Operation(nn.Module):
    """One node of a graph as a module, so that torch's exporter records where it was called."""

    def __init__(self, target: Callable[..., Any]) -> None:
        super().__init__()
        self.target = target

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the node's target gives."""
        return self.target(*args, **kwargs)


def with_places(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, str]]:
    """The same graph over the same weights, every call a submodule; and submodule path -> place in the model."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    marked = fx.GraphModule(module, graph)
    operations: list[nn.Module] = []
    places = {}
    for old, node in zip(module.graph.nodes, graph.nodes, strict=True):
        if node.op == "call_function":
            path = f"{_OPERATIONS}.{len(operations)}"
            operations.append(_Operation(node.target))
            node.op, node.target = "call_module", path
            places[path] = module_path(old)
    marked.add_module(_OPERATIONS, nn.ModuleList(operations))
    graph.lint()
    marked.recompile()
    return marked, places


@dataclass(frozen=True)
class Places:
    """Where the parts of an exported module come from.

    `prefixes` maps a path in the exported module to the place it stands for; of several the longest counts.
    """

    prefixes: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    weights: Mapping[str, Shape] = field(default_factory=dict)  # of the exported module, by path there

    def place(self, path: str) -> str:
        """A path in the exported module -> the place in the model."""
        parts = path.split(".") if path else []
        for known in range(len(parts), -1, -1):
            prefix = ".".join(parts[:known])
            if prefix in self.prefixes:
                return ".".join(part for part in (self.prefixes[prefix], *parts[known:]) if part)
        return path

    def weight(self, path: str) -> str | None:
        """An initializer's name -> the weight's, or None for what the exporter computed."""
        if path not in self.weights and path.endswith(_FOLDED):
            path = path.removesuffix(_FOLDED) + ".bias"
        inside = any(prefix and path.startswith(f"{prefix}.") for prefix in self.prefixes)
        return self.place(path) if inside or path in self.weights else None

    def reshaped(self, place: str, shape: Shape) -> str | None:
        """The one weight of the module at `place` that the exporter may have transposed into this shape."""
        found = [
            name
            for path, own in self.weights.items()
            if (name := self.place(path)).rpartition(".")[0] == place and sorted(own) == sorted(shape) and len(own) > 1
        ]
        return f"{found[0]}.T" if len(found) == 1 else None


def name_graph(graph: onnx.GraphProto, inputs: Sequence[str], outputs: Sequence[str], places: Places) -> None:
    """In place. `inputs` and `outputs` are what the graph's own are called from now on, in their order."""
    ends = [*zip(graph.input, inputs, strict=True), *zip(graph.output, outputs, strict=True)]
    namer = _Namer(places, {value.name: wanted for value, wanted in ends})
    namer.name(graph)
    for value, wanted in ends:
        value.name = wanted


class _Namer:
    """Gives names out, each once in the whole model: a branch must not reuse a name of the graph around it."""

    def __init__(self, places: Places, values: dict[str, str]) -> None:
        self.places = places
        self.values = values  # old name -> new
        self.taken = set(values.values())
        self.nodes: set[str] = set()

    def name(self, graph: onnx.GraphProto) -> None:
        weights = [tensor.name for tensor in graph.initializer]
        for old in weights:
            known = self.places.weight(old)
            if known is not None and old not in self.values:
                self.values[old] = _unique(known, self.taken)
        for node in graph.node:
            place = self._place(node)
            node.name = _unique("/".join(filter(None, (place, node.op_type))), self.nodes)
            for position, old in enumerate(node.output):
                if old and old not in self.values:
                    self.values[old] = _unique(f"{node.name}/{position}" if position else node.name, self.taken)
            self._name_constants(graph, node, place)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    self._name_body(attribute.g, node.name)
        for tensor in graph.initializer:
            tensor.name = self._new(tensor.name)
        for node in graph.node:
            node.input[:] = [self._new(name) for name in node.input]
            node.output[:] = [self._new(name) for name in node.output]

    def _name_body(self, graph: onnx.GraphProto, owner: str) -> None:
        for value in graph.input:
            self.values[value.name] = _unique(f"{owner}/{value.name}", self.taken)
        self.name(graph)
        for value in (*graph.input, *graph.output):
            value.name = self._new(value.name)

    def _name_constants(self, graph: onnx.GraphProto, node: onnx.NodeProto, place: str) -> None:
        """What the exporter computed and this node is the first to read."""
        unnamed = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in self.values}
        for position, old in enumerate(node.input):
            if old in unnamed and old not in self.values:
                known = self.places.reshaped(place, tuple(unnamed[old].dims))
                self.values[old] = _unique(known or f"{node.name}/{_parameter(node, position)}", self.taken)

    def _place(self, node: onnx.NodeProto) -> str:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        if _REWRITTEN in notes:
            weights = [self.places.weight(name) for name in node.input]
            owner = next((weight.rpartition(".")[0] for weight in weights if weight), "")
            if owner:
                return owner
        scopes = ast.literal_eval(notes[_SCOPES]) if _SCOPES in notes else []
        scopes = [scope for scope in scopes if scope != _NOWHERE]
        return self.places.place(scopes[-2] if len(scopes) > 1 else "")

    def _new(self, name: str) -> str:
        return self.values.get(name, name)


def _parameter(node: onnx.NodeProto, position: int) -> str:
    """What the operator calls this input."""
    formal = onnx.defs.get_schema(node.op_type, domain=node.domain).inputs
    return str(formal[position].name) if position < len(formal) else f"{formal[-1].name}/{position}"


def _unique(name: str, taken: set[str]) -> str:
    """`name`, or with the first number that is free; taken from now on."""
    free, count = name, 0
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    taken.add(free)
    return free
