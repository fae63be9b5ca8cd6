"""Taps: the backbone's graph with the values of some nodes returned beside the scores."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from offramp.runtime.errors import PlanError

from .backbone import Backbone, copy_graph_module


def tap(backbone: Backbone, names: Sequence[str]) -> fx.GraphModule:
    """`Backbone` and node names -> a module from the model inputs to `(scores [B, K], value, value, ...)`.

    One run gives all of them: heads for every candidate learn from a single pass of the frozen backbone.
    """
    module = copy_graph_module(backbone.graph_module)
    nodes = {node.name: node for node in module.graph.nodes}
    unknown = [name for name in names if name not in nodes]
    if unknown:
        raise PlanError(f"{', '.join(unknown)}: no such value in {backbone.name}; see `offramp candidates`")
    output = next(iter(reversed(module.graph.nodes)))
    output.args = ((output.args[0], *(nodes[name] for name in names)),)
    module.recompile()
    return module
