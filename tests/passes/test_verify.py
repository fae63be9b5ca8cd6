"""Every rule of the verifier is broken once, by a subject that breaks nothing else that matters here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from models import Attention, Chain, captured, sentences, with_exits
from torch import fx, nn

from offramp.passes import (
    RULES,
    Backbone,
    ExitProgram,
    Pass,
    PassResult,
    exit_if,
    observed,
    verified,
    violations,
)
from offramp.runtime.errors import PassError

aten = torch.ops.aten

Break = Callable[[ExitProgram], ExitProgram]
BackboneBreak = Callable[[Backbone], Backbone]


@pytest.fixture
def program() -> ExitProgram:
    backbone = captured(Attention, **sentences(8))
    return with_exits(backbone, ["embedding"])


@pytest.fixture
def backbone() -> Backbone:
    return captured(Chain)


def with_segment(program: ExitProgram, index: int, **changes: object) -> ExitProgram:
    segments = list(program.segments)
    segments[index] = replace(segments[index], **changes)  # type: ignore[arg-type]
    return replace(program, segments=tuple(segments))


def with_head(program: ExitProgram, head: nn.Module) -> ExitProgram:
    return replace(program, heads=(head.eval(),))


def edited(module: fx.GraphModule, edit: Callable[[fx.Graph], None]) -> fx.GraphModule:
    module = copy.deepcopy(module)
    edit(module.graph)
    return module


def edited_segment(program: ExitProgram, index: int, edit: Callable[[fx.Graph], None]) -> ExitProgram:
    return with_segment(program, index, graph_module=edited(program.segments[index].graph_module, edit))


def edited_top(program: ExitProgram, edit: Callable[[fx.Graph], None]) -> ExitProgram:
    module = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph_module.graph))
    edit(module.graph)
    return replace(program, graph_module=module)


def edited_backbone(backbone: Backbone, edit: Callable[[fx.Graph], None]) -> Backbone:
    return replace(backbone, graph_module=edited(backbone.graph_module, edit))


def after_first_input(graph: fx.Graph, target: object, *more: object) -> None:
    """A call behind the first placeholder, that claims to give the same kind of value."""
    node = next(iter(graph.find_nodes(op="placeholder")))
    with graph.inserting_after(node):
        made = graph.call_function(target, (node, *more))  # type: ignore[arg-type]
    made.meta = dict(node.meta)


def no_head(program: ExitProgram) -> ExitProgram:
    return replace(program, heads=())


def calls_reordered(program: ExitProgram) -> ExitProgram:
    def swap(graph: fx.Graph) -> None:
        next(n for n in graph.nodes if n.op == "call_module").target = "segment_1"

    return edited_top(program, swap)


def compaction_bypassed(program: ExitProgram) -> ExitProgram:
    """The second segment reads the first one's value as it was before the exit."""

    def bypass(graph: fx.Graph) -> None:
        first, second = (n for n in graph.nodes if n.op == "call_module" and n.target.startswith("segment"))
        second.args = (next(iter(first.users)), *second.args[1:])

    return edited_top(program, bypass)


def another_threshold(program: ExitProgram) -> ExitProgram:
    def change(graph: fx.Graph) -> None:
        node = next(n for n in graph.nodes if n.target is exit_if)
        node.args = (node.args[0], 0.9, node.args[2])

    return edited_top(program, change)


def stranger_in_the_top_graph(program: ExitProgram) -> ExitProgram:
    return edited_top(program, lambda graph: after_first_input(graph, torch.relu))


def another_module(program: ExitProgram) -> ExitProgram:
    return with_head(program, copy.deepcopy(program.heads[0]))


def another_cut(program: ExitProgram) -> ExitProgram:
    planned = replace(program.plan.exits[0], cut="elsewhere")
    return replace(program, plan=replace(program.plan, exits=(planned,)))


def carried_in_vain(program: ExitProgram) -> ExitProgram:
    return with_segment(program, 0, carries=(*program.segments[0].carries, "ids"))


def dropped_but_read(program: ExitProgram) -> ExitProgram:
    return with_segment(program, 0, carries=program.segments[0].carries[:1])


def batch_lost(program: ExitProgram) -> ExitProgram:
    node = next(n for n in program.backbone.graph.nodes if n.name == "embedding")
    node.meta["val"] = node.meta["val"].transpose(0, 1)
    return program


def edge_bent(program: ExitProgram) -> ExitProgram:
    def bend(graph: fx.Graph) -> None:
        node = next(iter(graph.find_nodes(op="placeholder")))
        node.meta["val"] = node.meta["val"].double()

    return edited_segment(program, 1, bend)


