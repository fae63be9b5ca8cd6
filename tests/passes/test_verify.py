"""Every rule of the verifier is broken once, by a program that breaks nothing else that matters here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from models import Attention, captured, sentences, with_exits
from torch import fx

from offramp.passes import RULES, ExitProgram, Segment, violations

Break = Callable[[ExitProgram], ExitProgram]


@pytest.fixture
def program() -> ExitProgram:
    backbone = captured(Attention, **sentences(8))
    return with_exits(backbone, ["embedding"])


def with_segment(program: ExitProgram, index: int, **changes: object) -> ExitProgram:
    segments = list(program.segments)
    segments[index] = replace(segments[index], **changes)  # type: ignore[arg-type]
    return replace(program, segments=tuple(segments))


def edited(segment: Segment, edit: Callable[[fx.Graph], None]) -> fx.GraphModule:
    module = copy.deepcopy(segment.graph_module)
    edit(module.graph)
    return module


def no_head(program: ExitProgram) -> ExitProgram:
    return replace(program, heads=())


def calls_reordered(program: ExitProgram) -> ExitProgram:
    module = copy.deepcopy(program.graph_module)
    first = next(n for n in module.graph.nodes if n.op == "call_module")
    first.target = "segment_1"
    return replace(program, graph_module=module)


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

    return with_segment(program, 1, graph_module=edited(program.segments[1], bend))


def parameter_read_twice(program: ExitProgram) -> ExitProgram:
    first = program.segments[0].graph_module
    owned = next(n.target for n in first.graph.find_nodes(op="get_attr") if n.target == "embed.weight")
    module = copy.deepcopy(program.segments[1].graph_module)
    module.add_module("embed", copy.deepcopy(first.get_submodule("embed")))
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        module.graph.get_attr(str(owned))
    return with_segment(program, 1, graph_module=module)


def temperature_lost(program: ExitProgram) -> ExitProgram:
    object.__setattr__(program.plan.exits[0], "temperature", float("nan"))
    return program


def threshold_lost(program: ExitProgram) -> ExitProgram:
    object.__setattr__(program.plan.exits[0], "threshold", float("nan"))
    return program


def head_trains(program: ExitProgram) -> ExitProgram:
    program.heads[0].train()
    return program


def dropout_left(program: ExitProgram) -> ExitProgram:
    def drop(graph: fx.Graph) -> None:
        node = next(iter(graph.find_nodes(op="placeholder")))
        with graph.inserting_after(node):
            graph.call_function(torch.ops.aten.native_dropout.default, (node, 0.5, True))

    return with_segment(program, 1, graph_module=edited(program.segments[1], drop))


BREAKS: list[tuple[str, Break, str]] = [
    ("one exit per head", no_head, "1 exits, 0 heads, 2 segments"),
    ("linear top graph", calls_reordered, "top graph calls ['segment_1', 'head_0', 'segment_1']"),
    ("live sets match", carried_in_vain, "after segment 0 ids is carried in vain"),
    ("live sets match", dropped_but_read, "after segment 0 unsqueeze_1 is dropped but read later"),
    ("batch is dimension 0", batch_lost, "embedding, live after segment 0, has dimension 0 5"),
    ("edges agree", edge_bent, "segment 1: embedding is"),
    ("parameters have one owner", parameter_read_twice, "parameter embed.weight is read by 2 segments"),
    ("numbers in range", temperature_lost, "exit 0: temperature nan"),
    ("numbers in range", threshold_lost, "exit 0: threshold is not a number"),
    ("nothing trains", head_trains, "head 0 is in training mode"),
    ("nothing trains", dropout_left, "native_dropout"),
]


def test_a_sound_program_breaks_no_rule(program: ExitProgram) -> None:
    assert violations(program) == []


@pytest.mark.parametrize(("rule", "breaks", "says"), BREAKS, ids=[b.__name__ for _, b, _ in BREAKS])
def test_a_broken_rule_is_named(program: ExitProgram, rule: str, breaks: Break, says: str) -> None:
    found = violations(breaks(program))
    assert any(line.startswith(f"{rule}: ") and says in line for line in found), found


def test_every_rule_has_a_test_that_breaks_it() -> None:
    assert {name for name, _ in RULES} == {rule for rule, _, _ in BREAKS}
