"""What `--data D` accepts, for the runtime and the compiler: D -> `Rows`, checked before anything uses them.

    rows.npy                  one input, memory-mapped
    rows.npz                  one array per input by name (a single input: any name), optionally `labels`
    folder/                   images, with a stated preprocessing (see `images`)
    package.module:callable   called without arguments, yields batches: an array, a dict of arrays that may
                              hold `labels`, or (inputs, labels)

Refused: nothing there, pickled objects, a damaged file, no rows, arrays of different lengths, labels that are
not one integer per row, NaN or infinity, and what `inputs` refuses once the model's inputs are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import InputError, OfframpError, UsageError
from .images import ImageRows, open_images
from .inputs import check_arrays, check_batch, check_finite, name_arrays
from .manifest import TensorSpec
from .paths import folder_at
from .reference import is_reference, load_reference

UNNAMED = "input"  # what a single input is called until the model says
LABELS = "labels"
_CHUNK_BYTES = 16 << 20


class Rows(Protocol):
    """Rows of every input, in memory or not."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs, in the model's order once `fit_rows` has seen it."""

    @property
    def labels(self) -> np.ndarray | None:
        """[rows] int64, if the data has them."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """[n] int64 -> arrays by input name, n rows each."""


class ArrayRows:
    """Rows that are arrays already, in memory or mapped."""

    def __init__(self, arrays: Mapping[str, np.ndarray], labels: np.ndarray | None = None) -> None:
        """Refuses what is no array, arrays without rows, of different lengths, or with values that are not finite."""
        self._arrays = name_arrays(arrays, list(arrays))
        self.input_names = tuple(self._arrays)
        lengths = {name: len(array) if array.ndim else 0 for name, array in self._arrays.items()}
        if not lengths or not all(lengths.values()):
            raise InputError("the data holds no rows; give at least one")
        if len({*lengths.values()}) > 1:
            raise InputError(f"inputs have different numbers of rows ({lengths}); give one of each per row")
        self._length = next(iter(lengths.values()))
        self.labels = None if labels is None else _checked_labels(labels, self._length)
        for name, array in self._arrays.items():
            _check_values(array, name)

    def __len__(self) -> int:
        return self._length

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """[n] int64 -> arrays by input name, n rows each."""
        return {name: np.asarray(array[indices]) for name, array in self._arrays.items()}

    def renamed(self, names: Sequence[str]) -> ArrayRows:
        """The same rows under the model's names, in its order."""
        rows = object.__new__(ArrayRows)  # the values were checked when these were made
        arrays = {names[0]: next(iter(self._arrays.values()))} if len(self._arrays) == 1 else self._arrays
        rows._arrays = name_arrays(arrays, names)
        rows.input_names = tuple(rows._arrays)
        rows._length = self._length
        rows.labels = self.labels
        return rows


class _OwnRows:
    """Rows of a class of somebody's own, under the model's names."""

    def __init__(self, rows: Rows, inputs: Sequence[TensorSpec]) -> None:
        if not len(rows):
            raise InputError("the data holds no rows; give at least one")
        self._rows, self._inputs = rows, tuple(inputs)
        self.input_names = tuple(spec.name for spec in inputs)
        self.labels = None if rows.labels is None else _checked_labels(rows.labels, len(rows))
        self.take(np.arange(1))

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """[n] int64 -> arrays by input name, n rows each; refuses whatever the model does not take."""
        given = self._rows.take(indices)
        if isinstance(given, Mapping) and len(given) == len(self.input_names) == 1:
            given = {self.input_names[0]: next(iter(given.values()))}
        try:
            arrays, count = check_batch(given, self._inputs)
        except InputError as error:
            raise InputError(f"{type(self._rows).__name__}.take({_few(indices)}): {error}") from error
        if count != len(indices):
            raise InputError(
                f"{type(self._rows).__name__}.take({_few(indices)}) gives {count} rows; give one for each index"
            )
        return arrays


def _few(indices: np.ndarray) -> str:
    return np.array2string(indices, threshold=6, edgeitems=2, separator=", ")


def open_data(
    spec: str | Path,
    *,
    inputs: Sequence[TensorSpec] | None,
    preprocessing: str | None = None,
    labels: str | None = None,
) -> Rows:
    """D -> rows; with `inputs` None, what depends on the model is left to `fit_rows`.

    `preprocessing` is for folders of images; so is `labels="folders"`, one class per sub-folder, in the order
    of their names.
    """
    text, path = str(spec), Path(spec)
    there = folder_at(path)
    if labels not in (None, "folders"):
        raise UsageError(f"labels is {labels!r}; give 'folders' or leave it out")
    if (preprocessing is not None or labels is not None) and not there:
        raise UsageError(f"{text}: preprocessing and labels from folders are for folders of images; leave them out")
    rows: Rows
    if there:
        rows = open_images(path, preprocessing, UNNAMED, labels)
    elif is_reference(text):
        rows = _from_callable(text)
    elif there is None:
        raise InputError(f"{text}: does not exist; give a .npy, an .npz, a folder of images or package.module:name")
    else:
        rows = _from_file(path, inputs)
    return rows if inputs is None else fit_rows(rows, inputs)


