"""Reshapes that say which sizes they keep, in place of working them out.

torch's exporter writes a shape with free sizes, such as `[batch, length, 12, 32]`, as what `Concat` makes of a `Shape`
for each of them. To ONNX Runtime every such operator is a call, a few microseconds whatever it computes; a backbone
shares one such chain among its layers, stages have one each. In `Reshape` a 0 stands for the argument's own size there,
which makes the shape a constant. Rules:

1. The shape is a `Concat` of constants and of single sizes that `Shape` tells.
2. Every such size has the name of the argument's size at the same place. The exporter gives one name to what it has
   proved to be equal.
3. The constants are positive, or -1.

What nobody reads any more is taken out.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

Sizes = list[int | str]  # a name for a free size
_OWN = 0  # the argument's own size


def keep_sizes(model: onnx.ModelProto) -> None:
    """In place, for a graph without branches; sizes of values are known by `value_info`."""
    graph = model.graph
    shapes = {v.name: sizes for v in (*graph.input, *graph.value_info) if (sizes := _declared(v)) is not None}
    makers = {name: node for node in graph.node for name in node.output}
    weights = {weight.name: weight for weight in graph.initializer}
    made: dict[tuple[int, ...], str] = {}
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[0] not in shapes:
            continue
        wanted = _wanted(node.input[1], makers, weights, shapes)
        kept = None if wanted is None else _kept(wanted, shapes[node.input[0]])
        if kept is None:
            continue
        if kept not in made:
            made[kept] = f"offramp.sizes.{len(made)}"
            graph.initializer.append(numpy_helper.from_array(np.array(kept, np.int64), made[kept]))
        node.input[1] = made[kept]
        left = [attribute for attribute in node.attribute if attribute.name != "allowzero"]  # there 0 means no element
        del node.attribute[:]
        node.attribute.extend(left)
    if made:
        _prune(graph)


def _declared(value: onnx.ValueInfoProto) -> Sizes | None:
    """A tensor's sizes; None where some are not declared."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    sizes: Sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim]
    return sizes if "" not in sizes else None


def _wanted(
    shape: str,
    makers: dict[str, onnx.NodeProto],
    weights: dict[str, onnx.TensorProto],
    shapes: dict[str, Sizes],
) -> Sizes | None:
    """Rule 1: the sizes that a shape consists of; None where it is anything else."""
    concat = makers.get(shape)
    if concat is None or concat.op_type != "Concat":
        return None
    sizes: Sizes = []
    for part in concat.input:
        maker = makers.get(part)
        if part in weights:
            sizes.extend(numpy_helper.to_array(weights[part]).tolist())
        elif maker is not None and maker.op_type == "Shape" and maker.input[0] in shapes:
            at = {attribute.name: attribute.i for attribute in maker.attribute}
            told = shapes[maker.input[0]][at.get("start", 0) : at.get("end")]
            sizes.extend(told)
        else:
            return None
    return sizes


def _kept(wanted: Sizes, own: Sizes) -> tuple[int, ...] | None:
    """Rules 2 and 3: the constant shape; None where there is none."""
    kept = []
    for at, size in enumerate(wanted):
        if isinstance(size, str):
            if at >= len(own) or own[at] != size:
                return None
            kept.append(_OWN)
        elif size > 0 or size == -1:
            kept.append(size)
        else:
            return None
    return tuple(kept)


def _prune(graph: onnx.GraphProto) -> None:
    """Take out nodes and weights that lead to no output."""
    needed = {value.name for value in graph.output}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed & {name for name in node.output if name}:
            nodes.append(node)
            needed.update(node.input)
    weights = [weight for weight in graph.initializer if weight.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(weights)
