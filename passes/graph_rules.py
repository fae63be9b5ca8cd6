"""Rules of the verifier that hold for one graph: a backbone's, or a segment's.

Each yields, per violation, the node and what is wrong with its values. Shapes are compared at the sizes the model
was captured with, on fake tensors, so nothing is computed and no symbol learns anything new.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from .backbone import captured_size, is_size, tensor_values

Finding = tuple[str, str]  # node, values

TRAINING_ONLY = (
    "native_dropout",
    "native_batch_norm.",
    "_native_batch_norm_legit.",
    "rrelu_with_noise",
    "bernoulli",
)
_TRAINING_FLAGS = ("train", "training")


def well_formed(module: fx.GraphModule) -> Iterator[Finding]:
    """Every value is made before it is read, every attribute exists, every node knows the value it makes."""
    try:
        module.graph.lint()
    except (RuntimeError, ValueError) as error:
        yield "graph", " ".join(str(error).split())
        return
    for node in module.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            yield node.name, f"{node.target} has no recorded value"
        elif node.op in ("call_method", "call_module"):
            yield node.name, f"{node.op} {node.target}; operators only"


def functional(module: fx.GraphModule) -> Iterator[Finding]:
    """No node writes to its argument, or a cut could lie between the writing and a reader."""
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            yield node.name, f"{node.target} writes to its argument"


def nothing_trains(module: fx.GraphModule) -> Iterator[Finding]:
    """No operator that only makes sense in training, or that is told to train."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if any(name in str(node.target) for name in TRAINING_ONLY) or _is_training(node):
            yield node.name, f"{node.target} only makes sense in training"


def values_agree(module: fx.GraphModule) -> Iterator[Finding]:
    """What a node makes of its arguments' recorded values has the shape and dtype recorded for it."""
    with FakeTensorMode(), torch.no_grad():
        for node in module.graph.nodes:
            known = all("val" in n.meta and _sized(n.meta["val"]) for n in (node, *node.all_input_nodes))
            if known and isinstance(node.target, torch._ops.OpOverload) and (values := _disagreement(node)):
                yield node.name, values


def _sized(value: Any) -> bool:
    """Whether every size in a recorded value was known at capture: some depend on data."""
    sizes: list[Any] = [size for tensor in tensor_values(value) for size in tensor.shape] or [value]
    return not any(isinstance(size, torch.SymInt) and size.node.hint is None for size in sizes)


def _disagreement(node: fx.Node) -> str | None:
    given: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: _concrete(n.meta["val"]))
    args, kwargs = given
    recorded = _kinds(_concrete(node.meta["val"]))
    try:
        made = _kinds(node.target(*args, **kwargs))  # type: ignore[operator]  # an operator, the caller has looked
    except (NotImplementedError, DataDependentOutputException, DynamicOutputShapeException):
        return None  # an operator whose shape depends on data
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return f"{node.target} does not take {_given(node)}: {' '.join(str(error).split())[:200]}"
    return None if made == recorded else f"is recorded as {recorded}, but {node.target} of {_given(node)} gives {made}"


def _is_training(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return any(given.get(flag) is True for flag in _TRAINING_FLAGS)


def _concrete(value: Any) -> Any:
    """A recorded value at the captured sizes, in the fake mode around: tensors without data, sizes as numbers."""
    if isinstance(value, torch.Tensor):
        return torch.empty([captured_size(s) for s in value.shape], dtype=value.dtype, device=value.device)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint
    if isinstance(value, tuple | list):
        return [_concrete(item) for item in value]
    return value


def _kinds(value: Any) -> str:
    kinds = [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensor_values(value)]
    return ", ".join(kinds) or str(value)


def _given(node: fx.Node) -> str:
    given = [f"{a.name} {_kinds(_concrete(a.meta['val']))}" for a in node.all_input_nodes if not is_size(a)]
    return ", ".join(given) or "nothing"


GRAPH_RULES = (
    ("graph is well formed", well_formed),
    ("nothing is written in place", functional),
    ("nothing trains", nothing_trains),
    ("values agree", values_agree),  # runs every operator, so it comes last and may be left out
)
