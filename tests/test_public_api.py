"""The public API of each room is its `__all__`, no more and no less, and every name of it is explained."""

from __future__ import annotations

import importlib
import inspect
import types

import pytest

ROOMS = ["offramp.compiler", "offramp.passes", "offramp.runtime"]


@pytest.mark.parametrize("room", ROOMS)
def test_all_is_what_is_there(room: str) -> None:
    module = importlib.import_module(room)
    there = {n for n, v in vars(module).items() if not n.startswith("_") and not isinstance(v, types.ModuleType)}
    # A sub-module of the name of a public function (offramp.compiler.compile) is the function.
    assert there - {"annotations"} == set(module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_explained(room: str) -> None:
    module = importlib.import_module(room)
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            said = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
            assert said, f"{room}.{name} has no docstring"
            assert not said.startswith(f"{name}("), f"{room}.{name} has only the docstring dataclass makes"


@pytest.mark.parametrize("room", ROOMS)
def test_public_methods_are_explained(room: str) -> None:
    module = importlib.import_module(room)
    for name in module.__all__:
        value = getattr(module, name)
        if not inspect.isclass(value) or not value.__module__.startswith("offramp"):
            continue
        for method, function in vars(value).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                assert inspect.getdoc(getattr(value, method)), f"{room}.{name}.{method} has no docstring"
