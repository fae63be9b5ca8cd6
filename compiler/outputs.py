"""Outputs: which of a model's outputs holds the scores, what kind of scores they are, two classes from one score.

Found without being told:

1. Field: the only tensor; else the one called `logits`; else the only floating-point `[B, K]`, K >= 2.
2. Kind: rows that sum to one are probabilities, exponentials that do are log-probabilities, anything else is
   logits. One score per row is a probability behind a sigmoid, else raw: p becomes `[1 - p, p]`, raw s `[0, s]`,
   whose softmax is the sigmoid of s. A regression looks the same; only a person can tell.

Refused, unless the kind is said: several classes behind a sigmoid whose rows do not sum to one (classes that do not
exclude each other), one score that lies between 0 and 1 everywhere without a sigmoid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from offramp.passes.backbone import captured_size
from offramp.runtime.errors import ModelError

from .signature import BATCH

aten = torch.ops.aten

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_LAYOUT = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.unsqueeze.default, aten.flatten.using_ints, aten.select.int, aten.slice.Tensor,
        aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.dropout.default,
        aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout,
    }
)  # fmt: skip
_SIGMOIDS = frozenset({aten.sigmoid.default, aten.hardsigmoid.default})
_SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default})
_LOGARITHMS = frozenset({aten.log_sigmoid.default, aten.log_softmax.int, aten._log_softmax.default})


@dataclass(frozen=True)
class Field:
    """One leaf of what a model returns."""

    name: str  # keys and positions joined by dots; empty when the model returns a bare tensor
    position: int  # among all leaves
    node: fx.Node

    def describe(self, batch_symbol: str) -> str:
        """Name, dtype and shape for a message."""
        value = self.node.meta["val"]
        shape = [BATCH if str(s) == batch_symbol else s for s in value.shape]
        return f"{self.name or self.position} {str(value.dtype).removeprefix('torch.')} {_printed(shape)}"


def fields(program: ExportedProgram) -> tuple[Field, ...]:
    """The tensors an exported program returns."""
    specs = program.graph_signature.output_specs
    output = next(iter(program.graph.find_nodes(op="output")))
    leaves = [n for s, n in zip(specs, output.args[0], strict=True) if s.kind is OutputKind.USER_OUTPUT]
    spec = program.call_spec.out_spec
    names = _leaf_names(spec) if spec and spec.num_leaves == len(leaves) else [str(i) for i in range(len(leaves))]
    named = zip(names, leaves, strict=True)
    found = [Field(name, position, node) for position, (name, node) in enumerate(named) if isinstance(node, fx.Node)]
    return tuple(f for f in found if isinstance(f.node.meta.get("val"), torch.Tensor))


def _leaf_names(spec: pytree.TreeSpec) -> list[str]:
    if spec.is_leaf():
        return [""]
    # torch 2.13 deprecates the attribute, older ones have no method
    children = spec.children() if hasattr(spec, "children") else spec.children_specs
    names = []
    for key, child in zip(_keys(spec, len(children)), children, strict=True):
        names += [".".join(filter(None, (key, rest))) for rest in _leaf_names(child)]
    return names


def _keys(spec: pytree.TreeSpec, count: int) -> list[str]:
    """Names of a container's children: keys of a mapping, fields of a dataclass or named tuple, else positions."""
    context: Any = spec.context
    if hasattr(context, "_fields"):
        context = context._fields
    elif isinstance(context, list | tuple) and len(context) == 2 and isinstance(context[0], list):
        context = context[0]  # a dataclass: fields that hold something, fields that hold None
    if isinstance(context, list | tuple) and len(context) == count and all(isinstance(key, str) for key in context):
        return list(context)
    return [str(position) for position in range(count)]


def find_scores(found: Sequence[Field], said: str | int | None, batch_symbol: str, title: str) -> Field:
    """The field that holds the scores; `said` is its name or position, if a person gave it.

    Raises `ModelError` that lists the outputs when there is none or more than one, or when it cannot be scores.
    """
    listed = ", ".join(f.describe(batch_symbol) for f in found) or "no tensor at all"
    if said is not None:
        named = [f for f in found if f.name == str(said)] or [f for f in found if str(f.position) == str(said)]
        if not named:
            raise ModelError(f"{title} has no output {said!r}; it returns {listed}")
    else:
        named = (
            [f for f in found if len(found) == 1]
            or [f for f in found if f.name == "logits"]
            or [f for f in found if _classes(f, batch_symbol) >= 2]
        )
        if len(named) != 1:
            raise ModelError(
                f"{title} returns {listed}: {len(named) or 'none'} of them may be the scores; "
                "name one with output=... (--output-field)"
            )
    if not _classes(named[0], batch_symbol):
        value = named[0].node.meta["val"]
        printed = _printed([BATCH if str(s) == batch_symbol else s for s in value.shape])
        raise ModelError(
            f"{title} returns {value.dtype} {printed}, not one score vector per row; wrap it so that it returns "
            "float32 scores [batch, classes], or [batch] for two classes"
        )
    return named[0]


