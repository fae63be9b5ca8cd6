"""What a model accepts: arrays against `TensorSpec`s, used for batches at run time and for whole data sets; tolerances.

Refused, with the input named: unknown or missing names, something that is no array, another dtype, rank or
size, one beyond a named dimension's range, two inputs that disagree on the batch or on a named dimension, NaN or
infinity (with the first bad row).
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from .errors import InputError, UsageError
from .manifest import Manifest, TensorSpec, said

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

Batch = np.ndarray | Mapping[str, np.ndarray]
Arrays = dict[str, np.ndarray]
Kind = tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]
Known = dict[Kind, int]  # rows of each kind

_REMEMBERED = 64
_INFINITE = float("inf")


def check_batch(batch: Any, inputs: Sequence[TensorSpec], known: Known | None = None) -> tuple[Arrays, int]:
    """-> arrays by name, and the number of rows; values are checked too.

    `known` are the kinds of batches that were found right for the same inputs: one of a known kind is not looked at
    again. For one row that takes 3 microseconds less of ResNet-20's 500, and 18 of a six-layer BERT's 9500.
    """
    known = {} if known is None else known
    kind = _kind_of(batch)
    rows = None if kind is None else known.get(kind)
    if rows is None:
        arrays = name_arrays(batch, [spec.name for spec in inputs])
        rows = check_arrays(arrays, inputs)
        if kind is not None:
            remember(known, kind, rows)
    else:
        arrays = dict(batch)
    for name, array in arrays.items():
        check_finite(array, name)
    return arrays, rows


def _kind_of(batch: Any) -> Kind | None:
    """What is checked of a batch but its values; None for one that must be looked at closely."""
    if type(batch) is not dict:
        return None
    kind = []
    for name, array in batch.items():
        if type(array) is not np.ndarray:
            return None
        kind.append((name, array.dtype, array.shape))
    return tuple(kind)


def remember(known: dict[K, V], key: K, value: V) -> V:
    """Keep what was worked out for one call for the next that gives the same; the last few are kept."""
    if len(known) >= _REMEMBERED:
        known.clear()
    known[key] = value
    return value


def check_tolerance(tolerance: float | np.ndarray | None, rows: int, manifest: Manifest) -> np.ndarray:
    """Thresholds of one tolerance [E-1], or of one for every row [B, E-1]; float32, infinity silences an exit.

    None is the plan compiled for. Raises `UsageError` for what is no tolerance, or an array that is not one per row.
    """
    try:
        given = np.asarray(tolerance)
    except ValueError as error:
        raise UsageError(f"tolerance {tolerance!r:.80} is ragged; give one number, or one for each row") from error
    if tolerance is None or given.ndim == 0:
        return np.array(manifest.thresholds(None if tolerance is None else _scalar(given)), np.float32)
    if given.shape != (rows,) or given.dtype.kind not in "fiu":
        raise UsageError(
            f"tolerance is {given.dtype} {list(given.shape)}; give one number, or one for each of the {rows} rows"
        )
    levels, which = np.unique(given, return_inverse=True)
    limits = [manifest.thresholds(_scalar(level)) for level in levels]
    return np.array(limits, np.float32).reshape(len(levels), len(manifest.exits) - 1)[which]


def _scalar(value: np.ndarray | np.generic) -> Any:
    """Python's number; of a narrower float itself, for `Manifest.plan` to know what it is."""
    return np.asarray(value)[()] if value.dtype in (np.float16, np.float32) else value.item()


def name_arrays(batch: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    """An array, or a mapping of arrays with exactly `names` -> the mapping in the order of `names`."""
    if isinstance(batch, Mapping):
        arrays = {name: batch[name] for name in names if name in batch}
        if not len(arrays) == len(batch) == len(names):
            missing = [name for name in names if name not in batch]
            unknown = [name for name in batch if name not in names]
            wrong = f"{'missing' if missing else 'unknown'}: {', '.join(map(repr, missing or unknown))}"
            raise InputError(f"inputs {wrong}; the model takes {', '.join(names)}")
    elif len(names) == 1:
        arrays = {names[0]: batch}
    else:
        raise InputError(f"the model takes {len(names)} inputs; pass a dict with {', '.join(names)}")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InputError(f"input {name!r} is a {type(array).__name__}; pass a numpy array")
    return arrays


def check_arrays(arrays: Mapping[str, np.ndarray], inputs: Sequence[TensorSpec]) -> int:
    """Check dtype and shape of each input and that they agree with each other -> the number of rows."""
    sizes: dict[str, tuple[int, str]] = {}
    for spec in inputs:
        array = arrays[spec.name]
        shape, wanted = array.shape, spec.shape
        # `dtype.name` is computed anew each time it is asked for; the comparison is not.
        if array.dtype != _dtype(spec.dtype):
            raise InputError(
                f"input {spec.name!r} is {array.dtype}, the model takes {spec.dtype}; "
                f"convert it with .astype({spec.dtype!r})"
            )
        if shape[1:] == wanted[1:] and shape:
            _agree(sizes, "batch", shape[0], spec.name)
            continue
        if len(shape) != len(wanted):
            raise InputError(_misshapen(spec, array))
        for size, expected in zip(shape, wanted, strict=True):
            if isinstance(expected, int):
                if size != expected:
                    raise InputError(_misshapen(spec, array))
            else:
                _check_range(spec, expected, size)
                _agree(sizes, expected, size, spec.name)
    return sizes["batch"][0]


def _check_range(spec: TensorSpec, dimension: str, size: int) -> None:
    span = spec.ranges.get(dimension)
    if span is not None and not (span[0] <= size and (span[1] is None or size <= span[1])):
        raise InputError(
            f"input {spec.name!r} has {size} for {dimension!r}, the model takes {said(span)}; cut or pad the rows"
        )


def _agree(sizes: dict[str, tuple[int, str]], dimension: str, size: int, name: str) -> None:
    other, first = sizes.setdefault(dimension, (size, name))
    if other != size:
        raise InputError(
            f"inputs disagree on {dimension!r}: {other} in {first!r}, {size} in {name!r}; "
            "pass arrays of the same rows and lengths"
        )


_dtype = functools.cache(np.dtype)


def check_finite(array: np.ndarray, name: str, first_row: int = 0) -> None:
    """Refuse NaN and infinity; `first_row` is what the array's first row is called."""
    if _is_finite(array):
        return
    bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    row = first_row + int(np.argmax(bad))
    raise InputError(f"input {name!r} holds NaN or infinity, first in row {row}; clean or drop such rows")


def _is_finite(array: np.ndarray) -> bool:
    if array.dtype.kind != "f":
        return array.dtype.kind != "c" or bool(np.isfinite(array).all())
    if not array.size:
        return True
    # To both, NaN is further out than infinity. `isfinite(array).all()` takes 15 microseconds longer where ONNX Runtime
    # ran just before, a thirtieth of a small model's time.
    return bool(array.item(array.argmax()) < _INFINITE and array.item(array.argmin()) > -_INFINITE)


def _misshapen(spec: TensorSpec, array: np.ndarray) -> str:
    takes = ", ".join(map(str, spec.shape))
    return f"input {spec.name!r} has shape {array.shape}, the model takes ({takes}); reshape or resize it"
