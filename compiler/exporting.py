"""Exporting: torch.export's program of a model, and the plain graph made of it.

Dimension 0 is the batch. Further dimensions are left to torch.export (`Dim.AUTO`): it makes them free if the
model's own code does not fix them. It may derive a range for them, where a model branches on a length; `capture` tries
what lies beyond.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from offramp.runtime.errors import ModelError

from .arguments import Call, first_lines
from .quiet import quiet
from .signature import BATCH

_LEAVES = (torch.Tensor, int, float, str)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode within; every module's own mode is restored."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def export(model: nn.Module, call: Call, free: Mapping[str, Collection[int]], title: str) -> ExportedProgram:
    """Trace a call of a model in evaluation mode with a free batch; `free`: dimensions to free if the model allows.

    Raises `ModelError` with torch's reason.
    """
    batch = Dim(BATCH)
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]  # torch's, and its stub of export forgets it
    for name, tensor in call.inputs().items():
        shapes[tensor] = {0: batch, **dict.fromkeys(free.get(name, ()), Dim.AUTO)}
    known = model.register_forward_hook(_without_unknown)
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # tracing runs a person's own code
        raise ModelError(
            f"{title} cannot be exported: {first_lines(error)}; rewrite what torch.export cannot trace"
        ) from error
    finally:
        known.remove()


def _without_unknown(model: nn.Module, args: Any, answer: Any) -> Any:
    """What torch.export cannot take apart (a cache of keys and values) holds no scores."""
    known = pytree.tree_map(lambda leaf: leaf if isinstance(leaf, _LEAVES) else None, answer)
    return () if known is None else known  # a hook that returns None changes nothing


def make_exportable(answer: Any) -> None:
    """A dataclass as output must be known to torch.export; every field is then an output of its own name."""
    if dataclasses.is_dataclass(answer) and type(answer) not in pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(type(answer))


def functional(program: ExportedProgram, title: str) -> ExportedProgram:
    """The same program without writes into tensors; refuses one that writes to its own state or inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # An empty table: only functionalise. Finer operators would hide what a person recognises.
        program = program.run_decompositions({})
    changed = [s for s in program.graph_signature.output_specs if s.kind is not OutputKind.USER_OUTPUT]
    for spec in changed:
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            raise ModelError(f"{title} writes into its input {spec.target} when it runs; let it work on a copy")
        raise ModelError(f"{title} writes to its own state ({spec.target}) when it runs; export it in eval mode")
    return program


def lift(program: ExportedProgram, names: Sequence[str], output: fx.Node, title: str) -> fx.GraphModule:
    """The graph of a functional program with parameters, buffers and constants as attributes.

    Its placeholders are the inputs that are tensors, by `names` (of all user inputs, in order); it returns `output`.
    """
    stored = {**program.state_dict, **program.constants}
    specs = {s.arg.name: s for s in program.graph_signature.input_specs if hasattr(s.arg, "name")}
    inputs = iter(names)
    attributes: dict[str, Any] = {}
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind is not InputKind.USER_INPUT:
            if node.users:
                attributes[str(spec.target)] = stored[str(spec.target)]
                new[node] = graph.get_attr(str(spec.target))
                new[node].meta["val"] = node.meta.get("val")
        elif node.op == "placeholder":
            name = next(inputs)
            if isinstance(node.meta.get("val"), torch.Tensor):
                new[node] = graph.placeholder(name)
                new[node].meta = copy.copy(node.meta)
            elif node.users:
                raise ModelError(f"{title}: input {name} is not a tensor; fix its value inside the model")
        elif node.op != "output":
            new[node] = graph.node_copy(node, lambda n: new[n])
            new[node].meta = copy.copy(node.meta)
    graph.output(new[output])
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
