"""The verifier of the IR: a table of rules a backbone and an exit program must satisfy.

Runs as what `InsertExits` ensures and, with `observed(verified)`, after every pass. A violation is one sentence:
the rule, the node, and the values that break it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from offramp.runtime.errors import PassError

from .backbone import Backbone, attribute, captured_size, is_size, value_name
from .contract import Pass, PassResult
from .graph_rules import GRAPH_RULES, Finding
from .linear import linear_top_graph
from .plan import METRICS

if TYPE_CHECKING:
    from .program import ExitProgram

_SAID = 3  # violations in one error; the rest mostly follows from them

BackboneRule = Callable[[Backbone], Iterator[Finding]]
ProgramRule = Callable[["ExitProgram"], Iterator[Finding]]


def inputs_as_declared(backbone: Backbone) -> Iterator[Finding]:
    """The placeholders are the backbone's inputs, in order, with the batch as dimension 0 of each."""
    declared = {i.name: i for i in backbone.inputs}
    nodes = backbone.graph.find_nodes(op="placeholder")
    names = [str(node.target) for node in nodes]
    if names != list(declared):
        yield "graph", f"reads {names}, not {list(declared)}"
        return
    for node in nodes:
        value, spec = node.meta.get("val"), declared[str(node.target)]
        if not isinstance(value, torch.Tensor) or value.dtype != spec.dtype or value.dim() != len(spec.shape):
            yield node.name, f"is {_kind(value)}, declared as {spec.shape} {spec.dtype}"
        elif str(value.shape[0]) != backbone.batch_symbol:
            yield node.name, f"has dimension 0 {value.shape[0]}, not the batch"


def scores_per_class(backbone: Backbone) -> Iterator[Finding]:
    """The one output is float32 `[B, K]`."""
    value = backbone.score_node.meta.get("val")
    if _kind(value) != f"[{backbone.batch_symbol}, {backbone.classes}] float32":
        yield backbone.score_node.name, f"is {_kind(value)}, not [batch, {backbone.classes}] float32"


def one_exit_per_head(program: ExitProgram) -> Iterator[Finding]:
    exits, heads, segments = len(program.plan.exits), len(program.heads), len(program.segments)
    if not heads == exits == segments - 1:
        yield "program", f"{exits} exits, {heads} heads, {segments} segments"


def cuts_as_planned(program: ExitProgram) -> Iterator[Finding]:
    """Segment i ends in the cut of exit i, the last one in the scores."""
    ends = [*(planned.cut for planned in program.plan.exits), program.backbone.score_node.name]
    for index, (segment, end) in enumerate(zip(program.segments, ends, strict=False)):
        if segment.outputs[:1] != (end,):
            yield f"segment {index}", f"yields {', '.join(segment.outputs) or 'nothing'}, first of all wanted: {end}"


def live_sets_match(program: ExitProgram) -> Iterator[Finding]:
    """What a segment reads is what the one before carries; nothing is carried that nobody reads."""
    known = {i.name for i in program.backbone.inputs}
    for index, segment in enumerate(program.segments):
        for name in sorted(set(segment.inputs) - known):
            yield f"segment {index}", f"reads {name}, which is not live there"
        known |= set(segment.outputs)
        read_later = {name for later in program.segments[index + 1 :] for name in later.inputs}
        for name in sorted((known & read_later) ^ set(segment.carries)):
            what = "dropped but read later" if name in read_later else "carried in vain"
            yield name, f"is {what}, after segment {index}"
        known &= set(segment.carries)


def batch_is_first(program: ExitProgram) -> Iterator[Finding]:
    values = _values(program.backbone)
    for index, segment in enumerate(program.segments):
        for name in segment.carries:
            value = values.get(name)
            first = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else None
            if str(first) != program.backbone.batch_symbol:
                yield name, f"has dimension 0 {first}, live after segment {index}"


def edges_agree(program: ExitProgram) -> Iterator[Finding]:
    """Shape and dtype of what a segment reads and yields are those of the backbone's value of that name."""
    values = _values(program.backbone)
    for index, segment in enumerate(program.segments):
        graph = segment.graph_module.graph
        read = [(str(node.target), node) for node in graph.find_nodes(op="placeholder")]
        (made,) = graph.output_node().args
        assert isinstance(made, tuple)
        for name, node in (*read, *zip(segment.outputs, made, strict=False)):
            given, found = values.get(name), node.meta.get("val") if isinstance(node, fx.Node) else node
            if _kind(given) != _kind(found) or not isinstance(found, torch.Tensor):
                yield f"segment {index}, {name}", f"is {_kind(found)} there, {_kind(given)} in the backbone"
        if [name for name, _ in read] != list(segment.inputs) or len(made) != len(segment.outputs):
            yield f"segment {index}", f"reads {[name for name, _ in read]}, declared as {list(segment.inputs)}"


def heads_give_scores(program: ExitProgram) -> Iterator[Finding]:
    """A head makes float32 `[b, K]` of the cut it stands at."""
    values = _values(program.backbone)
    for index, (head, segment) in enumerate(zip(program.heads, program.segments, strict=False)):
        cut = values.get(segment.outputs[0]) if segment.outputs else None
        if not isinstance(cut, torch.Tensor):
            yield f"head {index}", f"stands at {segment.outputs[:1]}, which has no tensor value"
            continue
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            given = torch.empty([captured_size(size) for size in cut.shape], dtype=cut.dtype)
            try:
                made = head(given)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                yield f"head {index}", f"does not take {_kind(given)}: {' '.join(str(error).split())[:200]}"
                continue
        expected = f"{[given.shape[0], program.backbone.classes]} float32"
        if _kind(made) != expected:
            yield f"head {index}", f"makes {_kind(made)} of {_kind(given)}, not {expected}"