def _printed(shape: Sequence[object]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _classes(found: Field, batch_symbol: str) -> int:
    """Scores per row: K of `[B, K]`, 1 of `[B]` and `[B, 1]`; 0 for what cannot be scores."""
    value = found.node.meta["val"]
    if value.dtype not in _FLOATS or not 1 <= value.dim() <= 2 or str(value.shape[0]) != batch_symbol:
        return 0
    last = value.shape[1] if value.dim() == 2 else 1
    return last if isinstance(last, int) else 0


def detect_scores(scores: torch.Tensor) -> str:
    """Scores `[B, K]` of real rows -> "probabilities", "log_probabilities" or "logits"."""
    ones = torch.ones(len(scores))
    if bool((scores >= 0).all()) and torch.allclose(scores.sum(1), ones, atol=1e-3):
        return "probabilities"
    if bool((scores <= 0).all()) and torch.allclose(scores.exp().sum(1), ones, atol=1e-3):
        return "log_probabilities"
    return "logits"


def score_kind(module: fx.GraphModule, scores: torch.Tensor, said: str | None, title: str) -> str:
    """The kind of the scores `[B, K]`, `[B, 1]` or `[B]` that a graph returned for real rows.

    Raises `ModelError` when what is said is not so, and where nobody can tell.
    """
    if said is not None:
        _check_said(scores, said, title)
        return said
    last = _last_computation(module)
    within = bool((scores >= 0).all()) and bool((scores <= 1).all())
    if _is_vector(scores):
        if last in _SIGMOIDS | _SOFTMAXES:
            return "probabilities"
        if within or last in _LOGARITHMS:
            raise ModelError(
                f"{title} gives one score per row that may be a probability or not; say which with "
                "scores='probabilities' or 'logits' (--scores)"
            )
        return "logits"
    kind = detect_scores(scores)
    if kind == "logits" and last in _SIGMOIDS:
        raise ModelError(
            f"{title} ends in a sigmoid and its rows do not sum to 1: the classes do not exclude each other, and an "
            "exit answers one class; if one class is the answer, say scores='probabilities' (--scores)"
        )
    return kind


def _check_said(scores: torch.Tensor, said: str, title: str) -> None:
    if said == "log_probabilities" and _is_vector(scores):
        raise ModelError(f"{title} gives one score per row; say 'probabilities' or 'logits', not 'log_probabilities'")
    low, high = float(scores.min()), float(scores.max())
    limits = {"probabilities": (0.0, 1.0), "log_probabilities": (-float("inf"), 0.0)}
    least, most = limits.get(said, (low, high))
    if low < least - 1e-3 or high > most + 1e-3:
        raise ModelError(f"{title} gives scores from {low:.4g} to {high:.4g}: these are no {said}; leave scores out")


def _is_vector(scores: torch.Tensor) -> bool:
    return scores.dim() == 1 or scores.shape[1] == 1


def _last_computation(module: fx.GraphModule) -> Any:
    """The operator that made the scores, layout and dtype aside."""
    node: Any = _scores(module)
    while node.target in _LAYOUT:
        node = node.args[0]
    return node.target


def _scores(module: fx.GraphModule) -> fx.Node:
    node = next(iter(module.graph.find_nodes(op="output"))).args[0]
    assert isinstance(node, fx.Node)
    return node


def to_classes(module: fx.GraphModule, kind: str) -> int:
    """In place: the graph returns float32 scores `[B, K]`, K >= 2; -> K."""
    node = _scores(module)
    value: torch.Tensor = node.meta["val"]
    batch, *rest = value.shape
    output = next(iter(module.graph.find_nodes(op="output")))

    def then(shape: Sequence[int], target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with module.graph.inserting_before(output):
            made = module.graph.call_function(target, args, kwargs)
        # Running the operator on the recorded value instead may fix the batch's symbol.
        made.meta["val"] = value.new_empty((batch, *shape), dtype=torch.float32)
        return made

    if value.dtype != torch.float32:
        node = then(rest, aten._to_copy.default, node, dtype=torch.float32)
    if not rest:
        node = then([1], aten.unsqueeze.default, node, 1)
    if rest in ([], [1]):
        if kind == "probabilities":
            node = then([2], aten.cat.default, [then([1], aten.rsub.Scalar, node, 1.0), node], 1)
        else:
            node = then([2], aten.constant_pad_nd.default, node, [1, 0], 0.0)
    output.args = (node,)
    module.graph.lint()
    module.recompile()
    return captured_size(node.meta["val"].shape[1])
