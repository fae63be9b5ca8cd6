"""A head that is left unasked costs nothing: what only the answer needs moves into the branch of an `If`.

    segment
    If (ask)  then  head, probabilities, confidence
              else  no probabilities, and a confidence of minus infinity, with which no row leaves

`ask` is one bool beside the stage's inputs. ONNX Runtime computes every node of a graph, fetched or not, so a plan
that leaves an exit out could not otherwise save its head. (Its run option `only_execute_path_to_fetches` changes
nothing in the builds that are released; tried with 1.32.)

In the single file what is not said is compared with a threshold all the same, row by row. Between segments nobody
reads it, and `speechless` makes it an answer of no rows: the four small operators that count rows take a
hundredth of a small model's time in every stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from offramp.runtime.execution import ASK, CONFIDENCE, PROBABILITIES

_ANSWER = (PROBABILITIES, CONFIDENCE)
_CHOICE = "answer"  # what the `If` is called
_SILENT = ("silent/none", "silent/never")  # what the nodes are called that make the answer of one who is not asked
_INNER = "asked"  # what the branches call their outputs: names around them are taken


def gated(model: onnx.ModelProto, passed: Sequence[str], classes: int) -> onnx.ModelProto:
    """In place: the answer of a stage that yields the values `passed`, the cut's first, is given if `ask` is true."""
    graph = model.graph
    needed = {*passed}
    segment: list[onnx.NodeProto] = []
    head: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        part = segment if needed & {*node.output} else head
        part.insert(0, node)
        if part is segment:
            needed |= values_read(node)
    own = {name for node in head for name in values_read(node)} - needed
    inside = [weight for weight in graph.initializer if weight.name in own]
    outside = [weight for weight in graph.initializer if weight.name not in own]
    asked = _branch(_CHOICE, _renamed(head), inside, classes)
    choice = helper.make_node(
        "If", [ASK], list(_ANSWER), name=_CHOICE, then_branch=asked, else_branch=_silent(passed[0], classes)
    )
    kept = [*segment, choice]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(outside)
    graph.input.append(helper.make_tensor_value_info(ASK, TensorProto.BOOL, []))
    return model


def speechless(model: onnx.ModelProto, classes: int) -> onnx.ModelProto:
    """In place: a stage made by `gated` that answers for no rows where it is not asked."""
    for node in model.graph.node:
        if node.op_type == "If" and node.name == _CHOICE:
            (branch,) = (attribute.g for attribute in node.attribute if attribute.name == "else_branch")
            none = [
                helper.make_node("Constant", [], [value.name], name=name, value=_no_rows(shape))
                for name, value, shape in zip(_SILENT, branch.output, ([0, classes], [0]), strict=True)
            ]
            branch.CopyFrom(helper.make_graph(none, branch.name, [], list(branch.output)))
    return model


def _no_rows(shape: Sequence[int]) -> onnx.TensorProto:
    return helper.make_tensor("value", TensorProto.FLOAT, shape, [])


def _silent(value: str, classes: int) -> onnx.GraphProto:
    """As many rows as `value` has."""
    rows, shape, width = "silent/rows", "silent/shape", "silent/classes"
    zero = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    never = helper.make_tensor("value", TensorProto.FLOAT, [1], [-np.inf])
    nodes = [
        helper.make_node("Shape", [value], [rows], name=rows, start=0, end=1),
        helper.make_node("Concat", [rows, width], [shape], name=shape, axis=0),
        helper.make_node("ConstantOfShape", [shape], [f"{_INNER}/none"], name=_SILENT[0], value=zero),
        helper.make_node("ConstantOfShape", [rows], [f"{_INNER}/never"], name=_SILENT[1], value=never),
    ]
    weight = numpy_helper.from_array(np.array([classes], np.int64), width)
    outputs = _outputs((f"{_INNER}/none", f"{_INNER}/never"), classes)
    return helper.make_graph(nodes, "silent", [], outputs, [weight])


def _branch(
    name: str, nodes: Sequence[onnx.NodeProto], weights: Sequence[onnx.TensorProto], classes: int
) -> onnx.GraphProto:
    outputs = _outputs([f"{_INNER}/{answer}" for answer in _ANSWER], classes)
    return helper.make_graph(list(nodes), name, [], outputs, list(weights))


def _outputs(names: Sequence[str], classes: int) -> list[onnx.ValueInfoProto]:
    shapes: list[list[int | None]] = [[None, classes], [None]]
    return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(names, shapes, strict=True)]


def _renamed(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The answer's names belong to the `If`."""
    names = {answer: f"{_INNER}/{answer}" for answer in _ANSWER}
    made = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [names.get(name, name) for name in node.input]
        copy.output[:] = [names.get(name, name) for name in node.output]
        made.append(copy)
    return made


def values_read(node: onnx.NodeProto) -> set[str]:
    """Every value a node reads, those its branches read from around them included."""
    read = {name for name in node.input if name}
    for attribute in node.attribute:
        if attribute.HasField("g"):
            made = {name for inner in attribute.g.node for name in inner.output}
            made |= {weight.name for weight in attribute.g.initializer} | {value.name for value in attribute.g.input}
            read |= {name for inner in attribute.g.node for name in values_read(inner)} - made
            read |= {value.name for value in attribute.g.output} - made
    return read
