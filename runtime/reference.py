"""A person's own code, named on the command line: `package.module:attribute` -> the object.

The working directory is importable, as with `python -m`. Refused: another form of name, a module that cannot
be imported (with its reason), an attribute that is not there.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from .errors import UsageError

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_reference(text: str) -> bool:
    """Whether `text` has the form of a reference and is not a file."""
    return _REFERENCE.fullmatch(text) is not None and not Path(text).exists()


def load_reference(text: str) -> Any:
    """Import the module and return the attribute."""
    if not is_reference(text):
        raise UsageError(f"{text!r} is not of the form package.module:name; write it so")
    module_name, _, attributes = text.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:  # importing runs a person's code: anything may come out of it
        raise UsageError(
            f"module {module_name!r} cannot be imported ({type(error).__name__}: {error}); "
            "run from its folder or install it"
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(value, attribute):
            raise UsageError(f"{text!r}: {value!r:.80} has no {attribute!r}; check the name")
        value = getattr(value, attribute)
    return value
