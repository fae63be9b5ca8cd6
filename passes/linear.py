"""The rule that an exit program's top graph is linear: segment, head, probabilities, confidence, exit, and again.

The graph is read from top to bottom. Every value gets a description: which live value it is and how many times it
has been compacted, or the answer of which exit. A node is right if what it reads is what its place in the line
asks for, and if its numbers are the plan's. So a value that goes round a compaction is found, and so is a
threshold that belongs to another exit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import fx

from .graph_rules import Finding

if TYPE_CHECKING:
    from .program import ExitProgram

Value = tuple[Any, ...]  # (kind, index) or ("live", name, times compacted)


def linear_top_graph(program: ExitProgram) -> Iterator[Finding]:
    """See the module docstring."""
    count = len(program.segments)
    called = [n.target for n in program.graph_module.graph.nodes if n.op == "call_module"]
    line = [f"{kind}_{i}" for i in range(count) for kind in ("segment", "head")][:-1]
    if called != line:
        yield "top graph", f"calls {called}, not {line}"
        return
    for path, module in zip(line, _modules(program), strict=False):
        if program.graph_module.get_submodule(path) is not module:
            yield path, "is another module than the program's own"
    reader = _Reader(program)
    for node in program.graph_module.graph.nodes:
        expected, found = reader.read(node)
        if expected != found:
            yield node.name, f"reads {_said(found)}, not {_said(expected)}"
            return


def _modules(program: ExitProgram) -> list[Any]:
    segments = [segment.graph_module for segment in program.segments]
    pairs = zip(segments, program.heads, strict=False)
    return [*(module for pair in pairs for module in pair), segments[-1]]


class _Reader:
    """What every node of the top graph stands for, as far as it was read."""

    def __init__(self, program: ExitProgram) -> None:
        self.program = program
        self.values: dict[fx.Node, Value] = {}

    def read(self, node: fx.Node) -> tuple[Any, Any]:
        """What the node should read in its place, and what it reads."""
        found = fx.node.map_arg(node.args, lambda argument: self.values.get(argument, ("nothing known",)))
        try:
            return self._expected(node, found), found
        except (IndexError, ValueError):
            return "one of the values there are", found

    def _expected(self, node: fx.Node, found: Any) -> Any:
        kind = node.op if node.op != "call_function" else str(getattr(node.target, "__name__", node.target))
        if node.op == "call_module":
            kind, _, index = str(node.target).rpartition("_")
            return getattr(self, f"_{kind}")(node, int(index))
        step = getattr(self, f"_{kind}", None)
        return f"by {kind}: an exit has no such node" if step is None else step(node, found)

    def _placeholder(self, node: fx.Node, found: Any) -> Any:
        self.values[node] = ("live", str(node.target), 0)
        return found

    def _segment(self, node: fx.Node, index: int) -> Any:
        self.values[node] = ("segment", index)
        return tuple(("live", name, index) for name in self.program.segments[index].inputs)

    def _head(self, node: fx.Node, index: int) -> Any:
        self.values[node] = ("logits", index)
        return (("live", self.program.segments[index].outputs[0], index),)

    def _getitem(self, node: fx.Node, found: Any) -> Any:
        (kind, *rest), position = found
        if kind == "segment":
            self.values[node] = ("live", self.program.segments[rest[0]].outputs[position], rest[0])
        elif kind == "exit":
            self.values[node] = ("kept" if position == 0 else "rows", rest[0])
        elif kind == "kept":
            self.values[node] = ("live", self.program.segments[rest[0]].carries[position], rest[0] + 1)
        else:
            return "a part of a segment's or an exit's values"
        return found

    def _probabilities(self, node: fx.Node, found: Any) -> Any:
        index = self._next("answer")
        self.values[node] = ("answer", index)
        if index == len(self.program.heads):
            end = self.program.segments[index].outputs[0]
            return (("live", end, index), self.program.backbone.scores, 1.0)
        return (("logits", index), "logits", self.program.plan.exits[index].temperature)

    def _confidence(self, node: fx.Node, found: Any) -> Any:
        index = self._next("confidence")
        self.values[node] = ("confidence", index)
        return (("answer", index), self.program.plan.metric)

    def _exit_if(self, node: fx.Node, found: Any) -> Any:
        index = self._next("exit")
        self.values[node] = ("exit", index)
        live = tuple(("live", name, index) for name in self.program.segments[index].carries)
        return (("confidence", index), self.program.plan.exits[index].threshold, live)

    def _gather(self, node: fx.Node, found: Any) -> Any:
        self.values[node] = ("result",)
        exits = len(self.program.heads)
        return (tuple(("answer", i) for i in range(exits + 1)), tuple(("rows", i) for i in range(exits)))

    def _output(self, node: fx.Node, found: Any) -> Any:
        return (("result",),)

    def _next(self, kind: str) -> int:
        return sum(value[0] == kind for value in self.values.values())


def _said(value: Any) -> str:
    """A description in words, such as `relu (compacted 1 time)`."""
    if isinstance(value, tuple) and value[:1] == ("live",):
        return f"{value[1]} (compacted {value[2]} time{'' if value[2] == 1 else 's'})"
    if isinstance(value, tuple) and value and isinstance(value[0], str):
        return " ".join(map(str, value))
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_said, value))})"
    return str(value)
