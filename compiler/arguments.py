"""Arguments: example inputs by name become a call of `forward`, and every tensor in it has an input's name.

The names are those of `forward`'s parameters. Where they are not:

1. One tensor goes to the first parameter, whatever it is called.
2. A `forward` that takes `*tensors` gets them in the order given.
3. A `forward` that has one parameter without a default gets a dict of all tensors; the inputs are named by its keys.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from offramp.runtime.errors import InputError

_RESHAPE = "give rows of the shape and dtype it was trained on"
_PARTS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of `forward`; `names` has the same structure, with the name of an input for each tensor."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[tuple[Any, ...], dict[str, Any]]

    def inputs(self) -> dict[str, torch.Tensor]:
        """The tensors by name, in the order in which torch.export lists them."""
        return dict(zip(pytree.tree_leaves(self.names), pytree.tree_leaves((self.args, self.kwargs)), strict=True))

    def with_inputs(self, inputs: Mapping[str, torch.Tensor]) -> Call:
        """The same call with other tensors."""
        args, kwargs = pytree.tree_map(inputs.__getitem__, self.names)
        return Call(args, kwargs, self.names)

    def __call__(self, model: nn.Module) -> Any:
        with torch.no_grad():
            return model(*self.args, **self.kwargs)


def call_for(model: nn.Module, example: Mapping[str, torch.Tensor], title: str) -> tuple[Call, Any]:
    """A model in evaluation mode and example inputs by name -> a call it answers, and its answer.

    Raises `InputError` when names or rows do not fit. What fails already here is not the tracing: most often rows
    of another shape or dtype.
    """
    refusals: list[tuple[Call, Exception]] = []
    for call in _calls(model, example, title):
        try:
            return call, call(model)
        except Exception as error:  # noqa: BLE001  # a person's own code: anything may come out of it
            refusals.append((call, error))
    call, first = refusals[0]
    raise InputError(does_not_run(title, call.inputs(), first)) from first


def does_not_run(title: str, given: Mapping[str, torch.Tensor], error: Exception) -> str:
    """One line: the model does not run on these inputs."""
    rows = ", ".join(f"{n} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for n, t in given.items())
    return f"{title} does not run on the data ({rows}): {first_lines(error)}; {_RESHAPE}"


def first_lines(error: Exception) -> str:
    """The reason in torch's own words, without its pages of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}" if lines else type(error).__name__


def _calls(model: nn.Module, example: Mapping[str, torch.Tensor], title: str) -> list[Call]:
    """The ways in which `forward` may take these inputs, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    unknown = [n for n in example if n not in parameters or parameters[n].kind in _PARTS]
    if not unknown:
        named = {n: example[n] for n in parameters if n in example}
        return [Call((), named, ((), {n: n for n in named}))]
    _check_names(unknown, title)
    plain = [p for p in parameters.values() if p.kind not in _PARTS]
    required = [p for p in plain if p.default is p.empty]
    calls = []
    if len(example) == 1 and plain:
        calls.append(Call(tuple(example.values()), {}, ((plain[0].name,), {})))
    if not plain and any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        calls.append(Call(tuple(example.values()), {}, (tuple(example), {})))
    if len(unknown) == len(example) and len(required) == 1:
        calls.append(Call((dict(example),), {}, (({n: n for n in example},), {})))
    if not calls:
        raise InputError(f"{title}.forward has no parameter {', '.join(unknown)}; it has {', '.join(parameters)}")
    return calls


def _check_names(names: list[str], title: str) -> None:
    for name in names:
        if not _is_name(name):
            raise InputError(f"{title}: input name {name!r} is not a Python name; rename it in model and data")


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)


def input_names(program: ExportedProgram) -> tuple[str, ...]:
    """Names for the user inputs of an exported program, constants included.

    The keys, where all of them are one dict that is the one argument; else as torch.export names them.
    """
    specs = program.graph_signature.input_specs
    own = tuple(str(s.arg.name) for s in specs if s.kind is InputKind.USER_INPUT and hasattr(s.arg, "name"))
    count = program.call_spec.in_spec.num_leaves if program.call_spec.in_spec else -1
    if count != len(own):
        return own
    args, kwargs = pytree.tree_unflatten(range(count), program.call_spec.in_spec)
    values = [*args, *kwargs.values()]
    keys = tuple(values[0]) if len(values) == 1 and isinstance(values[0], dict) else ()
    return keys if len(keys) == len(own) and all(map(_is_name, keys)) else own


def example_inputs(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """The inputs an exported program was traced with, by name; none when it does not keep them."""
    if program.example_inputs is None:
        return {}
    leaves = pytree.tree_leaves(program.example_inputs)
    return {n: v for n, v in zip(input_names(program), leaves, strict=False) if isinstance(v, torch.Tensor)}
