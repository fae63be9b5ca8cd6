"""Capture: a trained classifier becomes a `Backbone`.

torch.export traces the model with a dynamic batch, the exported program is made functional, parameters become
`get_attr` nodes under their own names, the output that holds the scores is found and brought to one score per
class, and the passes of `offramp.passes.normalise` run. Then two things are checked by running real rows: that the
output is one finite score vector per row, and that a row's scores do not depend on the other rows of its batch.

How inputs get their names is told in `arguments`, which dimensions vary in `dimensions`, what may be returned in
`outputs`.

Refused: rows the model does not run on, a model that torch.export cannot trace (with torch's reason), one that
fixes the batch size, writes to its own buffers or holds all its weights in half precision, outputs without scores,
an input named like an artifact's output, a batch-dependent model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from offramp.passes import Backbone, Input, normalise
from offramp.passes.backbone import is_size
from offramp.runtime.errors import BatchDependentError, InputError, ModelError
from offramp.runtime.manifest import ANY, Range, said

from . import dimensions
from .arguments import Call, call_for, does_not_run, input_names
from .dimensions import Words
from .exporting import evaluating, export, functional, lift, make_exportable
from .independence import TOLERANCE, difference, permuted_part
from .outputs import fields, find_scores, score_kind, to_classes
from .quiet import quiet
from .signature import Signature
from .sizes import Free, Trial, free_sizes, unchecked

# What an artifact's own inputs and outputs are called.
_RESERVED = ("probabilities", "confidence", "exit", "thresholds")


@dataclass(frozen=True, eq=False)
class _Traced:
    """A model's graph as it came, but for its inputs' names; it returns the one field that holds the scores."""

    module: fx.GraphModule
    position: int  # of that field among what the model returns
    batch_symbol: str
    free: Free

    @property
    def placeholders(self) -> list[fx.Node]:
        return list(self.module.graph.find_nodes(op="placeholder"))


def capture(
    model: nn.Module | ExportedProgram,
    example: Mapping[str, torch.Tensor],
    *,
    name: str | None = None,
    dynamic: Words | None = None,
    output: str | int | None = None,
    scores: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Backbone:
    """A classifier and example inputs by name (2 or more real rows each) -> `Backbone`.

    For an `nn.Module` the names are those of `forward`'s parameters, or the keys of the one dict it takes; a single
    input may have any name. An `ExportedProgram` (a loaded `.pt2`) must have been exported with a dynamic dimension
    0. `dynamic`, `output` and `scores` say what would be found otherwise, see `Signature`; `say` receives one line
    for whatever was taken for granted.

    Raises `ModelError`, `BatchDependentError` (see the module docstring), `InputError` for unusable examples,
    `UsageError` for a `dynamic` or `scores` that cannot be.
    """
    signature = Signature(dynamic or {}, output, scores)
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in example.values()}
    if len(lengths) != 1 or lengths.pop() < 2:
        raise InputError("capture needs the same number of example rows for every input, at least 2")
    title = name or ("exported program" if isinstance(model, ExportedProgram) else type(model).__name__)
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{title} is TorchScript, which torch.export does not read; give the nn.Module it was made of")
    _check_precision(model, title)
    if isinstance(model, ExportedProgram):
        traced = _trace_program(model, signature, title)
        if traced.free.places and (conditions := unchecked(model)):
            say(
                f"{title} was exported for sizes of which {conditions[0]}{_more(conditions)}; an artifact checks "
                "ranges alone: fix what may break this"
            )
    else:
        with evaluating(model):
            traced = _trace_module(model, example, signature, title)
    return _backbone(traced, example, signature, title, say)


def _more(conditions: Sequence[str]) -> str:
    return f" and {len(conditions) - 1} more conditions" if len(conditions) > 1 else ""


def bind(inputs: tuple[Input, ...], given: Mapping[str, torch.Tensor], title: str) -> tuple[torch.Tensor, ...]:
    """Tensors by name -> in the order of `inputs`; the one tensor of a single-input model may have any name."""
    if len(inputs) == 1 and len(given) == 1:
        return tuple(given.values())
    missing = [i.name for i in inputs if i.name not in given]
    if missing:
        raise InputError(f"{title} needs input {', '.join(missing)}; the data has {', '.join(given)}")
    return tuple(given[i.name] for i in inputs)


def _check_precision(model: nn.Module | ExportedProgram, title: str) -> None:
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if kinds and kinds <= {torch.float16, torch.bfloat16}:
        raise ModelError(
            f"{title} holds its weights as {min(map(str, kinds))}; artifacts compute in float32: give model.float()"
        )


def _trace_program(program: ExportedProgram, signature: Signature, title: str) -> _Traced:
    names = input_names(program)
    traced = _lifted(functional(program, title), names, signature, title)
    values = {str(n.target): n.meta["val"] for n in traced.placeholders}
    dimensions.asked(signature.dynamic, values, title)
    return traced


def _trace_module(model: nn.Module, example: Mapping[str, torch.Tensor], signature: Signature, title: str) -> _Traced:
    """The first that works: with every length free that may be, then with what was asked for alone."""
    with quiet():
        call, answer = call_for(model, example, title)
    make_exportable(answer)
    inputs = call.inputs()
    asked = dimensions.asked(signature.dynamic, inputs, title)
    tried = dimensions.tried(signature.dynamic, inputs)
    if tried:
        try:
            traced = _exported(model, call, {**asked, **tried}, signature, title)
        except ModelError:  # perhaps for the lengths alone; if not, the next attempt says so again
            pass
        else:
            trial = _trial(model, call, traced)
            trials = [] if traced.free.settled else [trial] if asked else [trial, trial.no_longer()]
            for one in trials:
                if not traced.free.places or one.all_agree():
                    return replace(traced, free=one.from_one())
    traced = _exported(model, call, asked, signature, title)
    if traced.free.settled:
        raise ModelError(dimensions.fixed(title, *traced.free.settled[0]))
    trial = _trial(model, call, traced)
    if traced.free.places:
        trial.check(title)
    return replace(traced, free=trial.from_one())


def _trial(model: nn.Module, call: Call, traced: _Traced) -> Trial:
    return Trial(model, call, traced.module, traced.position, traced.free)


def _exported(
    model: nn.Module, call: Call, free: Mapping[str, Collection[int]], signature: Signature, title: str
) -> _Traced:
    program = functional(export(model, call, free, title), title)
    return _lifted(program, tuple(call.inputs()), signature, title)


def _lifted(program: ExportedProgram, names: Sequence[str], signature: Signature, title: str) -> _Traced:
    kinds = program.graph_signature.user_inputs
    nodes = [n for n in program.graph.find_nodes(op="placeholder") if n.name in kinds]
    tensors = [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    batch = dimensions.batch_symbol(tensors, title)
    field = find_scores(fields(program), signature.output, batch, title)
    module = lift(program, names, field.node, title)
    free = free_sizes(module.graph.find_nodes(op="placeholder"), program.range_constraints, batch)
    return _Traced(module, field.position, batch, free)


def _backbone(
    traced: _Traced,
    example: Mapping[str, torch.Tensor],
    signature: Signature,
    title: str,
    say: Callable[[str], None],
) -> Backbone:
    module = traced.module
    if not _reads_inputs(module):
        raise ModelError(f"{title} answers the same whatever it is given: no input is read on the way to its scores")
    inputs = dimensions.described(traced.placeholders, signature.dynamic, traced.batch_symbol, traced.free, title)
    taken = [i.name for i in inputs if i.name in _RESERVED]
    if taken:
        raise ModelError(f"{title}: an artifact has a {taken[0]!r} of its own; rename this input of the model")
    arguments = bind(inputs, example, title)
    raw = _run(module, arguments, title)
    kind = score_kind(module, raw, signature.scores, title)
    classes = to_classes(module, kind)
    scores = _run(module, arguments, title)
    _check_rows(module, arguments, scores, title)
    _tell(inputs, raw, kind, title, say)
    return normalise(Backbone(title, module, inputs, traced.batch_symbol, classes, kind))


def _reads_inputs(module: fx.GraphModule) -> bool:
    """Whether the scores are made from values of an input; its size is none."""
    made: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or (not is_size(node) and any(n in made for n in node.all_input_nodes)):
            made.add(node)
    return node in made


def _tell(inputs: Sequence[Input], raw: torch.Tensor, kind: str, title: str, say: Callable[[str], None]) -> None:
    """What was taken for granted, in a line each."""
    free: dict[str, list[str]] = {}
    ranges: dict[str, Range] = {}
    for given in inputs:
        ranges |= given.ranges
        for word in given.ranges:
            free.setdefault(word, []).append(given.name)
    for word, names in free.items():
        span = "" if ranges[word] == ANY else f", {said(ranges[word])} long"
        say(f"{title}: {word!r} of {', '.join(names)} may vary from batch to batch{span}")
    if raw.dim() == 1 or raw.shape[1] == 1:
        made = "[1 - p, p], p being it" if kind == "probabilities" else "softmax of [0, s], s being it"
        say(f"{title} gives one score per row: taken for two classes, {made}; a regression is not meant")


def _run(module: fx.GraphModule, arguments: tuple[torch.Tensor, ...], title: str) -> torch.Tensor:
    with torch.no_grad():
        try:
            scores: torch.Tensor = module(*arguments)
        except (RuntimeError, IndexError) as error:
            names = [str(n.target) for n in module.graph.find_nodes(op="placeholder")]
            raise InputError(does_not_run(title, dict(zip(names, arguments, strict=True)), error)) from error
    if not torch.isfinite(scores).all():
        row = int((~torch.isfinite(scores)).reshape(len(scores), -1).any(1).nonzero()[0])
        raise ModelError(f"{title} gives a score that is not finite for row {row} of the data; check weights and data")
    return scores.float()


def _check_rows(module: fx.GraphModule, arguments: tuple[torch.Tensor, ...], scores: torch.Tensor, title: str) -> None:
    order = permuted_part(len(scores))
    change = difference(scores, _run(module, tuple(a[order] for a in arguments), title), order)
    if change > TOLERANCE:
        if difference(scores, _run(module, arguments, title), torch.arange(len(scores))) > TOLERANCE:
            raise ModelError(
                f"{title} answers the same rows otherwise every time it runs; export it in eval mode, "
                "and let dropout depend on self.training"
            )
        raise BatchDependentError(
            f"{title}: a row's scores change by {change:.1%} of their scale when other rows share its batch; "
            "early exits need rows that do not depend on each other (look for statistics over dimension 0)"
        )
