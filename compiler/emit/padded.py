"""Shortcuts of slices and channels of zeros, as convolutions.

The ResNets of CIFAR-10 have no weights in their shortcuts [He et al. 2016, "Deep residual learning", option A]: where a
layer has half the pixels and twice the channels, its first block's shortcut is every second pixel of the map, with
zeros joined to its channels. ONNX Runtime does neither in blocks of channels (see `layout`): the whole map is taken out
of them, a quarter of it copied twice, and put back. A convolution of 1 x 1 that takes such strides and whose weights
are one where a channel goes to, and zero elsewhere, does both in blocks and adds to the sum as it goes. It gives finite
maps to the bit. Rules:

1. What is padded are channels alone, by zeros, of a map or of slices of one: every nth pixel, from first to last.
2. The channels, before and behind, fill blocks; otherwise no convolution is computed in them.
3. There are few enough weights for the products to cost less than the copies.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from .promises import PADS, mode_and_value

aten = torch.ops.aten
BLOCK = 16  # channels; 8 where the processor has no AVX-512
_MOST_WEIGHTS = 64 * 128  # with twice the channels, products took as long as copies on two threads, longer on one
_NO_PADS = (0,) * 8  # of W, H, C and B
_EVERYTHING = (0, None, None, 1)  # what a slice takes unless told: dimension, first, last, step


def padded_as_convolutions(module: fx.GraphModule) -> None:
    """In place; the weights become buffers of the module."""
    for node in list(module.graph.nodes):
        before = _channels_before(node)
        if before is None:
            continue
        source, strides = _unsliced(node.all_input_nodes[0])
        channels, made = channels_of(source), channels_of(node)
        if channels % BLOCK or made % BLOCK or not 0 < channels * made <= _MOST_WEIGHTS:
            continue
        weight = torch.zeros(made, channels, 1, 1)
        weight[before : before + channels, :, 0, 0] = torch.eye(channels)
        name = f"{node.name}_weight"
        module.register_buffer(name, weight)
        with module.graph.inserting_before(node):
            held = module.graph.get_attr(name)
            held.meta["val"] = weight
            convolution = module.graph.call_function(aten.conv2d.default, (source, held, None, [*strides]))
        convolution.meta = node.meta
        node.replace_all_uses_with(convolution)
    module.graph.eliminate_dead_code()
    module.recompile()


def channels_of(node: fx.Node) -> int:
    """C of a map `[B, C, H, W]` of float32; 0 for anything else."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.dtype != torch.float32:
        return 0
    return value.shape[1] if isinstance(value.shape[1], int) else 0


def _channels_before(node: fx.Node) -> int | None:
    """Rule 1: how many channels of zeros go in front; None for all but a padding of channels by zeros."""
    if node.target not in PADS or not channels_of(node):
        return None
    _, given, *rest = node.args
    named: dict[str, Any] = {**node.kwargs}
    mode, value = mode_and_value(*rest, **named)
    pads: list[Any] = [*cast(Sequence[Any], given), *_NO_PADS][: len(_NO_PADS)]
    before, behind = pads[4:6]
    channels_alone = pads == [0, 0, 0, 0, before, behind, 0, 0] and min(before, behind) >= 0
    return before if channels_alone and mode == "constant" and not value else None


def _unsliced(node: fx.Node) -> tuple[fx.Node, tuple[int, int]]:
    """Rule 1: the map that was sliced, and the strides."""
    strides = {2: 1, 3: 1}
    while node.target is aten.slice.Tensor:
        given: list[Any] = [*node.args[1:], *_EVERYTHING[len(node.args) - 1 :]]
        dimension, first, last, step = given
        if dimension not in strides or first or last not in (None, sys.maxsize):
            break
        strides[dimension] *= step
        (node,) = node.all_input_nodes
    return node, (strides[2], strides[3])
