"""The exit program: one linear graph of segments, heads, confidences and exits, the IR of every backend.

    h0 = segment_0(x); logits0 = head_0(h0); probabilities0 = probabilities(logits0, temperature)
    confidence0 = confidence(probabilities0); (h0', side'), rows0 = exit_if(confidence0, threshold, (h0, side))
    ... output = gather((probabilities0, ...), (rows0, ...))

Its eager run is the semantics every other backend is held to: a row leaves at the first exit whose
confidence is at least the threshold, compared in float32, and the others go on in a smaller batch (the papers' batch
shrinking, Algorithm 1). A head sees only the cut's value; nothing here says where it came from.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from offramp.runtime.errors import PlanError

from .attention import NumberMasks
from .backbone import Backbone, probabilities
from .contract import Pass, PassResult
from .plan import ExitPlan
from .segments import Segment, split
from .verify import violations

_TINY = 1e-30  # its logarithm is finite in float32, and it times that is as good as 0


def confidence(probabilities: torch.Tensor, metric: str) -> torch.Tensor:
    """Probabilities `[B, K]` -> confidence `[B]` in [0, 1]; `metric` is one of `plan.METRICS`.

    `margin` is the largest less the second largest; `entropy` is 1 less the entropy as a share of log K.
    """
    if metric == "max_probability":
        return probabilities.amax(dim=1)
    if metric == "margin":
        two = probabilities.topk(2, dim=1).values
        return two[:, 0] - two[:, 1]
    if metric == "entropy":
        known = (probabilities * probabilities.clamp(min=_TINY).log()).sum(dim=1) / math.log(probabilities.shape[1])
        return (1.0 + known).clamp(min=0.0, max=1.0)
    raise PlanError(f"confidence metric {metric!r} is unknown")


def exit_if(
    confidence: torch.Tensor, threshold: float, live: tuple[torch.Tensor, ...]
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Compaction: live tensors `[B, ...]` -> the rows that stay `[b, ...]`, and their indices `[b]`.

    A confidence that is not a number stays.
    """
    rows = torch.nonzero(~(confidence >= threshold)).squeeze(1)
    return tuple(value.index_select(0, rows) for value in live), rows


