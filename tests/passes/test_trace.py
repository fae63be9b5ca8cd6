"""The trace: what each pass did, in the order they ran, as text a person can compare."""

from __future__ import annotations

from dataclasses import replace

import torch
from models import Attention, Chain, captured, sentences, with_exits
from torch import fx

from offramp.passes import Backbone, Trace, graph_text, normalise, observed

aten = torch.ops.aten


def with_dropout(backbone: Backbone) -> Backbone:
    graph = fx.Graph()
    scores = graph.graph_copy(backbone.graph, {})
    made = graph.call_function(aten.dropout.default, (scores, 0.5, False))
    made.meta = dict(scores.meta)
    graph.output(made)
    return replace(backbone, graph_module=fx.GraphModule(backbone.graph_module, graph))


def test_every_pass_leaves_a_record() -> None:
    trace = Trace()
    backbone = with_dropout(captured(Chain))
    with observed(trace):
        with_exits(normalise(backbone), ["relu"])
    assert [(r.name, r.modified) for r in trace.records] == [
        ("capture", True), ("RemoveAssertions", False), ("RemoveIdentities", True), ("FoldNumbers", False),
        ("FoldWeights", False), ("ReshapeViews", False), ("NameSqueezed", False), ("SpreadMasks", False),
        ("NumberMasks", False), ("InsertExits", True),
    ]  # fmt: skip
    captured_, asserted, identified, _, _, reshaped, _, _, _, inserted = trace.records
    assert asserted.text == captured_.text == graph_text(backbone)
    assert identified.nodes == captured_.nodes - 1
    assert "aten.dropout" in captured_.text
    assert "aten.dropout" not in identified.text
    assert reshaped.text == identified.text
    assert "exit_if" in inserted.text


def test_nothing_is_kept_outside() -> None:
    trace = Trace()
    with observed(trace):
        pass
    normalise(captured(Chain))
    assert trace.records == []


def test_a_line_says_what_a_node_is() -> None:
    text = graph_text(captured(Chain))
    assert "%first_weight = weight first.weight  [16, 6] float32" in text
    assert "%x = input x  [batch, 6] float32" in text
    expected = "aten.linear.default(%x, %first_weight, %first_bias)  [batch, 16] float32  # first"
    assert f"%linear = {expected}" in text
    assert text.splitlines()[0] == "# backbone"
    assert text.splitlines()[-1] == "%output = return %linear_2"


def test_a_program_is_its_top_graph_its_segments_and_its_heads() -> None:
    program = with_exits(captured(Attention, **sentences(8)), ["embedding"])
    text = graph_text(program)
    titles = [line for line in text.splitlines() if line.startswith("# ")]
    assert titles == ["# exit program", "# segment 0", "# segment 1", "# head 0"]
    assert "exit_if(%confidence, 0.3, (" in text
    assert "LayerNorm" in text


def test_the_same_graph_gives_the_same_text() -> None:
    assert graph_text(captured(Chain)) == graph_text(captured(Chain))