def input_undeclared(program: ExitProgram) -> ExitProgram:
    return with_segment(program, 1, inputs=program.segments[1].inputs[:1])


def head_of_another_size(program: ExitProgram) -> ExitProgram:
    return with_head(program, nn.Sequential(nn.Flatten(), nn.Linear(7, 4)))


def head_of_other_classes(program: ExitProgram) -> ExitProgram:
    return with_head(program, nn.Sequential(nn.Flatten(), nn.Linear(5 * 8, 3)))


def parameter_read_twice(program: ExitProgram) -> ExitProgram:
    first = program.segments[0].graph_module
    owned = next(n for n in first.graph.find_nodes(op="get_attr") if n.target == "embed.weight")
    module = copy.deepcopy(program.segments[1].graph_module)
    module.add_module("embed", copy.deepcopy(first.get_submodule("embed")))
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        module.graph.get_attr(str(owned.target)).meta["val"] = owned.meta["val"]
    return with_segment(program, 1, graph_module=module)


def parameter_shared_with_a_head(program: ExitProgram) -> ExitProgram:
    program.heads[0].register_parameter("borrowed", program.backbone.graph_module.get_parameter("embed.weight"))
    return program


def metric_lost(program: ExitProgram) -> ExitProgram:
    object.__setattr__(program.plan, "metric", "mood")
    return program


def temperature_lost(program: ExitProgram) -> ExitProgram:
    object.__setattr__(program.plan.exits[0], "temperature", float("nan"))
    return program


def threshold_lost(program: ExitProgram) -> ExitProgram:
    object.__setattr__(program.plan.exits[0], "threshold", float("nan"))
    return program


def head_trains(program: ExitProgram) -> ExitProgram:
    next(iter(program.heads[0].children())).train()
    return program


def dropout_left(program: ExitProgram) -> ExitProgram:
    return edited_segment(program, 1, lambda graph: after_first_input(graph, aten.native_dropout.default, 0.5, True))


BREAKS: list[tuple[str, Break, str]] = [
    ("one exit per head", no_head, "program: 1 exits, 0 heads, 2 segments"),
    ("linear top graph", calls_reordered, "top graph: calls ['segment_1', 'head_0', 'segment_1']"),
    ("linear top graph", compaction_bypassed, "segment_1: reads (embedding (compacted 0 times), "),
    ("linear top graph", another_threshold, "exit_if: reads (confidence 0, 0.9, (embedding (compacted 0 times)"),
    ("linear top graph", stranger_in_the_top_graph, "by relu: an exit has no such node"),
    ("linear top graph", another_module, "head_0: is another module than the program's own"),
    ("cuts are as planned", another_cut, ", first of all wanted: elsewhere"),
    ("live sets match", carried_in_vain, "ids: is carried in vain, after segment 0"),
    ("live sets match", dropped_but_read, ": is dropped but read later, after segment 0"),
    ("batch is dimension 0", batch_lost, "embedding: has dimension 0 "),
    ("edges agree", edge_bent, "segment 1, embedding: is ["),
    ("edges agree", input_undeclared, "], declared as ['embedding']"),
    ("heads give scores", head_of_another_size, "head 0: does not take [8, 5, 8] float32"),
    ("heads give scores", head_of_other_classes, "head 0: makes [8, 3] float32 of [8, 5, 8] float32, not [8, 4]"),
    ("parameters have one owner", parameter_read_twice, "parameter embed.weight: is read by 2 segments"),
    ("parameters have one owner", parameter_shared_with_a_head, "belongs to backbone (embed.weight) already"),
    ("numbers in range", metric_lost, "plan: confidence metric 'mood'"),
    ("numbers in range", temperature_lost, "exit 0: temperature nan"),
    ("numbers in range", threshold_lost, "exit 0: threshold is not a number"),
    ("heads do not train", head_trains, "head 0: dense is in training mode"),
    ("nothing trains", dropout_left, "segment 1, native_dropout_default: aten.native_dropout.default only makes sense"),
]


def input_renamed(backbone: Backbone) -> Backbone:
    return replace(backbone, inputs=(replace(backbone.inputs[0], name="y"),))


def input_of_another_dtype(backbone: Backbone) -> Backbone:
    return replace(backbone, inputs=(replace(backbone.inputs[0], dtype=torch.int64),))


def another_batch(backbone: Backbone) -> Backbone:
    return replace(backbone, batch_symbol="s0")


def another_number_of_classes(backbone: Backbone) -> Backbone:
    return replace(backbone, classes=5)


def weight_gone(backbone: Backbone) -> Backbone:
    def rename(graph: fx.Graph) -> None:
        next(iter(graph.find_nodes(op="get_attr"))).target = "first.mass"

    return edited_backbone(backbone, rename)


