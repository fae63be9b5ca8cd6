"""Pixels of maps that nothing reads: neither computed nor carried.

A 1 x 1 convolution of stride 2 reads one pixel of four. In ResNets as first published the strides of a layer's first
block are in such convolutions, so three of four pixels that the layer before ends in are made for nothing, and would
be carried for nothing over a cut there. Rules, for a map `[B, C, H, W]`:

1. Its step is the stride at which its readers take its pixels. A 1 x 1 convolution without padding asks for its stride
   times the step of its own map, what works pixel by pixel for the step of its own map, anything else for every pixel,
   and so do readers who ask for different steps. A stage's outputs are read by every pixel: a head may.
2. What a convolution or pixel by pixel operator makes is thinned to its step: the convolution's stride grows by it, and
   that of the readers shrinks. A map that others want whole is thinned for a sum by a max pool over windows of 1 x 1,
   to the bit the pixels at its stride, which ONNX Runtime computes in whatever layout the map has.
3. The cut a stage starts from is handed over thinned by such a pool, behind what the head of the stage before reads.

The pixels that are left are the same sums.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from offramp.passes.backbone import copy_graph_module

aten = torch.ops.aten
Step = tuple[int, int]  # of H and W
EVERY: Step = (1, 1)
_STRIDE, _PADDING, _TRANSPOSED = 3, 4, 6  # positions of a convolution's arguments
_NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
_BY_PIXEL = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.relu.default,
    aten.silu.default,
    aten.gelu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.clamp.default,
)


def without_unread(module: fx.GraphModule, cut: str | None = None) -> tuple[fx.GraphModule, Step]:
    """A copy, over the same weights, without what nothing reads; and the step at which it wants its input `cut`.

    Other inputs stay as they are.
    """
    thinned = copy_graph_module(module)
    inputs = {str(node.target): node for node in thinned.graph.find_nodes(op="placeholder")}
    own = None if cut is None else inputs[cut]
    thinning = _Thinning(thinned.graph, own)
    for node in list(thinned.graph.nodes):
        thinning.apply(node)
    thinned.recompile()
    return thinned, EVERY if own is None else thinning.steps[own]


@dataclass
class _Thinning:
    graph: fx.Graph
    cut: fx.Node | None
    maps: dict[fx.Node, list[fx.Node]] = field(init=False)  # what a map is made of, pixel by pixel
    steps: dict[fx.Node, Step] = field(default_factory=dict)
    pools: dict[tuple[fx.Node, Step], fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Rule 1."""
        self.maps = {node: _maps(node) for node in self.graph.nodes}
        for node in reversed(self.graph.nodes):
            asked = {self._asked(reader, node) for reader in node.users}
            may = node is self.cut or _is_convolution(node) or self.maps[node]
            self.steps[node] = asked.pop() if may and len(asked) == 1 else EVERY

    def _asked(self, reader: fx.Node, node: fx.Node) -> Step:
        if node in self.maps[reader]:
            return self.steps[reader]
        if _takes_single_pixels(reader) and reader.all_input_nodes.index(node) == 0:
            stride, own = _stride(reader), self.steps[reader]
            return stride[0] * own[0], stride[1] * own[1]
        return EVERY

    def apply(self, node: fx.Node) -> None:
        """Rule 2. Called in the graph's order."""
        step = self.steps[node]
        if _is_convolution(node):
            self._restride(node)
        elif step != EVERY:
            for source in self.maps[node]:
                if self.steps[source] != step:
                    node.replace_input_with(source, self._pool(source, step))
        if step != EVERY:
            node.meta["val"] = _every(node.meta["val"], step)

    def _restride(self, convolution: fx.Node) -> None:
        source, step = convolution.args[0], self.steps[convolution]
        assert isinstance(source, fx.Node)
        taken, args = self.steps[source], list(convolution.args)
        if taken == step:
            return
        args += [None] * (_STRIDE + 1 - len(args))  # without a bias
        args[_STRIDE] = [s * one // other for s, one, other in zip(_stride(convolution), step, taken, strict=True)]
        convolution.args = tuple(args)

    def _pool(self, source: fx.Node, step: Step) -> fx.Node:
        if (source, step) not in self.pools:
            with self.graph.inserting_after(source):
                pool = self.graph.call_function(aten.max_pool2d.default, (source, [1, 1], [*step]))
            pool.meta = {key: value for key, value in source.meta.items() if key == "nn_module_stack"}
            pool.meta["val"] = _every(source.meta["val"], step)
            self.pools[source, step] = pool
        return self.pools[source, step]


def _maps(node: fx.Node) -> list[fx.Node]:
    """What an operator makes its map of, pixel by pixel; nothing where it does anything else."""
    read = node.all_input_nodes
    if node.target is operator.getitem:
        return read if read[0].target in _NORMS and node.args[1] == 0 else []
    if node.target in _NORMS:
        return read[:1] if _size(read[0]) else []
    size = _size(node)
    if node.target not in _BY_PIXEL or size is None:
        return []
    others = [one for one in read if _size(one) != size]
    return [one for one in read if _size(one) == size] if all(map(_without_size, others)) else []


def _size(node: fx.Node) -> tuple[Any, ...] | None:
    """H and W of a map."""
    value = node.meta.get("val")
    return tuple(value.shape[2:]) if isinstance(value, torch.Tensor) and value.dim() == 4 else None


def _without_size(node: fx.Node) -> bool:
    """The same for all pixels."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.shape[-2:].numel() == 1


def _is_convolution(node: fx.Node) -> bool:
    """Of a map, and not a transposed one."""
    if node.kwargs or _size(node) is None:
        return False
    return node.target is aten.conv2d.default or (
        node.target is aten.convolution.default and not node.args[_TRANSPOSED]
    )


def _takes_single_pixels(node: fx.Node) -> bool:
    """A convolution with a kernel of 1 x 1 and nothing around its map."""
    if not _is_convolution(node):
        return False
    padding = node.args[_PADDING] if len(node.args) > _PADDING else 0
    return _size(node.all_input_nodes[1]) == (1, 1) and _pair(padding) == (0, 0)


def _stride(convolution: fx.Node) -> Step:
    return _pair(convolution.args[_STRIDE]) if len(convolution.args) > _STRIDE else EVERY


def _pair(value: Any) -> Step:
    """One number, or a list of one or two, for H and W."""
    values = [value] if isinstance(value, int) else list(value)
    return values[0], values[-1]


def _every(value: Any, step: Step) -> Any:
    """The pixels of a map at a step; a norm's tuple begins with its map."""
    if isinstance(value, tuple):
        return (_every(value[0], step), *value[1:])
    return value[:, :, :: step[0], :: step[1]]