def parameters_have_one_owner(program: ExitProgram) -> Iterator[Finding]:
    """A parameter belongs to one segment or head, or to no more places than those at which the backbone reads it."""
    owners = Counter(
        node.target
        for segment in program.segments
        for node in {n.target: n for n in segment.graph_module.graph.find_nodes(op="get_attr")}.values()
        if isinstance(attribute(segment.graph_module, str(node.target)), torch.nn.Parameter)
    )
    places = _places(program.backbone.graph)
    for name, count in owners.items():
        if count > max(1, places.get(name, 0)):
            yield f"parameter {name}", f"is read by {count} segments"
    seen = {id(parameter): f"backbone ({name})" for name, parameter in program.backbone.graph_module.named_parameters()}
    for index, head in enumerate(program.heads):
        for name, parameter in head.named_parameters():
            owner = seen.setdefault(id(parameter), f"head {index} ({name})")
            if owner != f"head {index} ({name})":
                yield f"head {index}, parameter {name}", f"belongs to {owner} already"


def numbers_in_range(program: ExitProgram) -> Iterator[Finding]:
    if program.plan.metric not in METRICS:
        yield "plan", f"confidence metric {program.plan.metric!r}"
    for position, planned in enumerate(program.plan.exits):
        if math.isnan(planned.threshold):
            yield f"exit {position}", "threshold is not a number"
        if not (math.isfinite(planned.temperature) and planned.temperature > 0):
            yield f"exit {position}", f"temperature {planned.temperature}"


def heads_do_not_train(program: ExitProgram) -> Iterator[Finding]:
    for position, head in enumerate(program.heads):
        for path, module in head.named_modules():
            if module.training:
                yield f"head {position}", f"{path or type(head).__name__} is in training mode"


BACKBONE_RULES: tuple[tuple[str, BackboneRule], ...] = (
    ("inputs are as declared", inputs_as_declared),
    ("scores are per class", scores_per_class),
)

PROGRAM_RULES: tuple[tuple[str, ProgramRule], ...] = (
    ("one exit per head", one_exit_per_head),
    ("linear top graph", linear_top_graph),
    ("cuts are as planned", cuts_as_planned),
    ("live sets match", live_sets_match),
    ("batch is dimension 0", batch_is_first),
    ("edges agree", edges_agree),
    ("heads give scores", heads_give_scores),
    ("parameters have one owner", parameters_have_one_owner),
    ("numbers in range", numbers_in_range),
    ("heads do not train", heads_do_not_train),
)

RULES: tuple[str, ...] = tuple(name for name, _ in (*GRAPH_RULES, *BACKBONE_RULES, *PROGRAM_RULES))


def violations(subject: Backbone | ExitProgram, *, run: bool = True) -> list[str]:
    """Every rule broken, as `rule: node: values`; empty for what is sound.

    The rules of one graph hold for a backbone's and for every segment's; of these only the first that is broken is
    named, because what is not well formed has no values to compare. Without `run` no operator is run, on fake
    values either: cheap enough for every compile, and blind to nothing but recorded values that are wrong.
    """
    if isinstance(subject, Backbone):
        broken = _graph_violations(subject.graph_module, "", run)
        return broken or [_said(name, *found) for name, rule in BACKBONE_RULES for found in rule(subject)]
    broken = [
        line
        for index, segment in enumerate(subject.segments)
        for line in _graph_violations(segment.graph_module, f"segment {index}, ", run)
    ]
    counted, *others = PROGRAM_RULES
    miscounted = _program_violations(subject, [counted])
    # The other rules pair segments with heads.
    return broken + (miscounted or _program_violations(subject, others))


def verified(step: Pass[Any, Any], before: Any, result: PassResult[Any]) -> None:
    """An observer: what a pass made must break no rule. Raises `PassError` that says which, where and by what."""
    if result.modified and (broken := violations(result.subject)):
        more = f"; and {len(broken) - _SAID} more" if len(broken) > _SAID else ""
        raise PassError(f"{step.name} broke the program (a bug in the pass): {'; '.join(broken[:_SAID])}{more}")


def _said(rule: str, node: str, values: str) -> str:
    return f"{rule}: {node}: {values}"


def _graph_violations(module: fx.GraphModule, where: str, run: bool) -> list[str]:
    for name, rule in GRAPH_RULES if run else GRAPH_RULES[:-1]:
        broken = [_said(name, where + node, values) for node, values in rule(module)]
        if broken:
            return broken
    return []


def _program_violations(program: ExitProgram, rules: Sequence[tuple[str, ProgramRule]]) -> list[str]:
    return [_said(name, *found) for name, rule in rules for found in rule(program)]


def _values(backbone: Backbone) -> dict[str, Any]:
    return {value_name(n): n.meta.get("val") for n in backbone.graph.nodes}


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"no tensor ({type(value).__name__})"
    sizes = ", ".join(map(str, value.shape))
    return f"[{sizes}] {str(value.dtype).removeprefix('torch.')}"


def _places(graph: fx.Graph) -> dict[object, int]:
    """Parameter -> how many nodes read it with data, itself or through what is made of parameters and sizes alone."""
    origins: dict[fx.Node, frozenset[object]] = {}  # of nodes that depend on no data: the parameters they are made of
    places: Counter[object] = Counter()
    for node in graph.nodes:
        read = frozenset().union(*(origins.get(a, frozenset()) for a in node.all_input_nodes))
        if node.op == "get_attr":
            origins[node] = frozenset({node.target})
        elif is_size(node):
            origins[node] = frozenset()
        elif node.op == "call_function" and all(a in origins for a in node.all_input_nodes):
            origins[node] = read
        else:
            places.update(read)
    return dict(places)
