"""The verifier of the IR: a table of rules an exit program must satisfy.

Runs as what `InsertExits` ensures. Each rule yields one sentence per violation, with node and values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import fx

from .backbone import attribute, value_name

if TYPE_CHECKING:
    from .program import ExitProgram

Rule = Callable[["ExitProgram"], Iterator[str]]

TRAINING_ONLY = (
    "native_dropout",
    "native_batch_norm.",
    "_native_batch_norm_legit.",
    "rrelu_with_noise",
    "bernoulli",
)


def one_exit_per_head(program: ExitProgram) -> Iterator[str]:
    exits, heads, segments = len(program.plan.exits), len(program.heads), len(program.segments)
    if not heads == exits == segments - 1:
        yield f"{exits} exits, {heads} heads, {segments} segments"


def linear_top_graph(program: ExitProgram) -> Iterator[str]:
    """Segments and heads are called once each, in order, segment i before head i."""
    called = [n.target for n in program.graph_module.graph.nodes if n.op == "call_module"]
    expected = [f"{kind}_{i}" for i in range(len(program.segments)) for kind in ("segment", "head")][:-1]
    if called != expected:
        yield f"top graph calls {called}, not {expected}"


def live_sets_match(program: ExitProgram) -> Iterator[str]:
    """What a segment reads is what the one before carries; nothing is carried that nobody reads."""
    known = {i.name for i in program.backbone.inputs}
    for index, segment in enumerate(program.segments):
        for name in set(segment.inputs) - known:
            yield f"segment {index} reads {name}, which is not live there"
        known |= set(segment.outputs)
        read_later = {name for later in program.segments[index + 1 :] for name in later.inputs}
        for name in sorted((known & read_later) ^ set(segment.carries)):
            what = "dropped but read later" if name in read_later else "carried in vain"
            yield f"after segment {index} {name} is {what}"
        known &= set(segment.carries)


def batch_is_first(program: ExitProgram) -> Iterator[str]:
    values = {value_name(n): n.meta.get("val") for n in program.backbone.graph.nodes}
    for index, segment in enumerate(program.segments):
        for name in segment.carries:
            value = values[name]
            if not isinstance(value, torch.Tensor) or str(value.shape[0]) != program.backbone.batch_symbol:
                first = getattr(value, "shape", [None])[0]
                yield f"{name}, live after segment {index}, has dimension 0 {first}"


def edges_agree(program: ExitProgram) -> Iterator[str]:
    """Shape and dtype of a segment's placeholder are those of the value it is given."""
    values = {value_name(n): n.meta.get("val") for n in program.backbone.graph.nodes}
    for index, segment in enumerate(program.segments):
        for node in segment.graph_module.graph.find_nodes(op="placeholder"):
            given, expected = values.get(node.target), node.meta.get("val")
            if not isinstance(given, torch.Tensor) or not isinstance(expected, torch.Tensor):
                yield f"segment {index}: {node.target} has no tensor value"
            elif given.dtype != expected.dtype or [*map(str, given.shape)] != [*map(str, expected.shape)]:
                kinds = [f"{tuple(t.shape)} {t.dtype}" for t in (given, expected)]
                yield f"segment {index}: {node.target} is {kinds[0]}, read as {kinds[1]}"


def parameters_have_one_owner(program: ExitProgram) -> Iterator[str]:
    """A parameter belongs to one segment, or to no more than the places at which the backbone itself reads it."""
    owners = Counter(
        node.target
        for segment in program.segments
        for node in {n.target: n for n in segment.graph_module.graph.find_nodes(op="get_attr")}.values()
        if isinstance(attribute(segment.graph_module, str(node.target)), torch.nn.Parameter)
    )
    places = _places(program.backbone.graph)
    for name, count in owners.items():
        if count > max(1, places.get(name, 0)):
            yield f"parameter {name} is read by {count} segments"


def numbers_in_range(program: ExitProgram) -> Iterator[str]:
    for position, planned in enumerate(program.plan.exits):
        if math.isnan(planned.threshold):
            yield f"exit {position}: threshold is not a number"
        if not (math.isfinite(planned.temperature) and planned.temperature > 0):
            yield f"exit {position}: temperature {planned.temperature}"


def nothing_trains(program: ExitProgram) -> Iterator[str]:
    for index, segment in enumerate(program.segments):
        for node in segment.graph_module.graph.nodes:
            if any(op in str(node.target) for op in TRAINING_ONLY) and node.op == "call_function":
                yield f"segment {index}: {node.name} ({node.target}) only makes sense in training"
    for position, head in enumerate(program.heads):
        if head.training:
            yield f"head {position} is in training mode"


RULES: tuple[tuple[str, Rule], ...] = (
    ("one exit per head", one_exit_per_head),
    ("linear top graph", linear_top_graph),
    ("live sets match", live_sets_match),
    ("batch is dimension 0", batch_is_first),
    ("edges agree", edges_agree),
    ("parameters have one owner", parameters_have_one_owner),
    ("numbers in range", numbers_in_range),
    ("nothing trains", nothing_trains),
)


def violations(program: ExitProgram) -> list[str]:
    """Every rule broken, as `rule: what`; empty for a sound program."""
    return [f"{name}: {what}" for name, rule in RULES for what in rule(program)]


def _places(graph: fx.Graph) -> dict[object, int]:
    """Parameter -> how many nodes read it together with data, itself or through what is made of parameters alone."""
    origins: dict[fx.Node, frozenset[object]] = {}  # of nodes that depend on no input: the parameters they are made of
    places: Counter[object] = Counter()
    for node in graph.nodes:
        read = frozenset().union(*(origins.get(a, frozenset()) for a in node.all_input_nodes))
        if node.op == "get_attr":
            origins[node] = frozenset({node.target})
        elif node.op == "call_function" and all(a in origins for a in node.all_input_nodes):
            origins[node] = read
        else:
            places.update(read)
    return dict(places)
