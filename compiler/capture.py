"""Capture: a trained classifier becomes a `Backbone`.

torch.export traces the model with a dynamic batch, the exported program is made functional, parameters become
`get_attr` nodes under their own names, and the passes of `offramp.passes.normalise` run. Then two things are
checked by running real rows: that the output is one finite score vector per row, and that a row's scores do
not depend on the other rows of its batch.

Refused: rows the model does not run on, a model that torch.export cannot trace (with torch's reason), one that
fixes the batch size or writes to its own buffers, an output that is not `[B, K]` float32 with K >= 2, an input
named like an artifact's output, a batch-dependent model.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from offramp.passes import Backbone, Input, normalise
from offramp.runtime.errors import BatchDependentError, InputError, ModelError, OfframpError

from .independence import TOLERANCE, difference, permuted_part
from .quiet import quiet

# What an artifact's own inputs and outputs are called.
_RESERVED = ("probabilities", "confidence", "exit", "thresholds")


def capture(
    model: nn.Module | ExportedProgram, example: Mapping[str, torch.Tensor], *, name: str | None = None
) -> Backbone:
    """A classifier and example inputs by name (2 or more real rows each) -> `Backbone`.

    For an `nn.Module` the names are those of `forward`'s parameters; a single input may have any name. An
    `ExportedProgram` (a loaded `.pt2`) must have been exported with a dynamic dimension 0.

    Raises `ModelError`, `BatchDependentError` (see the module docstring), `InputError` for unusable examples.
    """
    rows = {len(tensor) for tensor in example.values()}
    if len(rows) != 1 or rows.pop() < 2:
        raise InputError("capture needs the same number of example rows for every input, at least 2")
    if isinstance(model, ExportedProgram):
        exported = model
        title = name or "exported program"
    else:
        title = name or type(model).__name__
        exported = _export(model, example, title)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # An empty table: only functionalise. Finer operators would hide what a person recognises.
        exported = exported.run_decompositions({})
    graph_module = _lift_parameters(exported, title)
    batch_symbol = _batch_symbol(graph_module, title)
    inputs = tuple(_input(n, batch_symbol) for n in graph_module.graph.find_nodes(op="placeholder"))
    taken = [i.name for i in inputs if i.name in _RESERVED]
    if taken:
        raise ModelError(f"{title}: an artifact has a {taken[0]!r} of its own; rename this input of the model")
    classes = _classes(graph_module, batch_symbol, title)
    arguments = bind(inputs, example, title)
    scores = _run(graph_module, arguments, title)
    _check_rows(graph_module, arguments, scores, title)
    backbone = Backbone(title, graph_module, inputs, batch_symbol, classes, detect_scores(scores))
    return normalise(backbone)


def bind(inputs: tuple[Input, ...], given: Mapping[str, torch.Tensor], title: str) -> tuple[torch.Tensor, ...]:
    """Tensors by name -> in the order of `inputs`; the one tensor of a single-input model may have any name."""
    if len(inputs) == 1 and len(given) == 1:
        return tuple(given.values())
    missing = [i.name for i in inputs if i.name not in given]
    if missing:
        raise InputError(f"{title} needs input {', '.join(missing)}; the data has {', '.join(given)}")
    return tuple(given[i.name] for i in inputs)


def detect_scores(scores: torch.Tensor) -> str:
    """Scores `[B, K]` of real rows -> "probabilities", "log_probabilities" or "logits"."""
    ones = torch.ones(len(scores))
    if bool((scores >= 0).all()) and torch.allclose(scores.sum(1), ones, atol=1e-3):
        return "probabilities"
    if bool((scores <= 0).all()) and torch.allclose(scores.exp().sum(1), ones, atol=1e-3):
        return "log_probabilities"
    return "logits"


def _export(model: nn.Module, example: Mapping[str, torch.Tensor], title: str) -> ExportedProgram:
    batch = Dim("batch")
    names = list(inspect.signature(model.forward).parameters)
    if len(example) == 1 and next(iter(example)) not in names:
        arguments, keywords = tuple(example.values()), {}
        shapes: Any = tuple({0: batch} for _ in arguments)
    else:
        unknown = [n for n in example if n not in names]
        if unknown:
            raise InputError(f"{title}.forward has no parameter {', '.join(unknown)}; it has {', '.join(names)}")
        arguments, keywords = (), dict(example)
        shapes = {n: {0: batch} for n in example}
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with quiet(), torch.no_grad():
            _try(model, arguments, keywords, title)
            return torch.export.export(model, arguments, keywords, dynamic_shapes=shapes, strict=False)
    except OfframpError:
        raise
    except Exception as error:
        raise ModelError(
            f"{title} cannot be exported: {_first_lines(error)}; rewrite what torch.export cannot trace"
        ) from error
    finally:
        for module, flag in training.items():
            module.training = flag


def _try(model: nn.Module, arguments: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor], title: str) -> None:
    """What fails already here is not the tracing: most often rows of another shape or dtype."""
    try:
        model(*arguments, **keywords)
    except Exception as error:  # a person's own code: anything may come out of it
        given = _describe(keywords or {"": arguments[0]})
        raise InputError(f"{title} does not run on {given}: {_first_lines(error)}; {_RESHAPE}") from error


_RESHAPE = "give rows of the shape and dtype it was trained on"


def _describe(given: Mapping[str, torch.Tensor]) -> str:
    rows = [f"{name} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}".strip() for name, t in given.items()]
    return f"the data ({', '.join(rows)})"


def _first_lines(error: Exception) -> str:
    """The reason in torch's own words, without its pages of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}" if lines else type(error).__name__


