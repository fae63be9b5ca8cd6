"""One ONNX file: nested `If`, standard operators only, for any ONNX Runtime binding and no line of ours.

    stage 0; leave = confidence >= thresholds[0]; stay = indices of the rows that do not leave
    If (any row stays)
      then  GatherND the live values' rows; stage 1; ...; ScatterND its answers into stage 0's
      else  stage 0's answers

An exit's number is 1 for a row that stays, plus what comes of it behind: the deeper numbers are added in. Every small
operator costs a few microseconds, and each exit has all of them, hence this and indices [n, 1], which both `GatherND`
and `ScatterND` read.

The model's own inputs, outputs `probabilities [batch, K]` and `exit [batch]`, and `thresholds [exits]`, an
input with a default that a caller may override. A branch's weights are initializers of the branch itself: in
the outer scope ONNX Runtime loses the blocked convolution layout (+22-29 % time measured on CPU).

Nodes, values and weights keep the names they have in the stages; one that an earlier stage has taken, and all that
moves rows about, is called `stage_<i>/...`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from offramp.passes import ExitProgram
from offramp.runtime.execution import ASK
from offramp.runtime.manifest import StageSpec

from .external import ExternalData
from .stages import ANSWER
from .translate import OPSET

_FLOAT, _INT = TensorProto.FLOAT, TensorProto.INT64
_ANSWERS = ("probabilities", "exit")


def single_file_model(
    program: ExitProgram,
    specs: Sequence[StageSpec],
    models: Sequence[onnx.ModelProto],
    external: ExternalData | None = None,
) -> onnx.ModelProto:
    """The stages' models nested into one; `specs` and `models` as the stage emitter gives them.

    With `external` the weights go there, and the model only points to them.
    """
    builder = _Builder(specs, models, program.backbone.classes, external)
    graph = builder.graph([i.name for i in program.backbone.inputs])
    inputs = _model_inputs(program)
    thresholds = np.array(program.plan.thresholds, dtype=np.float32)
    inputs.append(helper.make_tensor_value_info("thresholds", _FLOAT, [len(thresholds)]))
    graph.initializer.append(numpy_helper.from_array(thresholds, "thresholds"))
    graph.input.extend(inputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="offramp")
    model.ir_version = models[0].ir_version
    return model


def _model_inputs(program: ExitProgram) -> list[onnx.ValueInfoProto]:
    """The model's inputs in its own order; one that no segment reads is still accepted."""
    infos = []
    for declared in program.backbone.inputs:
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(str(declared.dtype).removeprefix("torch.")))
        infos.append(helper.make_tensor_value_info(declared.name, dtype, list(declared.shape)))
    return infos