def read_before_made(backbone: Backbone) -> Backbone:
    def swap(graph: fx.Graph) -> None:
        first, second = graph.find_nodes(op="call_function", target=aten.relu.default)
        first.args = (second,)

    return edited_backbone(backbone, swap)


def value_forgotten(backbone: Backbone) -> Backbone:
    def forget(graph: fx.Graph) -> None:
        del next(iter(graph.find_nodes(op="call_function", target=aten.relu.default))).meta["val"]

    return edited_backbone(backbone, forget)


def written_in_place(backbone: Backbone) -> Backbone:
    return edited_backbone(backbone, lambda graph: after_first_input(graph, aten.relu_.default))


def dropout_on(backbone: Backbone) -> Backbone:
    return edited_backbone(backbone, lambda graph: after_first_input(graph, aten.dropout.default, 0.5, True))


def shape_bent(backbone: Backbone) -> Backbone:
    def bend(graph: fx.Graph) -> None:
        node = next(iter(graph.find_nodes(op="call_function", target=aten.relu.default)))
        node.meta["val"] = node.meta["val"][:, :3]

    return edited_backbone(backbone, bend)


def arguments_that_do_not_fit(backbone: Backbone) -> Backbone:
    def swap(graph: fx.Graph) -> None:
        first, second, *_ = graph.find_nodes(op="call_function", target=aten.linear.default)
        first.args = (first.args[0], second.args[1], second.args[2])

    return edited_backbone(backbone, swap)


BACKBONE_BREAKS: list[tuple[str, BackboneBreak, str]] = [
    ("inputs are as declared", input_renamed, "graph: reads ['x'], not ['y']"),
    ("inputs are as declared", input_of_another_dtype, "x: is ["),
    ("inputs are as declared", another_batch, ", not the batch"),
    ("scores are per class", another_number_of_classes, "linear_2: is ["),
    ("graph is well formed", weight_gone, "Node first_weight target first.mass references nonexistent attribute"),
    ("graph is well formed", read_before_made, "graph: "),
    ("graph is well formed", value_forgotten, "relu: aten.relu.default has no recorded value"),
    ("nothing is written in place", written_in_place, "aten.relu_.default writes to its argument"),
    ("nothing trains", dropout_on, "dropout_default: aten.dropout.default only makes sense in training"),
    (
        "values agree",
        shape_bent,
        "relu: is recorded as [8, 3] float32, but aten.relu.default of linear [8, 16]",
    ),
    ("values agree", arguments_that_do_not_fit, "linear: aten.linear.default does not take x [8, 6] float32"),
]


def test_a_sound_program_breaks_no_rule(program: ExitProgram) -> None:
    assert violations(program) == []
    assert violations(program.backbone) == []


@pytest.mark.parametrize(("rule", "breaks", "says"), BREAKS, ids=[b.__name__ for _, b, _ in BREAKS])
def test_a_broken_rule_is_named(program: ExitProgram, rule: str, breaks: Break, says: str) -> None:
    found = violations(breaks(program))
    assert any(line.startswith(f"{rule}: ") and says in line for line in found), found


@pytest.mark.parametrize(("rule", "breaks", "says"), BACKBONE_BREAKS, ids=[b.__name__ for _, b, _ in BACKBONE_BREAKS])
def test_a_rule_broken_by_a_backbone_is_named(backbone: Backbone, rule: str, breaks: BackboneBreak, says: str) -> None:
    found = violations(breaks(backbone))
    assert any(line.startswith(f"{rule}: ") and says in line for line in found), found


def test_every_rule_has_a_test_that_breaks_it() -> None:
    assert set(RULES) == {rule for rule, _, _ in (*BREAKS, *BACKBONE_BREAKS)}


class Bends(Pass[Backbone, Backbone]):
    """Keeps its own contract and breaks the graph."""

    def call(self, subject: Backbone) -> PassResult[Backbone]:
        return PassResult(shape_bent(subject), modified=True)


def test_the_pass_that_broke_a_rule_is_named(backbone: Backbone) -> None:
    says = r"Bends broke the program \(a bug in the pass\): values agree: relu: is recorded as \[8, 3\] float32"
    with observed(verified), pytest.raises(PassError, match=says):
        Bends()(backbone)


def test_what_was_broken_before_is_not_laid_at_a_pass_that_changed_nothing(backbone: Backbone) -> None:
    class Idle(Pass[Backbone, Backbone]):
        def call(self, subject: Backbone) -> PassResult[Backbone]:
            return PassResult(subject, modified=False)

    bent = shape_bent(backbone)
    with observed(verified):
        assert Idle()(bent).subject is bent