def _lift_parameters(exported: ExportedProgram, title: str) -> fx.GraphModule:
    """The exported graph with parameters, buffers and constants as attributes, its one output a tensor."""
    signature = exported.graph_signature
    changed = [s.target for s in signature.output_specs if s.kind not in (OutputKind.USER_OUTPUT,)]
    if changed:
        raise ModelError(f"{title} writes to its own state ({changed[0]}) when it runs; export it in eval mode")
    stored = {**exported.state_dict, **exported.constants}
    specs = {s.arg.name: s for s in signature.input_specs if hasattr(s.arg, "name")}
    attributes: dict[str, Any] = {}
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in exported.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind != InputKind.USER_INPUT:
            if node.users:
                attributes[str(spec.target)] = stored[str(spec.target)]
                new[node] = graph.get_attr(str(spec.target))
                new[node].meta["val"] = node.meta.get("val")
            continue
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), torch.Tensor):
            if node.users:
                raise ModelError(f"{title}: input {node.name} is not a tensor; fix its value inside the model")
            continue
        if node.op == "output":
            graph.output(_one_tensor(node.args[0], new, title))
            continue
        new[node] = graph.node_copy(node, lambda n: new[n])
        new[node].meta = copy.copy(node.meta)
    graph.eliminate_dead_code()
    graph.lint()
    root = nn.Module()
    for target, tensor in attributes.items():
        _attach(root, target, tensor)
    return fx.GraphModule(root, graph)


def _attach(root: nn.Module, target: str, value: Any) -> None:
    *parents, leaf = target.split(".")
    owner = root
    for part in parents:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=False))
    elif isinstance(value, torch.Tensor):
        owner.register_buffer(leaf, value.detach())
    else:
        setattr(owner, leaf, value)


def _one_tensor(outputs: Any, new: Mapping[fx.Node, fx.Node], title: str) -> fx.Node:
    values = [o for o in outputs if isinstance(o, fx.Node)]
    if len(values) != 1:
        raise ModelError(
            f"{title} returns {len(values)} values; wrap it so that it returns one tensor of scores [B, K]"
        )
    return new[values[0]]


def _batch_symbol(module: fx.GraphModule, title: str) -> str:
    symbols = set()
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if value.dim() == 0 or not isinstance(value.shape[0], torch.SymInt):
            first = value.shape[0] if value.dim() else "none"
            raise ModelError(
                f"{title}: input {node.name} has the fixed batch size {first}; "
                "export it with a dynamic dimension 0 (dynamic_shapes={0: Dim('batch')})"
            )
        symbols.add(str(value.shape[0]))
    if len(symbols) != 1:
        raise ModelError(f"{title}: its {len(symbols)} inputs do not share one batch dimension; give them the same Dim")
    return symbols.pop()


def _input(node: fx.Node, batch_symbol: str) -> Input:
    value = node.meta["val"]
    shape = tuple(int(s) if isinstance(s, int) else "batch" if str(s) == batch_symbol else str(s) for s in value.shape)
    return Input(str(node.target), value.dtype, shape)


def _classes(module: fx.GraphModule, batch_symbol: str, title: str) -> int:
    value = next(iter(reversed(module.graph.nodes))).args[0].meta["val"]
    shape = list(value.shape)
    fits = len(shape) == 2 and str(shape[0]) == batch_symbol and isinstance(shape[1], int) and shape[1] >= 2
    if not fits or value.dtype != torch.float32:
        printed = ["batch" if str(s) == batch_symbol else s for s in shape]
        raise ModelError(
            f"{title} returns {value.dtype} {printed}, not one score vector per row; "
            "wrap it so that it returns float32 scores [batch, classes] with 2 classes or more"
        )
    return int(shape[1])


def _run(module: fx.GraphModule, arguments: tuple[torch.Tensor, ...], title: str) -> torch.Tensor:
    with torch.no_grad():
        try:
            scores: torch.Tensor = module(*arguments)
        except (RuntimeError, IndexError) as error:
            names = [str(n.target) for n in module.graph.find_nodes(op="placeholder")]
            given = _describe(dict(zip(names, arguments, strict=True)))
            raise InputError(f"{title} does not run on {given}: {_first_lines(error)}; {_RESHAPE}") from error
    if not torch.isfinite(scores).all():
        row = int((~torch.isfinite(scores)).any(1).nonzero()[0])
        raise ModelError(f"{title} gives a score that is not finite for row {row} of the data; check weights and data")
    return scores


def _check_rows(module: fx.GraphModule, arguments: tuple[torch.Tensor, ...], scores: torch.Tensor, title: str) -> None:
    order = permuted_part(len(scores))
    change = difference(scores, _run(module, tuple(a[order] for a in arguments), title), order)
    if change > TOLERANCE:
        raise BatchDependentError(
            f"{title}: a row's scores change by {change:.1%} of their scale when other rows share its batch; "
            "early exits need rows that do not depend on each other (look for statistics over dimension 0)"
        )
