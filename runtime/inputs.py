"""What a model accepts: arrays against `TensorSpec`s, used for batches at run time and for whole data sets; tolerances.

Refused, with the input named: unknown or missing names, something that is no array, another dtype, rank or
size, two inputs that disagree on the batch or on a named dimension, NaN or infinity (with the first bad row).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import InputError, UsageError
from .manifest import Manifest, TensorSpec

Batch = np.ndarray | Mapping[str, np.ndarray]


def check_batch(batch: Any, inputs: Sequence[TensorSpec]) -> tuple[dict[str, np.ndarray], int]:
    """-> arrays by name, and the number of rows; values are checked too."""
    seen = _as_usual(batch, inputs)
    if seen is None:
        arrays = name_arrays(batch, [spec.name for spec in inputs])
        seen = arrays, check_arrays(arrays, inputs)
    arrays, rows = seen
    for name, array in arrays.items():
        check_finite(array, name)
    return arrays, rows


def _as_usual(batch: Any, inputs: Sequence[TensorSpec]) -> tuple[dict[str, np.ndarray], int] | None:
    """Arrays and rows of a batch that is seen at a glance to be right; None for one that must be looked at closely.

    A glance takes 3 microseconds less, before every batch: half a hundredth of a small model's time.
    """
    if type(batch) is not dict or len(batch) != len(inputs):
        return None
    arrays: dict[str, np.ndarray] = {}
    rows = -1
    for spec in inputs:
        array = batch.get(spec.name)
        if type(array) is not np.ndarray or array.dtype != _dtype(spec.dtype) or array.shape[1:] != spec.shape[1:]:
            return None
        if not array.ndim or len(array) != rows != -1:
            return None
        arrays[spec.name] = array
        rows = len(array)
    return arrays, rows


def check_tolerance(tolerance: float | np.ndarray | None, rows: int, manifest: Manifest) -> np.ndarray:
    """Thresholds of one tolerance [E-1], or of one for every row [B, E-1]; float32, infinity silences an exit.

    None is the plan compiled for. Raises `UsageError` for what is no tolerance, or an array that is not one per row.
    """
    given = np.asarray(tolerance)
    if tolerance is None or given.ndim == 0:
        return np.array(manifest.thresholds(None if tolerance is None else given.item()), np.float32)
    if given.shape != (rows,) or given.dtype.kind not in "fiu":
        raise UsageError(
            f"tolerance is {given.dtype} {list(given.shape)}; give one number, or one for each of the {rows} rows"
        )
    levels, which = np.unique(given, return_inverse=True)
    limits = [manifest.thresholds(float(level)) for level in levels]
    return np.array(limits, np.float32).reshape(len(levels), len(manifest.exits) - 1)[which]


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
                _agree(sizes, expected, size, spec.name)
    return sizes["batch"][0]


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
    return math.isfinite(array.item(array.argmax())) and math.isfinite(array.item(array.argmin()))


def _misshapen(spec: TensorSpec, array: np.ndarray) -> str:
    takes = ", ".join(map(str, spec.shape))
    return f"input {spec.name!r} has shape {array.shape}, the model takes ({takes}); reshape or resize it"
