"""TorchScript source: the graph of an exported stage as a method, and the driver that runs stages on live rows.

A node becomes one statement under its own name. TorchScript picks an operator's overload by the types of its
arguments, as torch's Python functions do; an empty list has no type of its own and is given that of the
operator's schema.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from offramp.passes import ExitProgram
from offramp.passes.normalise import is_assertion

aten = torch.ops.aten

Weights = dict[str, torch.Tensor]

# Sizes and the arithmetic of sizes.
_SCALARS: dict[Any, str] = {
    aten.sym_size.int: "{}.size({})",
    aten.sym_stride.int: "{}.stride({})",
    aten.sym_numel.default: "{}.numel()",
    operator.getitem: "{}[{}]",
    operator.add: "{} + {}",
    operator.sub: "{} - {}",
    operator.mul: "{} * {}",
    operator.floordiv: "{} // {}",
    operator.truediv: "{} / {}",
    operator.mod: "{} % {}",
    operator.pow: "{} ** {}",
    operator.neg: "-{}",
    operator.eq: "{} == {}",
    operator.ne: "{} != {}",
    operator.lt: "{} < {}",
    operator.le: "{} <= {}",
    operator.gt: "{} > {}",
    operator.ge: "{} >= {}",
    operator.and_: "{} and {}",
    operator.or_: "{} or {}",
    torch.sym_not: "not {}",
    torch.sym_max: "max({}, {})",
    torch.sym_min: "min({}, {})",
    torch.sym_float: "float({})",
    torch.sym_int: "int({})",
    math.trunc: "int({})",
    math.floor: "math.floor({})",
    math.ceil: "math.ceil({})",
}

_ITEMS = (aten.item.default, aten._local_scalar_dense.default)
_PYTHON_TYPES: dict[type, str] = {
    torch.SymInt: "int",
    torch.SymFloat: "float",
    torch.SymBool: "bool",
    int: "int",
    float: "float",
    bool: "bool",
}


def stage_method(index: int, exported: ExportedProgram) -> tuple[str, Weights]:
    """An exported stage -> method `stage_<index>` of its inputs, and the weights it reads by attribute name.

    Raises `ValueError` for an operator that is not libtorch's own. Drops the graph's assertions, in place.
    """
    graph = exported.graph
    for node in reversed(graph.nodes):
        if is_assertion(node):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    stored = {**exported.state_dict, **exported.constants}
    weights: Weights = {}
    names: dict[str, str] = {}
    inputs = []
    for spec in exported.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(name)
            continue
        names[name] = f"self.stage_{index}_{name}"
        weight = stored.get(str(spec.target))
        if not isinstance(weight, torch.Tensor):
            raise ValueError(f"{spec.target} is not a tensor; rewrite the model without it")
        weights[f"stage_{index}_{name}"] = weight
    writer = _Writer(names, inputs[0])
    lines = [writer.statement(n) for n in graph.nodes if n.op != "placeholder"]
    parameters = ", ".join(f"{name}: Tensor" for name in inputs)
    results = ", ".join("Tensor" for _ in exported.graph_signature.user_outputs)
    return _method(f"stage_{index}", parameters, f"Tuple[{results}]", lines), weights


def program_source(program: ExitProgram, stages: Sequence[str]) -> str:
    """Methods of every stage -> the whole program's methods, as the module docstring of `torchscript` lists them."""
    exits = len(program.heads)
    named = [i.name for i in program.backbone.inputs]
    forward = _method(
        "forward",
        ", ".join(f"{name}: Tensor" for name in named),
        "Tuple[Tensor, Tensor]",
        [
            f"if {named[0]}.size(0) == 0:",  # many a model cannot run on no rows
            f"    none = torch.zeros([0, {program.backbone.classes}], dtype=torch.float32, device={named[0]}.device)",
            "    return none, none.sum(1).to(torch.int64)",
            f"return self.from_0(self.limits, {', '.join(named)})",
        ],
    )
    get = _method("thresholds", "", "Tensor", ["return self.limits.clone()"])
    refuse = f"if thresholds.dim() != 1 or thresholds.size(0) != {exits} or bool(torch.isnan(thresholds).any()):"
    change = [
        refuse,
        f"    raise ValueError('give {exits} thresholds in one dimension, infinity for an exit that never answers')",
        "self.limits = thresholds.to(self.limits).clone()",
    ]
    put = _method("set_thresholds", "thresholds: Tensor", "None", change)
    return "\n".join([*stages, *_driver(program), forward, get, put])


