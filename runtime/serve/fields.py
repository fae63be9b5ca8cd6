"""Values out of JSON and raw bytes, checked: what a client sends is data until it has passed here.

Everything raises `InputError` and names the field. Shapes against the model are not looked at: that is the engine's
part, which says it as `Session.run` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError
from ..manifest import TensorSpec
from .work import Asked

_NAMES = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)), *(
    f"float{bits}" for bits in (16, 32, 64)
))  # fmt: skip
DTYPES = {name: np.dtype(name).newbyteorder("<") for name in _NAMES}
_LONGEST_ID = 128  # an id comes back with every row, so a long one would be multiplied
_MOST_DIMENSIONS = 32
_LARGEST = 1 << 60  # elements; numpy counts bytes in 63 bits, also of an array without any, and 8 to an element
_TYPES: dict[str, set[type]] = {"f": {int, float}, "i": {int}, "u": {int}, "b": {bool}}
_WORDS = {"f": "numbers", "i": "whole numbers", "u": "whole numbers", "b": "true or false"}

Id = str | int | None


class TooMuchJsonError(InputError):
    """More JSON than one message may hold."""


def parse_object(data: str | bytes | memoryview, what: str, most: int) -> dict[str, Any]:
    """A JSON object of at most `most` bytes; `what` is what the error calls it."""
    size = len(data) if not isinstance(data, str) or len(data) > most else len(data.encode())
    if size > most:
        raise TooMuchJsonError(
            f"{what} is {size} bytes of JSON, {most} are read here; send the tensors in binary, or fewer rows at a "
            "time, or start the server with a larger --max-json-bytes"
        )
    try:
        body = json.loads(data if isinstance(data, str) else str(data, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} cannot be read as JSON ({error}); send one JSON object") from error
    if not isinstance(body, dict):
        raise InputError(f"{what} is a JSON {type(body).__name__}; send one JSON object")
    return body


def mapping(value: Any, what: str) -> dict[str, Any]:
    """An object within JSON; None is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{what} is a {type(value).__name__}; give an object")
    return value


def sequence(value: Any, what: str) -> list[Any]:
    """A list within JSON."""
    if not isinstance(value, list):
        raise InputError(f"{what} is a {type(value).__name__}; give a list")
    return value


def identifier(value: Any, what: str) -> Id:
    """A short string, a whole number of 64 bits, or None."""
    fits = isinstance(value, str) and len(value) <= _LONGEST_ID
    fits = fits or (type(value) is int and -(1 << 63) <= value < 1 << 63)
    if value is not None and not fits:
        raise InputError(f"{what} must be a string of at most {_LONGEST_ID} characters or a whole number of 64 bits")
    return value  # type: ignore[no-any-return]


def row_ids(value: Any, rows: int) -> list[Id] | None:
    """What the rows are called in answers; None: by their index."""
    if value is None:
        return None
    ids = sequence(value, "rows")
    if len(ids) != rows:
        raise InputError(f"rows names {len(ids)} rows and the inputs hold {rows}; give one id for each row")
    return [identifier(each, f"rows[{index}]") for index, each in enumerate(ids)]


def asked(fields: Mapping[str, Any]) -> Asked:
    """`tolerance`, `deadline_ms` and `best_effort`; fields that are missing or null are not asked."""
    tolerance, deadline = fields.get("tolerance"), fields.get("deadline_ms")
    best = fields.get("best_effort")
    if best is not None and not isinstance(best, bool):
        raise InputError(f"best_effort is {best!r:.80}; give true or false")
    seconds = None
    if deadline is not None:
        seconds = _number(deadline, "deadline_ms") / 1e3
        if seconds <= 0:
            raise InputError(f"deadline_ms is {deadline!r:.80}; give milliseconds above 0")
    level: float | np.ndarray | None = None
    if isinstance(tolerance, list):
        level = np.array([_number(each, f"tolerance[{index}]") for index, each in enumerate(tolerance)], np.float64)
    elif tolerance is not None:
        level = _number(tolerance, "tolerance")
    return Asked(level, seconds, bool(best))