def gather(answers: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers of every exit, each for the rows that reached it -> probabilities `[B, K]`, exit index `[B]`."""
    result = answers[-1]
    index = torch.full((result.shape[0],), len(answers) - 1, dtype=torch.int64)
    for position in reversed(range(len(rows))):
        stayed = rows[position]
        result = answers[position].index_copy(0, stayed, result)
        index = torch.full((result.shape[0],), position, dtype=torch.int64).index_copy(0, stayed, index)
    return result, index


@dataclass(frozen=True)
class ExitProgram:
    """A backbone with exits."""

    backbone: Backbone
    plan: ExitPlan
    segments: tuple[Segment, ...]  # len(plan.exits) + 1
    heads: tuple[nn.Module, ...]  # len(plan.exits); [b, ...] -> logits [b, K]
    graph_module: fx.GraphModule  # the linear top graph; model inputs -> probabilities [B, K], exit [B]

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The eager reference run: model inputs in order -> probabilities `[B, K]`, exit index `[B]` int64.

        A segment that no row reaches is not run: many a model cannot run on no rows.
        """
        with torch.no_grad():
            result: tuple[torch.Tensor, torch.Tensor] = _Run(self).run(*inputs)
        return result

    def all_exits(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Every exit's probabilities for every row, compaction off: `[E, B, K]`."""
        known = {i.name: value for i, value in zip(self.backbone.inputs, inputs, strict=True)}
        answers = []
        with torch.no_grad():
            for index, segment in enumerate(self.segments):
                known.update(zip(segment.outputs, segment(*(known[n] for n in segment.inputs)), strict=True))
                answers.append(self.answer(index, known[segment.outputs[0]]))
        return torch.stack(answers)

    def answer(self, index: int, value: torch.Tensor) -> torch.Tensor:
        """Exit `index`'s probabilities `[b, K]` from the value its segment ends in."""
        if index == len(self.heads):
            return probabilities(value, self.backbone.scores, 1.0)
        return probabilities(self.heads[index](value), "logits", self.plan.exits[index].temperature)

    def with_thresholds(self, thresholds: Sequence[float]) -> ExitProgram:
        """The same program under other thresholds."""
        if len(thresholds) != len(self.plan.exits):
            raise PlanError(f"{len(thresholds)} thresholds for {len(self.plan.exits)} exits; give one each")
        exits = tuple(replace(e, threshold=t) for e, t in zip(self.plan.exits, thresholds, strict=True))
        plan = replace(self.plan, exits=exits)
        return replace(self, plan=plan, graph_module=_top_graph(self.backbone, plan, self.segments, self.heads))


class _Run(fx.Interpreter):
    """The top graph, line by line."""

    def __init__(self, program: ExitProgram) -> None:
        super().__init__(program.graph_module)
        self.segments = {f"segment_{index}": segment for index, segment in enumerate(program.segments)}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.segments:
            return self.segments[target](*args)
        return super().call_module(target, args, kwargs)


class InsertExits(Pass[Backbone, ExitProgram]):
    """Backbone + plan + heads -> exit program.

    1. The backbone is split at the plan's cuts.
    2. Behind every cut come head, probabilities, confidence and exit_if, in that order.
    3. Every value a later segment reads is compacted by every exit_if before it.
    4. The output gathers the answers back into the order the rows came in.
    """

    def __init__(self, plan: ExitPlan, heads: Mapping[str, nn.Module]) -> None:
        self.plan = plan
        self.heads = heads

    def requires(self, subject: Backbone) -> list[str]:
        return [f"no head given for {e.cut}" for e in self.plan.exits if e.cut not in self.heads]

    def call(self, subject: Backbone) -> PassResult[ExitProgram]:
        segments = split(subject, [e.cut for e in self.plan.exits])
        heads = tuple(self.heads[e.cut].eval() for e in self.plan.exits)
        top = _top_graph(subject, self.plan, segments, heads)
        return PassResult(ExitProgram(subject, self.plan, segments, heads, top), modified=True)

    def ensures(self, subject: ExitProgram) -> list[str]:
        return violations(subject, run=False)


def build_program(backbone: Backbone, plan: ExitPlan, heads: Mapping[str, nn.Module]) -> ExitProgram:
    """`Backbone` + `ExitPlan` + heads by cut name -> `ExitProgram`, whose backbone has its masks as numbers."""
    return InsertExits(plan, heads)(NumberMasks()(backbone).subject).subject


def _top_graph(
    backbone: Backbone, plan: ExitPlan, segments: Sequence[Segment], heads: Sequence[nn.Module]
) -> fx.GraphModule:
    root = nn.Module()
    graph = fx.Graph()
    known: dict[str, fx.Node] = {i.name: graph.placeholder(i.name) for i in backbone.inputs}
    answers: list[fx.Node] = []
    rows: list[fx.Node] = []
    for index, segment in enumerate(segments):
        root.add_module(f"segment_{index}", segment.graph_module)
        results = graph.call_module(f"segment_{index}", tuple(known[n] for n in segment.inputs))
        for position, name in enumerate(segment.outputs):
            known[name] = graph.call_function(operator.getitem, (results, position))
        end = known[segment.outputs[0]]
        if index == len(plan.exits):
            answers.append(graph.call_function(probabilities, (end, backbone.scores, 1.0)))
            break
        root.add_module(f"head_{index}", heads[index])
        planned = plan.exits[index]
        logits = graph.call_module(f"head_{index}", (end,))
        answers.append(graph.call_function(probabilities, (logits, "logits", planned.temperature)))
        sure = graph.call_function(confidence, (answers[-1], plan.metric))
        live = tuple(known[n] for n in segment.carries)
        exited = graph.call_function(exit_if, (sure, float(planned.threshold), live))
        kept = graph.call_function(operator.getitem, (exited, 0))
        rows.append(graph.call_function(operator.getitem, (exited, 1)))
        known = {
            name: graph.call_function(operator.getitem, (kept, position))
            for position, name in enumerate(segment.carries)
        }
    graph.output(graph.call_function(gather, (tuple(answers), tuple(rows))))
    graph.lint()
    return fx.GraphModule(root, graph)
