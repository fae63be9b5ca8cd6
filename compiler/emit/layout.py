"""Shortcuts in the layout that convolutions are computed in.

ONNX Runtime on a CPU computes convolutions on maps in blocks of channels. A sum of two such maps, and the ReLU behind
it, becomes part of the convolution that made one of them. A shortcut that is not in blocks, because it comes from the
stage before or out of a padding, undoes that: the convolution's map is taken out of its blocks, summed and clipped in
two passes of their own, and put back into blocks by the next one; and then again, for now the next shortcut is not in
blocks either, to the end of the stage.

The mean over windows of 1 x 1 is its argument, to the bit, and ONNX Runtime computes it in blocks. Put before such a
shortcut it brings it into blocks once, and all behind it stay in them. Rules:

1. Only a sum is looked at, of two maps `[B, C, H, W]` of one shape, one of them in blocks and the other not.
2. C must be a multiple of 16, the largest block there is: otherwise ONNX Runtime leaves the mean out of blocks.
3. Whoever reads the shortcut reads it from behind the mean, but for the stage's own outputs.

Before that, shortcuts that a convolution can make are made by one: see `padded`.

Where another processor or a GPU knows no blocks, the mean is one cheap pass over the map.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from offramp.passes.backbone import copy_graph_module

from .padded import BLOCK, channels_of, padded_as_convolutions

aten = torch.ops.aten
_MAKES = (aten.conv2d.default, aten.convolution.default)
_KEEPS = (  # its first argument's layout
    aten._native_batch_norm_legit_no_training.default,
    aten.batch_norm.default,
    operator.getitem,
    aten.relu.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
)


def in_blocks(module: fx.GraphModule) -> fx.GraphModule:
    """A copy, over the same weights, whose shortcuts are brought into blocks where sums need them there."""
    laid = copy_graph_module(module)
    padded_as_convolutions(laid)
    blocked: set[fx.Node] = set()
    for node in list(laid.graph.nodes):
        if node.target is aten.add.Tensor and (maps := _two_maps(node)) is not None:
            inside = [one for one in maps if one in blocked]
            outside = [one for one in maps if one not in blocked]
            if inside and outside and channels_of(node) % BLOCK == 0:
                blocked.add(_brought_in(laid.graph, outside[0], node))
                outside = []
            if not outside:
                blocked.add(node)
        elif (node.target in _MAKES and channels_of(node)) or (node.target in _KEEPS and node.args[0] in blocked):
            blocked.add(node)
    laid.recompile()
    return laid


def _brought_in(graph: fx.Graph, shortcut: fx.Node, add: fx.Node) -> fx.Node:
    """Rule 3."""
    readers = [node for node in graph.nodes if node in shortcut.users and node.op != "output"]
    with graph.inserting_before(readers[0]):
        mean = graph.call_function(aten.avg_pool2d.default, (shortcut, [1, 1]))
    mean.meta = {key: value for key, value in add.meta.items() if key in ("val", "nn_module_stack")}
    for reader in readers:
        reader.replace_input_with(shortcut, mean)
    return mean


def _two_maps(add: fx.Node) -> Sequence[fx.Node] | None:
    """Rule 1: what is summed; None where that is anything but two maps of one shape."""
    maps = [one for one in add.args if isinstance(one, fx.Node) and channels_of(one)]
    if len(maps) != 2 or add.kwargs or maps[0] is maps[1]:
        return None
    one, other = (tuple(node.meta["val"].shape) for node in maps)
    return maps if one == other else None
