"""The backbone: a trained classifier as one functional torch.fx graph.

Placeholders are the model's inputs by name, parameters and buffers are `get_attr` nodes under their own
names, every node carries its fake value in `meta["val"]` and, where torch.export knew it, the module it came
from in `meta["nn_module_stack"]`. The one output is the score tensor `[B, K]`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from offramp.runtime.manifest import Range

SCORES = ("logits", "probabilities", "log_probabilities")


@dataclass(frozen=True)
class Input:
    """One model input. Dimension 0 of `shape` is the batch; a string names a dimension that may vary."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    ranges: Mapping[str, Range] = field(default_factory=dict)  # within which the graph is right, by dimension


@dataclass(frozen=True)
class Backbone:
    """A captured classifier, in evaluation mode, that maps inputs to scores `[B, K]`."""

    name: str
    graph_module: fx.GraphModule
    inputs: tuple[Input, ...]
    batch_symbol: str  # the name of dimension 0's size in every fake value
    classes: int  # K
    scores: str  # one of SCORES

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def score_node(self) -> fx.Node:
        """The node whose value is the score tensor."""
        output = next(iter(reversed(self.graph.nodes)))
        node = output.args[0]
        assert isinstance(node, fx.Node)
        return node

    def parameters(self) -> int:
        """Number of scalar parameters."""
        return sum(p.numel() for p in self.graph_module.parameters())

    def fingerprint(self) -> str:
        """SHA-256 over the graph's text and every weight: two backbones with the same one are the same."""
        digest = hashlib.sha256(str(self.graph).encode())
        for name, tensor in sorted(self.graph_module.state_dict().items()):
            array = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
            digest.update(array.view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def probabilities(scores: torch.Tensor, kind: str, temperature: float) -> torch.Tensor:
    """Scores `[B, K]` of any kind -> probabilities `[B, K]`, softened by `temperature`.

    Probabilities and log-probabilities are logits up to a constant per row, so one formula serves all.
    """
    if kind == "probabilities":
        scores = scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
    return torch.softmax(scores / temperature, dim=1)


def tensor_values(value: Any) -> list[torch.Tensor]:
    """The tensors in a node's `meta["val"]`: one, those of a tuple, or none (sizes, None)."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [item for item in value if isinstance(item, torch.Tensor)]
    return []


def captured_size(size: int | torch.SymInt) -> int:
    """A dimension's size when the model was captured."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def free_dimensions(backbone: Backbone) -> dict[str, str]:
    """Symbol of every size that varies -> what the inputs call it."""
    placeholders = backbone.graph.find_nodes(op="placeholder")
    return {
        str(size): word
        for node, given in zip(placeholders, backbone.inputs, strict=True)
        for size, word in zip(node.meta["val"].shape, given.shape, strict=True)
        if isinstance(word, str)
    }


def depends_on_data(size: object) -> bool:
    """Whether a dimension's size is known only when the values are: how many tokens are marked, say."""
    return isinstance(size, torch.SymInt) and not size.node.has_hint()


def row_shape(backbone: Backbone, name: str) -> tuple[int, ...]:
    """Shape of one row of the value `name`; a dimension that varies has its captured size."""
    node = next(n for n in backbone.graph.nodes if n.name == name)
    return tuple(captured_size(size) for size in node.meta["val"].shape[1:])


def is_size(node: fx.Node) -> bool:
    """Whether the node's value is a size (or another scalar), not data."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def is_view(node: fx.Node) -> bool:
    """Whether the node's value is its first argument's, seen otherwise."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def value_name(node: fx.Node) -> str:
    """What a node's value is called: an input by the model's own name, which fx may not let a node have (`input`)."""
    return str(node.target) if node.op == "placeholder" else node.name


def attribute(module: torch.nn.Module, path: str) -> Any:
    """What a `get_attr` node of a graph over `module` reads: a parameter, a buffer or a constant."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module the node came from; the node's own name if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    return str(paths[-1]) if paths else node.name


def copy_graph_module(module: fx.GraphModule) -> fx.GraphModule:
    """A new graph over the same (shared) parameters."""
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {})
    graph.output(output)
    for old, new in zip(module.graph.nodes, graph.nodes, strict=True):
        new.meta = copy.copy(old.meta)
    return fx.GraphModule(module, graph)
