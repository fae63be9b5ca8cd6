"""ONNX segments: one model per stage, segment and head together; the runtime compacts between them.

A stage reads live values under their names in the backbone's graph and yields the value of its cut, as much of it as
is read (see `unread`), in the first also side inputs computed there, `probabilities [rows, K]` and `confidence
[rows]`, if its input `ask` is true: an exit that never answers need not be computed. The last stage yields the
backbone's own answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import torch
from torch import fx, nn

from offramp.passes import Backbone, ExitProgram, confidence, probabilities
from offramp.passes.backbone import module_path
from offramp.passes.flops import meta_like
from offramp.runtime.engine import ModelBytes
from offramp.runtime.manifest import StageSpec

from ..progress import bar
from .external import INLINE_LIMIT, model_bytes, model_files
from .gate import gated
from .layout import in_blocks
from .names import with_places
from .promises import keep_promises
from .translate import Example, to_onnx
from .unread import EVERY, Step, without_unread

ANSWER = ("probabilities", "confidence")
_EXAMPLE_BATCH = 3  # torch.export treats 0 and 1 as constants


class Stage(nn.Module):
    """Segment `index` of a program and the head behind it.

    The cut is handed over at `step`, see `unread`; the head reads every pixel.
    """

    def __init__(self, program: ExitProgram, index: int, step: Step = EVERY) -> None:
        super().__init__()
        self.handed_over = nn.Identity() if step == EVERY else nn.MaxPool2d(1, step)
        self.segment = program.segments[index].graph_module
        self.last = index == len(program.heads)
        self.head = nn.Identity() if self.last else program.heads[index]
        self.scores = program.backbone.scores if self.last else "logits"
        self.temperature = 1.0 if self.last else program.plan.exits[index].temperature
        self.metric = program.plan.metric

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Live values -> what later stages read, probabilities `[b, K]`, confidence `[b]`."""
        outputs = self.segment(*values)
        answer = probabilities(self.head(outputs[0]), self.scores, self.temperature)
        passed = () if self.last else (self.handed_over(outputs[0]), *outputs[1:])
        return (*passed, answer, confidence(answer, self.metric))


class Plain(nn.Module):
    """The backbone alone, as it came, with its answer as probabilities."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone.graph_module
        self.scores = backbone.scores

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Model inputs -> probabilities `[B, K]`."""
        return probabilities(self.backbone(*inputs), self.scores, 1.0)


def stage_specs(program: ExitProgram) -> tuple[StageSpec, ...]:
    """What the manifest says of the stages; file names by position."""
    return tuple(
        StageSpec(f"stages/{index}.onnx", s.inputs, s.outputs if index < len(program.heads) else (), s.carries)
        for index, s in enumerate(program.segments)
    )


def stage_models(program: ExitProgram, *, rewritten: bool = True) -> tuple[onnx.ModelProto, ...]:
    """One ONNX model per stage, its head always asked; `rewritten` lays maps out as float32 convolutions want them."""
    models: list[onnx.ModelProto] = []
    specs = stage_specs(program)
    step = EVERY
    for index, spec in bar(reversed(list(enumerate(specs))), "emit", len(specs)):
        stage = Stage(program, index, step)
        own = "output" if stage.last else f"exits.{index}"
        segment = in_blocks(stage.segment) if rewritten else stage.segment
        segment, step = without_unread(segment, spec.inputs[0] if index else None)
        stage.segment, places = with_places(keep_promises(segment))
        prefixes = {"": own, "head": f"{own}.head", "handed_over": _end(segment), **_below("segment", places)}
        models.insert(0, to_onnx(stage, _examples(segment), (*spec.outputs, *ANSWER), prefixes))
    return tuple(models)


def asked_only(program: ExitProgram, models: Sequence[onnx.ModelProto]) -> tuple[onnx.ModelProto, ...]:
    """In place: the models of `stage_models` with heads that may be left unasked, but for the last, which has none."""
    specs = stage_specs(program)[:-1]
    made = [gated(model, spec.outputs, program.backbone.classes) for model, spec in zip(models, specs, strict=False)]
    return (*made, models[-1])


def backbone_model(backbone: Backbone, limit: int = INLINE_LIMIT, *, rewritten: bool = False) -> ModelBytes:
    """The plain backbone as ONNX, to measure against; weights over `limit` bytes in a file beside it.

    It is the model as it came; with `rewritten` its maps are laid out, and left out, as those of stages are.

    Raises `ModelError` when it holds an operator ONNX cannot express.
    """
    plain = Plain(backbone)
    graph = without_unread(in_blocks(plain.backbone))[0] if rewritten else plain.backbone
    plain.backbone, places = with_places(keep_promises(graph))
    prefixes = {"": "output", **_below("backbone", places)}
    model = to_onnx(plain, _examples(backbone.graph_module), ("probabilities",), prefixes)
    return model_bytes(model_files(model, "backbone.onnx", limit), "backbone.onnx")


def _end(segment: fx.GraphModule) -> str:
    """The place its first output comes from."""
    (output,) = segment.graph.find_nodes(op="output")
    return module_path(output.args[0][0])


def _below(attribute: str, places: Mapping[str, str]) -> dict[str, str]:
    """What `with_places` found, for a graph that lies under `attribute`: its weights have the model's own names."""
    return {attribute: "", **{f"{attribute}.{path}": place for path, place in places.items()}}


def _examples(module: fx.GraphModule) -> tuple[Example, ...]:
    """Example inputs for tracing, one per placeholder; zeros are valid indices and valid masks alike."""
    examples = []
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        zeros = torch.zeros_like(meta_like(value, str(value.shape[0]), _EXAMPLE_BATCH), device="cpu")
        free = tuple(d for d, size in enumerate(value.shape) if d and isinstance(size, torch.SymInt))
        examples.append(Example(str(node.target), zeros, free))
    return tuple(examples)