def _driver(program: ExitProgram) -> list[str]:
    """Methods `from_<index>`, every one of them given the values live there."""
    live = tuple(i.name for i in program.backbone.inputs)
    seen = (*live, *(name for s in program.segments for name in s.outputs))
    values = {name: f"value_{position}" for position, name in enumerate(dict.fromkeys(seen))}
    methods = []
    for index, segment in enumerate(program.segments):
        parameters = ", ".join(["limits: Tensor", *(f"{values[n]}: Tensor" for n in live)])
        call = f"self.stage_{index}({', '.join(values[n] for n in segment.inputs)})"
        if index == len(program.heads):
            lines = [
                f"answer, sure = {call}",
                f"return answer, torch.full_like(sure, {index}, dtype=torch.int64)",
            ]
        else:
            carried = ", ".join(f"{values[n]}.index_select(0, rows)" for n in segment.carries)
            lines = [
                f"{', '.join(values[n] for n in segment.outputs)}, answer, sure = {call}",
                f"exits = torch.full_like(sure, {index}, dtype=torch.int64)",
                f"rows = torch.nonzero(~(sure >= limits[{index}])).squeeze(1)",
                "if rows.numel() > 0:",
                f"    later, later_exits = self.from_{index + 1}(limits, {carried})",
                "    answer = answer.index_copy(0, rows, later)",
                "    exits = exits.index_copy(0, rows, later_exits)",
                "return answer, exits",
            ]
        methods.append(_method(f"from_{index}", parameters, "Tuple[Tensor, Tensor]", lines))
        live = segment.carries
    return methods


def _method(name: str, parameters: str, result: str, lines: Sequence[str]) -> str:
    head = f"def {name}({', '.join(part for part in ('self', parameters) if part)}) -> {result}:\n"
    return head + "".join(f"    {line}\n" for line in lines)


class _Writer:
    """Writes nodes as statements; a name that is not in `names` is a local variable."""

    def __init__(self, names: dict[str, str], first: str) -> None:
        self.names = names
        self.device = f"{first}.device"

    def statement(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {', '.join(self.value(v, 'Tensor') for v in node.args[0])}"  # type: ignore[union-attr]
        if node.op != "call_function":
            raise ValueError(f"{node.op} {node.target} has no form there")
        if node.target in _SCALARS:
            result = _SCALARS[node.target].format(*(self.value(a, "number") for a in node.args))
            if node.target is operator.pow:  # of two integers is a float in TorchScript, and no size
                result = f"{_PYTHON_TYPES[type(node.meta['val'])]}({result})"
            return f"{node.name} = {result}"
        if node.target in _ITEMS:  # an operator's own result is a number of no stated type, and no size
            return f"{node.name} = {_PYTHON_TYPES[type(node.meta['val'])]}({self.value(node.args[0], 'Tensor')})"
        return f"{node.name} = {self.call(node)}"

    def call(self, node: fx.Node) -> str:
        target: Any = node.target
        if not isinstance(target, OpOverload) or target.namespace != "aten":
            raise ValueError(f"operator {target} is not one of libtorch's own; rewrite the model without it")
        kinds = {a.name: a.type.annotation_str for a in target._schema.arguments}
        given = [self.value(value, kind) for value, kind in zip(node.args, kinds.values(), strict=False)]
        given += [f"{name}={self.value(value, kinds[name])}" for name, value in node.kwargs.items()]
        return f"torch.ops.aten.{target._opname}({', '.join(given)})"

    def value(self, value: Any, kind: str) -> str:
        """An argument of the schema's type `kind`, such as `Optional[List[int]]`."""
        if isinstance(value, fx.Node):
            return self.names.get(value.name, value.name)
        kind = kind[len("Optional[") : -1] if kind.startswith("Optional[") else kind
        if isinstance(value, list | tuple):
            items = ", ".join(self.value(v, kind[len("List[") : -1]) for v in value)
            return f"[{items}]" if value and None not in value else f"torch.jit.annotate({kind}, [{items}])"
        if isinstance(value, torch.device):
            return self.device
        if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
            return str(value)
        if isinstance(value, float) or (kind == "float" and type(value) is int):
            return repr(float(value)) if math.isfinite(value) else f"float('{value}')"
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        raise ValueError(f"argument {value!r} has no form there")