class _Builder:
    """Nests stage models into graphs, outermost first, and keeps account of the names that are taken."""

    def __init__(
        self,
        specs: Sequence[StageSpec],
        models: Sequence[onnx.ModelProto],
        classes: int,
        external: ExternalData | None,
    ) -> None:
        self.specs = specs
        self.models = models
        self.classes = classes
        self.external = external
        self.values = {*_ANSWERS, "thresholds"}
        self.nodes = {*_ANSWERS}

    def graph(self, model_inputs: Sequence[str]) -> onnx.GraphProto:
        self.values.update(model_inputs)
        nodes, weights, answers = self._from_stage(0, {name: name for name in model_inputs})
        exits = len(self.models) - 1
        if exits > 1:
            limits = [_threshold(index, exits) for index in range(exits)]
            nodes.insert(
                0, helper.make_node("Split", ["thresholds"], limits, name="thresholds/split", num_outputs=exits)
            )
        for made, name in zip(answers, _ANSWERS, strict=False):
            nodes.append(helper.make_node("Identity", [made], [name], name=name))
        if not exits:
            zero = helper.make_tensor("value", _INT, [1], [0])
            nodes += [
                helper.make_node("Shape", [answers[0]], ["exit/rows"], name="exit/rows", start=0, end=1),
                helper.make_node("ConstantOfShape", ["exit/rows"], ["exit"], name="exit", value=zero),
            ]
        return helper.make_graph(nodes, "offramp", [], self._answer_infos(_ANSWERS), weights)

    def _from_stage(
        self, index: int, live: Mapping[str, str]
    ) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], tuple[str, ...]]:
        """Nodes and weights of stage `index` and all behind it, given live values under their names here.

        Also the names of `probabilities [rows, K]` and, but for the last stage's, of `exits [rows]`, counted from this
        one.
        """
        scope = f"stage_{index}"
        inner, weights, names = self._inline(index, {**live, ASK: f"{scope}/ask"})
        answer, sure = (names[n] for n in ANSWER)
        exits = len(self.models) - 1
        if index == exits:
            return inner, weights, (answer,)
        weights.append(numpy_helper.from_array(np.array(np.inf, np.float32), f"{scope}/infinity"))
        threshold, ask, leave = _threshold(index, exits), f"{scope}/ask", f"{scope}/leave"
        stay, further, found = f"{scope}/stay", f"{scope}/further", f"{scope}/found"
        rows, count, some = f"{scope}/rows", f"{scope}/count", f"{scope}/some"
        nodes = [
            helper.make_node("Less", [threshold, f"{scope}/infinity"], [ask], name=ask),
            *inner,
            helper.make_node("GreaterOrEqual", [sure, threshold], [leave], name=leave),
            helper.make_node("Not", [leave], [stay], name=stay),
            helper.make_node("Cast", [stay], [further], name=further, to=_INT),
            helper.make_node("NonZero", [stay], [found], name=found),
            helper.make_node("Transpose", [found], [rows], name=rows),
            helper.make_node("Size", [rows], [count], name=count),
            helper.make_node("Cast", [count], [some], name=some, to=TensorProto.BOOL),
        ]
        known = {**live, **{n: names[n] for n in self.specs[index].outputs}}
        here = (answer, further)
        then = self._go_on(index, known, rows, here)
        made = tuple(f"{scope}/{name}_all" for name in _ANSWERS[: len(then.output)])
        branches = {"then_branch": then, "else_branch": self._all_left(index, here[: len(made)])}
        nodes.append(helper.make_node("If", [some], made, name=f"{scope}/go_on", **branches))
        return nodes, weights, (*made, *here[len(made) :])

    def _go_on(self, index: int, known: Mapping[str, str], rows: str, here: tuple[str, str]) -> onnx.GraphProto:
        """All behind stage `index`, for the rows [n, 1] that stay, put into what that stage says of all rows."""
        scope = f"stage_{index + 1}"
        nodes = []
        live = {}
        for name in self.specs[index].carries:
            live[name] = f"{scope}/live/{name}"
            nodes.append(helper.make_node("GatherND", [known[name], rows], [live[name]], name=live[name]))
        inner, weights, deeper = self._from_stage(index + 1, live)
        outputs = [f"{scope}/{name}_out" for name in _ANSWERS[: len(deeper)]]
        put = (
            helper.make_node("ScatterND", [whole, rows, part], [output], name=output, reduction=how)
            for whole, part, output, how in zip(here, deeper, outputs, ("none", "add"), strict=False)
        )
        return helper.make_graph([*nodes, *inner, *put], f"{scope}/branch", [], self._answer_infos(outputs), weights)

    def _all_left(self, index: int, here: Sequence[str]) -> onnx.GraphProto:
        outputs = [f"stage_{index}/{name}_left" for name in _ANSWERS[: len(here)]]
        nodes = [
            helper.make_node("Identity", [said], [output], name=output)
            for said, output in zip(here, outputs, strict=True)
        ]
        return helper.make_graph(nodes, f"stage_{index}/left", [], self._answer_infos(outputs))

    def _answer_infos(self, names: Sequence[str]) -> list[onnx.ValueInfoProto]:
        """Of probabilities and, if there are two names, exits."""
        rows = "batch" if names[0] == _ANSWERS[0] else None
        kinds: tuple[tuple[int, list[str | int | None]], ...] = ((_FLOAT, [rows, self.classes]), (_INT, [rows]))
        return [
            helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in zip(names, kinds, strict=False)
        ]

    def _inline(
        self, index: int, live: Mapping[str, str]
    ) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], dict[str, str]]:
        """Stage `index`'s nodes and weights, and the name of each of its outputs."""
        graph = self.models[index].graph
        scope = _Scope(f"stage_{index}", self.values, self.nodes, {i.name: live[i.name] for i in graph.input})
        weights = [self._weight(t, scope.value(t.name)) for t in graph.initializer]
        nodes = [self._node(n, scope) for n in graph.node]
        return nodes, weights, {o.name: scope.names[o.name] for o in graph.output}

    def _weight(self, tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
        if self.external is not None:
            return self.external.reference(tensor, name)
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.name = name
        return copy

    def _node(self, node: onnx.NodeProto, scope: _Scope) -> onnx.NodeProto:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = scope.node(node.name)
        copy.input[:] = [scope.names[name] if name else "" for name in node.input]
        copy.output[:] = [scope.value(name) if name else "" for name in node.output]
        for attribute in copy.attribute:
            if attribute.HasField("g"):
                self._body(attribute.g, scope)
        return copy

    def _body(self, graph: onnx.GraphProto, scope: _Scope) -> None:
        """In place; the body of a control-flow node sees the names around it."""
        weights = [self._weight(t, scope.value(t.name)) for t in graph.initializer]
        for value in graph.input:
            value.name = scope.value(value.name)
        nodes = [self._node(n, scope) for n in graph.node]
        del graph.initializer[:], graph.node[:], graph.value_info[:]
        graph.initializer.extend(weights)
        graph.node.extend(nodes)
        for value in graph.output:
            value.name = scope.names[value.name]


def _threshold(index: int, exits: int) -> str:
    """The value that holds an exit's threshold, [1]; of the only one it is the input itself."""
    return f"stage_{index}/threshold" if exits > 1 else "thresholds"


@dataclass
class _Scope:
    """Names of one stage's model in the whole. In a stage's model every value has a name of its own."""

    prefix: str
    values: set[str]  # taken in the whole so far
    nodes: set[str]
    names: dict[str, str]  # in the stage -> in the whole

    def value(self, name: str) -> str:
        if name not in self.names:
            self.names[name] = self._free(name, self.values, always=name in ANSWER)
        return self.names[name]

    def node(self, name: str) -> str:
        return self._free(name, self.nodes)

    def _free(self, name: str, taken: set[str], always: bool = False) -> str:
        made = f"{self.prefix}/{name}" if always or name in taken else name
        taken.add(made)
        return made