def _number(value: Any, what: str) -> float:
    if type(value) in (int, float) and abs(value) < 1e15 and math.isfinite(value):
        return float(value)
    raise InputError(f"{what} is {value!r:.80}; give a number")


def shape_of(value: Any, what: str) -> tuple[int, ...]:
    """Sizes from 0 up, the batch first."""
    sizes = sequence(value, what)
    fits = 1 <= len(sizes) <= _MOST_DIMENSIONS
    elements = 1
    for n in sizes if fits else ():
        if type(n) is int and 0 <= n < 1 << 31:
            elements *= n or 1
        else:
            fits = False
            break
    if not fits or elements >= _LARGEST:
        raise InputError(f"{what} is {sizes!r:.80}; give sizes from 0 up, the number of rows first")
    return tuple(sizes)


def from_lists(data: Any, spec: TensorSpec) -> np.ndarray:
    """Nested lists -> an array of the input's dtype; nothing is rounded, cut or read out of a string."""
    # Objects first: asked to find a type by itself, numpy makes room in every element for the longest string.
    found = np.array(sequence(data, f"input {spec.name!r}"), dtype=object)
    if not len(found):
        return np.zeros([n if isinstance(n, int) else 0 for n in (0, *spec.shape[1:])], spec.dtype)
    kind = np.dtype(spec.dtype).kind
    types = set(map(type, found.flat))
    if list in types:
        raise InputError(f"input {spec.name!r} holds lists of different lengths; pad or cut them to one shape")
    if not types <= _TYPES[kind]:
        raise InputError(f"input {spec.name!r} is {spec.dtype}; give {_WORDS[kind]}, in lists")
    try:
        if kind in "iu":
            _check_range(found, spec)
        with np.errstate(over="ignore"):  # what becomes infinite is refused as such
            return found.astype(spec.dtype)
    except OverflowError as error:
        raise InputError(f"input {spec.name!r} holds a number that {spec.dtype} cannot; scale it") from error


def _check_range(found: np.ndarray, spec: TensorSpec) -> None:
    limits = np.iinfo(spec.dtype)
    values = list(found.flat)
    if values and (min(values) < limits.min or max(values) > limits.max):
        raise InputError(
            f"input {spec.name!r} is {spec.dtype} and holds a number outside {limits.min} to {limits.max}; check it"
        )


def from_bytes(raw: memoryview, dtype: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Little-endian elements in row-major order -> an array; the bytes must be exactly those of the shape."""
    little = DTYPES.get(dtype)
    if little is None:
        raise InputError(f"input {name!r} has dtype {dtype!r:.80}; give one of {', '.join(DTYPES)}")
    needed = math.prod(shape) * little.itemsize
    if len(raw) != needed:
        raise InputError(
            f"input {name!r} has {len(raw)} bytes, {dtype} {list(shape)} takes {needed}; send all of its elements"
        )
    if not needed:
        return np.zeros(shape, dtype)
    if little.kind == "b" and bool((np.frombuffer(raw, np.uint8) > 1).any()):
        raise InputError(f"input {name!r} is bool and holds bytes other than 0 and 1; send one byte for each value")
    array = np.frombuffer(raw, little).reshape(shape)
    if not little.isnative:
        return array.astype(dtype)
    # A view keeps the whole message alive, which nobody has counted but for what of it is values.
    mostly_other = isinstance(raw.obj, bytes | bytearray) and 2 * needed < len(raw.obj)
    return array.copy() if mostly_other or not array.flags.aligned else array


def room_for(rows: int, most: int) -> None:
    """Refuse a request of more rows than one may have."""
    if rows > most:
        raise InputError(f"{rows} rows in one request, {most} are allowed here; send them in parts")
