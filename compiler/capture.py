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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from offramp.passes import Backbone, Input, normalise
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

# What an artifact's own inputs and outputs are called.
_RESERVED = ("probabilities", "confidence", "exit", "thresholds")

_LONGEST = 4096  # that is tried
# Other sizes a free dimension is tried at; the data's may be the largest there is, so the smaller ones come first.
_OTHERS: tuple[dimensions.Size, ...] = (
    lambda n, least, most: n - 1,
    lambda n, least, most: n - 2,
    lambda n, least, most: n // 2,
    lambda n, least, most: n + 1,
    lambda n, least, most: 2 * n,
    lambda n, least, most: max(2, least),  # 1 often is a broadcast
    lambda n, least, most: n if most is None or most > _LONGEST else most,
)


@dataclass(frozen=True, eq=False)
class _Traced:
    """A model's graph as it came, but for its inputs' names; it returns the one field that holds the scores."""

    module: fx.GraphModule
    position: int  # of that field among what the model returns
    batch_symbol: str
    ranges: Mapping[str, Range]  # of the free dimensions, the batch aside, by symbol

    @property
    def placeholders(self) -> list[fx.Node]:
        return list(self.module.graph.find_nodes(op="placeholder"))

    def free(self) -> dict[str, dict[int, Range]]:
        """Free dimensions by input, the batch aside, and their ranges."""
        found: dict[str, dict[int, Range]] = {}
        for node in self.placeholders:
            for dimension, size in enumerate(node.meta["val"].shape):
                if dimension and isinstance(size, torch.SymInt):
                    found.setdefault(str(node.target), {})[dimension] = self.ranges[str(size)]
        return found


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
    _check_precision(model, title)
    if isinstance(model, ExportedProgram):
        traced = _trace_program(model, signature, title)
    else:
        with evaluating(model):
            traced = _trace_module(model, example, signature, title)
    return _backbone(traced, example, signature, title, say)


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
            program = export(model, call, {**asked, **tried}, title)
        except ModelError:  # perhaps for the lengths alone; if not, the next attempt says so again
            pass
        else:
            traced = _lifted(functional(program, title), tuple(inputs), signature, title)
            if not traced.free():
                return traced
            found = [_agrees(model, call, traced, size) for size in _OTHERS]
            if found[0] and False not in found:
                return _from_one(model, call, traced)
    program = export(model, call, asked, title)
    traced = _lifted(functional(program, title), tuple(inputs), signature, title)
    if not traced.free():
        return traced
    _check_sizes([_agrees(model, call, traced, size) for size in _OTHERS], traced, title)
    return _from_one(model, call, traced)


def _from_one(model: nn.Module, call: Call, traced: _Traced) -> _Traced:
    """The same with ranges that begin at 1, if the graph is right there: torch has all that it finds begin at 2."""
    ranges = {symbol: (1 if least == 2 else least, most) for symbol, (least, most) in traced.ranges.items()}
    wider = replace(traced, ranges=ranges)
    return wider if _agrees(model, call, wider, lambda n, least, most: least) else traced


def _check_sizes(found: Sequence[bool | None], traced: _Traced, title: str) -> None:
    """Whatever was asked to be free is so at some other size at least, and then the graph is right."""
    places = ", ".join(f"{dimension} of {name}" for name, own in traced.free().items() for dimension in own)
    if False in found:
        raise ModelError(
            f"{title}, exported, answers otherwise than itself when dimension {places} has another size; "
            "leave dynamic out"
        )
    if True not in found:
        raise ModelError(f"{title} runs at no other size of dimension {places} than the data's; leave dynamic out")


def _lifted(program: ExportedProgram, names: Sequence[str], signature: Signature, title: str) -> _Traced:
    kinds = program.graph_signature.user_inputs
    nodes = [n for n in program.graph.find_nodes(op="placeholder") if n.name in kinds]
    tensors = [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    batch = dimensions.batch_symbol(tensors, title)
    field = find_scores(fields(program), signature.output, batch, title)
    ranges = dimensions.ranges(tensors, program.range_constraints)
    return _Traced(lift(program, names, field.node, title), field.position, batch, ranges)


def _agrees(model: nn.Module, call: Call, traced: _Traced, size: dimensions.Size) -> bool | None:
    """Whether the graph answers as the model does when every free dimension is of that size, within its range.

    None when the model itself does not run then, its lengths may have to be even, say; and for the data's own sizes.
    """
    resized = dimensions.resized(call.inputs(), traced.free(), size)
    if resized is None:
        return None
    short = call.with_inputs(resized)
    with quiet():
        try:
            expected = pytree.tree_leaves(short(model))[traced.position]
        except Exception:  # noqa: BLE001  # a person's own code, at a length it may refuse in any way it likes
            return None
        try:
            with torch.no_grad():
                answer = traced.module(*short.inputs().values())
        except (RuntimeError, IndexError):
            return False
    return answer.shape == expected.shape and difference(expected, answer, torch.arange(len(expected))) <= TOLERANCE


def _backbone(
    traced: _Traced,
    example: Mapping[str, torch.Tensor],
    signature: Signature,
    title: str,
    say: Callable[[str], None],
) -> Backbone:
    module = traced.module
    inputs = dimensions.described(traced.placeholders, signature.dynamic, traced.batch_symbol, traced.ranges, title)
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
