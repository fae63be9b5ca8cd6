"""From a torch module to a plain ONNX model: torch's own exporter, then names a person knows, the same every time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import nn
from torch.export import Dim

from offramp.runtime.errors import ModelError

from .names import Places, name_graph
from .reshapes import keep_sizes

OPSET = 18  # old enough for every ONNX Runtime binding in use, new enough for all that torch emits


@dataclass(frozen=True)
class Example:
    """One input to trace with."""

    name: str
    value: torch.Tensor  # at least 2 in dimension 0, which is free
    free: tuple[int, ...]  # further dimensions that may vary


def to_onnx(
    module: nn.Module, inputs: Sequence[Example], outputs: Sequence[str], prefixes: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """A module and example inputs in its order -> a model with a free dimension 0 named `batch`.

    `prefixes` maps paths in `module` to what nodes and weights below them are called; see `names`.

    Raises `ModelError` with torch's reason for an operator the exporter does not know.
    """
    model = _exported(module, inputs, outputs, optimize=True)
    if _dangling(model.graph):  # onnxscript (0.7.2) forgets bounds it makes for a value clipped several times
        model = _exported(module, inputs, outputs, optimize=False)
    keep_sizes(model)
    weights = {path: tuple(w.shape) for path, w in module.named_parameters(remove_duplicate=False)}
    places = Places({"": ""} if prefixes is None else prefixes, weights)
    name_graph(model.graph, [i.name for i in inputs], outputs, places)
    _clean(model)
    return model


def _exported(
    module: nn.Module, inputs: Sequence[Example], outputs: Sequence[str], *, optimize: bool
) -> onnx.ModelProto:
    batch = Dim("batch")
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it warns of torchvision operators nobody asked for
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                tuple(i.value for i in inputs),
                dynamic_shapes=(tuple({0: batch, **dict.fromkeys(i.free, Dim.DYNAMIC)} for i in inputs),),
                input_names=[f"input_{position}" for position in range(len(inputs))],
                output_names=[f"output_{position}" for position in range(len(outputs))],
                opset_version=OPSET,
                dynamo=True,
                optimize=optimize,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        raise ModelError(f"{type(module).__name__} cannot be translated to ONNX: {_reason(error)}") from error
    finally:
        registration.setLevel(level)
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def _dangling(graph: onnx.GraphProto) -> bool:
    """Whether a node reads what nothing makes. Translated models have no branches of their own."""
    known = {value.name for value in (*graph.input, *graph.initializer)}
    known.update(name for node in graph.node for name in node.output)
    return any(name and name not in known for node in graph.node for name in node.input)


def _reason(error: BaseException) -> str:
    """The cause at the bottom: what lies above it is advice on how to debug torch."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def _clean(model: onnx.ModelProto) -> None:
    """Drop what describes the machine and the source rather than the computation."""
    model.doc_string = ""
    model.producer_name = "offramp"
    model.producer_version = ""
    del model.metadata_props[:]
    _clean_graph(model.graph)


def _clean_graph(graph: onnx.GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _clean_graph(attribute.g)
