"""Precision: stages in float32 become stages in float16 or int8, by ONNX Runtime's own tools.

    fp16   weights and values of a stage in float16 (`onnxruntime.transformers.float16`)
    int8   matrix products and what lies between convolutions in 8 bits (`onnxruntime.quantization`, QDQ, weights by
           channel), values' ranges taken from rows that flow through the float32 stages, all of them to the end

What a stage reads and gives stays float32: values between stages because a later stage may want what an earlier one
of another precision gave, and their dtypes are the manifest's; the answer because thresholds part confidences that
float16 would make equal. So everything behind the last matrix product of an answer (scores, temperature, softmax,
confidence) is left as it is. At int8 the whole head is: it goes into a branch of an `If`, behind which 8-bit kernels
are not found, and is a few percent of the compute.

Weights of int8 have 7 bits: on processors without VNNI the product of two full bytes with a third saturates, so that
the same file would answer otherwise there than where it was certified.

In models without convolutions (transformers) products alone are converted: the sums between them have outliers beside
which 8 bits see nothing else.

Refused: a stage whose weights exceed what one file holds (ModelError).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from graphlib import TopologicalSorter

import numpy as np
import onnx
from onnx import helper

from offramp.passes import ExitProgram
from offramp.runtime.data import Rows
from offramp.runtime.engine import ModelBytes
from offramp.runtime.errors import ModelError
from offramp.runtime.execution import CONFIDENCE, PROBABILITIES

from .emit import INLINE_LIMIT, stage_specs, weight_bytes
from .emit.external import temporary_folder
from .emit.gate import values_read
from .emitted import Batch, Stages
from .progress import bar
from .stream import batches

FP32, FP16, INT8 = "fp32", "fp16", "int8"
PRECISIONS = (FP32, FP16, INT8)
RANGED_ROWS = 512  # that int8 takes its ranges from: more find rarer extremes, and coarser steps for all other values
_BATCH = 64
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BETWEEN = ("Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "MaxPool", "Relu")

Feeds = Callable[[], Iterator[Batch]]


def converted(
    program: ExitProgram, models: Sequence[onnx.ModelProto], data: Rows, rows: np.ndarray, precision: str
) -> tuple[onnx.ModelProto, ...]:
    """The models of `stage_models`, converted; `rows` of `data` are those that int8 takes its ranges from."""
    for index, model in enumerate(models):
        if weight_bytes(model) > INLINE_LIMIT:
            raise ModelError(
                f"stage {index} has {weight_bytes(model) >> 20} MiB of weights, and ONNX Runtime's converters take "
                f"{INLINE_LIMIT >> 20} MiB; compile with precision {FP32}"
            )
    specs, made = stage_specs(program), []
    for index, (model, spec) in bar(enumerate(zip(models, specs, strict=True)), f"convert to {precision}", len(specs)):
        last = index == len(models) - 1
        body, tail = parted(model, spec.outputs, whole_head=precision == INT8 and not last)
        if not body.graph.node:
            made.append(model)
            continue
        if precision == FP16:
            made.append(joined(_float16(body), tail, model))
            continue
        before = Stages(specs, [ModelBytes(m.SerializeToString()) for m in models[:index]])
        made.append(joined(_int8(body, _Feeds(before, data, rows[:RANGED_ROWS])), tail, model))
    return tuple(made)


def parted(
    model: onnx.ModelProto, passed: Sequence[str], *, whole_head: bool
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A stage that yields the values `passed` -> what is converted, and what makes the answer of it and is not.

    The latter is all that only the answer needs if `whole_head`, else that part of it behind the last products.
    """
    graph = model.graph
    behind = _behind(graph, {PROBABILITIES, CONFIDENCE}, () if whole_head else _PRODUCTS)
    read = {name for index in behind for name in values_read(graph.node[index])}
    ends = {name for node in graph.node if node.op_type in _PRODUCTS for name in node.output}
    kept = _behind(graph, {*passed, *(() if whole_head else ends & read)}, ())
    tail = [node for index, node in enumerate(graph.node) if index in behind - kept]
    body = [node for index, node in enumerate(graph.node) if index in kept]
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    known |= {value.name: value for value in graph.output}
    wanted = {name for node in tail for name in values_read(node)} & {name for node in body for name in node.output}
    return _part(model, body, [known[name] for name in sorted({*passed} | wanted)]), _part(model, tail, [])


