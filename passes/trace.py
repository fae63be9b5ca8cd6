"""A trace of the passes: the graph after each one as text, so that a person can see what it did.

    trace = Trace()
    with observed(trace):
        program = build_program(normalise(backbone), plan, heads)
    trace.records                                    # capture, RemoveAssertions, ..., InsertExits

One line per node: name, what it computes from what, `[shape] dtype`, and the module it came from. The batch's symbol
is written `batch`. An exit program is its top graph, then each segment, then what each head is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from offramp.runtime.trace import PassRecord

from .backbone import Backbone, module_path
from .contract import Pass, PassResult
from .program import ExitProgram

Subject = Backbone | ExitProgram


class Trace:
    """An observer that keeps the text of every graph it is shown, the first pass's argument as `capture`."""

    def __init__(self) -> None:
        self.records: list[PassRecord] = []

    def __call__(self, step: Pass[Any, Any], before: Subject, result: PassResult[Any]) -> None:
        """See `offramp.passes.observed`."""
        if not self.records:
            self._keep("capture", True, before)
        self._keep(step.name, result.modified, result.subject)

    def _keep(self, name: str, modified: bool, subject: Subject) -> None:
        last = self.records[-1] if self.records else None
        if last is not None and not modified:
            self.records.append(PassRecord(name, False, last.nodes, last.text))
            return
        graphs = [module.graph for _, module in _graphs(subject)]
        self.records.append(PassRecord(name, modified, sum(len(g.nodes) for g in graphs), graph_text(subject)))


def graph_text(subject: Subject) -> str:
    """A backbone or an exit program, one node per line; the same graph gives the same text."""
    symbol = (subject if isinstance(subject, Backbone) else subject.backbone).batch_symbol
    lines: list[str] = []
    for title, module in _graphs(subject):
        lines += [f"# {title}", *(_line(node, symbol) for node in module.graph.nodes), ""]
    if isinstance(subject, ExitProgram):
        for index, head in enumerate(subject.heads):
            lines += [f"# head {index}", *str(head).splitlines(), ""]
    return "\n".join(lines)


def _graphs(subject: Subject) -> Iterator[tuple[str, fx.GraphModule]]:
    if isinstance(subject, Backbone):
        yield "backbone", subject.graph_module
        return
    yield "exit program", subject.graph_module
    for index, segment in enumerate(subject.segments):
        yield f"segment {index}", segment.graph_module


def _line(node: fx.Node, symbol: str) -> str:
    made = _value(node.meta.get("val"), symbol)
    arguments = [*map(_argument, node.args), *(f"{name}={_argument(a)}" for name, a in node.kwargs.items())]
    what = {
        "placeholder": f"input {node.target}",
        "get_attr": f"weight {node.target}",
        "output": f"return {', '.join(arguments)}",
    }.get(node.op, f"{_target(node)}({', '.join(arguments)})")
    place = module_path(node)
    return "  ".join(filter(None, (f"%{node.name} = {what}", made, f"# {place}" if place != node.name else "")))


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str | torch._ops.OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _argument(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, tuple | list):
        return f"({', '.join(map(_argument, argument))})"
    return str(argument)


def _value(value: Any, symbol: str) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ", ".join("batch" if str(size) == symbol else str(size) for size in value.shape)
        return f"[{sizes}] {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_value(item, symbol) or 'None' for item in value)})"
    return "" if value is None else "batch" if str(value) == symbol else str(value)