def fit_rows(rows: Rows, inputs: Sequence[TensorSpec]) -> Rows:
    """The rows under the model's input names, their dtype and shape checked on all rows at once.

    Images are checked on the first one: the preprocessing makes the others alike or refuses them. Rows of a class of
    one's own are checked, their values too, whenever some are taken.
    """
    names = [spec.name for spec in inputs]
    if isinstance(rows, ImageRows):
        if len(names) != 1:
            raise InputError(f"the model takes {', '.join(names)}; a folder of images is one input, give an .npz")
        images = rows.renamed(names[0])
        check_arrays(images.take(np.arange(1)), inputs)
        return images
    if not isinstance(rows, ArrayRows):
        return _OwnRows(rows, inputs)
    fitted = rows.renamed(names)
    check_arrays(fitted._arrays, inputs)
    return fitted


def batches(rows: Rows, size: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """(indices [n], arrays by name) over all rows in order, n = `size` but for the last."""
    if size < 1:
        raise UsageError(f"batch size is {size}; give at least 1")
    for start in range(0, len(rows), size):
        indices = np.arange(start, min(start + size, len(rows)))
        yield indices, rows.take(indices)


def _from_file(path: Path, inputs: Sequence[TensorSpec] | None) -> ArrayRows:
    if path.suffix not in (".npy", ".npz"):
        raise InputError(f"{path}: neither .npy nor .npz, nor a folder; save the rows with numpy.save")
    try:
        arrays = _read_arrays(path)
    except Exception as error:  # whatever the parsers raise that numpy reads a file's header with
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: cannot be read as arrays ({reason:.200}); save plain arrays with numpy.save or numpy.savez"
        ) from error
    takes_labels = inputs is not None and LABELS in {spec.name for spec in inputs}
    labels = None if takes_labels or path.suffix == ".npy" else arrays.pop(LABELS, None)
    return _named(path, lambda: ArrayRows(arrays, labels))


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """numpy goes by what a file holds, not by its name. Raises numpy's errors, `ValueError` where they differ."""
    try:
        held = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # an array without rows cannot be mapped
        held = np.load(path, allow_pickle=False)
    single = isinstance(held, np.ndarray)
    if single:
        arrays: dict[str, Any] = {UNNAMED: held}
    else:
        with held:
            arrays = {name: held[name] for name in held.files}
    if single == (path.suffix == ".npz"):
        raise ValueError(f"it is a .{'npy' if single else 'npz'} under another name")
    if strangers := [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]:
        raise ValueError(f"{strangers[0]!r} in it is no array")
    return arrays


def _from_callable(text: str) -> ArrayRows:
    make = load_reference(text)
    if not callable(make):
        raise UsageError(f"{text}: is a {type(make).__name__}; name a callable that yields batches")
    parts: dict[str, list[np.ndarray]] = {}
    labels: list[np.ndarray] = []
    count = 0
    try:
        for batch in make():
            arrays, classes = _split_batch(batch)
            if parts and parts.keys() != arrays.keys():
                raise InputError(f"batch {count} has {', '.join(arrays)}, the first {', '.join(parts)}; yield the same")
            count += 1
            for name, array in arrays.items():
                parts.setdefault(name, []).append(array)
            labels += [] if classes is None else [classes]
        # Ragged batches fail here, with numpy's reason.
        whole = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        known = np.concatenate(labels) if labels else None
    except OfframpError as error:
        raise type(error)(f"{text}: {error}") from error
    except Exception as error:  # a person's own code: anything may come out of it
        raise InputError(f"{text}: failed in batch {count} ({error!r:.200}); correct it") from error
    return _named(text, lambda: ArrayRows(whole, known))


def _split_batch(batch: Any) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    labels: Any = None
    if isinstance(batch, tuple):
        if len(batch) != 2:
            raise InputError(f"a batch is a tuple of {len(batch)}; yield (inputs, labels), or a dict of inputs")
        batch, labels = batch
    if isinstance(batch, Mapping):
        named = dict(batch)
        labels = named.pop(LABELS, labels)
    else:
        named = {UNNAMED: batch}
    arrays = name_arrays(named, list(named))
    classes = None if labels is None else np.asarray(labels)
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if classes is not None:
        counts[LABELS] = len(classes) if classes.ndim else 0
    if len({*counts.values()}) > 1:
        told = ", ".join(f"{count} of {name!r}" for name, count in counts.items())
        raise InputError(f"a batch has rows that do not go together: {told}; yield as many of each")
    return arrays, classes


def _checked_labels(labels: Any, rows: int) -> np.ndarray:
    if not isinstance(labels, np.ndarray):
        raise InputError(f"labels are a {type(labels).__name__}; pass a numpy array of integers")
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"labels are {labels.dtype} of shape {labels.shape}; give one integer for each of the {rows} rows"
        )
    checked: np.ndarray = labels.astype(np.int64)
    return checked


def _check_values(array: np.ndarray, name: str) -> None:
    """In chunks, so that a mapped file larger than memory can be checked."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"input {name!r} is {array.dtype}; give numbers")
    if not array.dtype.isnative or array.dtype.itemsize > 8:
        plain = "float64" if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=").name
        raise InputError(f"input {name!r} is {array.dtype.str}, which models do not take; give .astype({plain!r})")
    step = max(1, _CHUNK_BYTES // max(1, array.nbytes // len(array)))
    for start in range(0, len(array), step):
        check_finite(array[start : start + step], name, start)


def _named(source: str | Path, make: Callable[[], ArrayRows]) -> ArrayRows:
    try:
        return make()
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