def joined(body: onnx.ModelProto, tail: onnx.ModelProto, whole: onnx.ModelProto) -> onnx.ModelProto:
    """The parts of `parted`, the first converted, as one model with the inputs and outputs of `whole`."""
    made = onnx.ModelProto()
    made.CopyFrom(body)
    graph = made.graph
    taken = {weight.name for weight in graph.initializer}
    own = {weight.name: f"{weight.name}/float32" for weight in tail.graph.initializer if weight.name in taken}
    for weight in tail.graph.initializer:
        graph.initializer.add().CopyFrom(weight)
        graph.initializer[-1].name = own.get(weight.name, weight.name)
    for node in tail.graph.node:
        graph.node.add().CopyFrom(node)
        graph.node[-1].input[:] = [own.get(name, name) for name in node.input]
    ordered = _ordered(graph)
    del graph.node[:], graph.output[:], graph.input[:], graph.value_info[:], made.metadata_props[:]
    graph.node.extend(ordered)
    graph.output.extend(whole.graph.output)
    graph.input.extend(whole.graph.input)
    made.producer_name, made.producer_version = whole.producer_name, whole.producer_version
    return made


def _ordered(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes, each behind what it reads: converters put new ones last."""
    maker = {name: index for index, node in enumerate(graph.node) for name in node.output}
    waits = {
        index: {maker[name] for name in values_read(node) if name in maker} for index, node in enumerate(graph.node)
    }
    return [graph.node[index] for index in TopologicalSorter(waits).static_order()]


def _behind(graph: onnx.GraphProto, wanted: set[str], stop: Sequence[str]) -> set[int]:
    """Indices of the nodes that make the values `wanted`, as far back as the first of a type in `stop`, without it."""
    found, needed = set(), {*wanted}
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if needed & {*node.output} and node.op_type not in stop:
            found.add(index)
            needed |= values_read(node)
    return found


def _part(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], outputs: Sequence[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    """A model of some of the nodes; inputs that they do not read stay away, for nothing may be fed to them."""
    read = {name for node in nodes for name in values_read(node)}
    weights = [weight for weight in model.graph.initializer if weight.name in read]
    inputs = [value for value in model.graph.input if value.name in read]
    graph = helper.make_graph(list(nodes), model.graph.name, inputs, list(outputs), weights)
    made = helper.make_model(graph, opset_imports=model.opset_import)
    made.ir_version = model.ir_version
    return made


def _float16(body: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():  # of weights too small for float16 it says that they become the smallest there is
        warnings.simplefilter("ignore")
        made: onnx.ModelProto = convert_float_to_float16(body, keep_io_types=True)
    return made


def _int8(body: onnx.ModelProto, feeds: Feeds) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    present = {node.op_type for node in body.graph.node}
    kinds = (*_PRODUCTS, *_BETWEEN) if present & {"Conv", "ConvTranspose"} else _PRODUCTS
    if not present & {*_PRODUCTS}:
        return body
    with temporary_folder() as folder, _quiet():
        given, made = str(folder / "float32.onnx"), str(folder / "int8.onnx")
        # Batch norms were folded, and names chosen, when the model was made: types and shapes are all that is wanted.
        quant_pre_process(body, given, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            given, made, _Reader(feeds, [value.name for value in body.graph.input]), quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(kinds), per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}},
        )  # fmt: skip
        return onnx.load(made)


class _Feeds:
    """What reaches a stage when no row leaves before it, batch by batch: the stages before it run again every time.

    Kept would be hundreds of megabytes; run again they take less than the quantiser itself.
    """

    def __init__(self, before: Stages, data: Rows, rows: np.ndarray) -> None:
        self.before, self.data, self.rows = before, data, rows

    def __call__(self) -> Iterator[Batch]:
        for piece in batches(self.rows, _BATCH):
            yield self.before.run(self.data.take(piece))[0]


class _Reader:
    """The feeds as the quantiser asks for them: one by one, None at the end."""

    def __init__(self, feeds: Feeds, names: Sequence[str]) -> None:
        self._left, self._names = feeds(), names

    def get_next(self) -> Batch | None:
        batch = next(self._left, None)
        return None if batch is None else {name: batch[name] for name in self._names}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser tells the root logger what it skips; none of it is for the person who compiles."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
