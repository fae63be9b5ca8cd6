"""Reading a recording back, while a server adds to it or after: rows, the disagreement among them, data to compile.

Refused: a folder without a recording, one that is damaged or of a newer format, a model it holds no rows of.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..commands import write_arrays
from ..errors import StorageError, UsageError
from .record_format import Row, unpack
from .record_store import COLUMNS, FILE, check_kind, explained
from .work import Sample

_SELECT = f"SELECT id, {', '.join(COLUMNS)} FROM rows"


@dataclass(frozen=True, eq=False)
class Recorded:
    """Recorded rows of one model whose inputs share dtypes and shapes, oldest first."""

    inputs: dict[str, np.ndarray]  # by name [N, ...]
    exits: np.ndarray  # [N] int64, at which each was answered
    early: np.ndarray  # [N, K] float32 probabilities it was answered with
    final: np.ndarray  # [N, K] float32 probabilities of the backbone
    digests: tuple[str, ...]  # [N] of the version that answered
    times: np.ndarray  # [N] float64 `time.time()` seconds at which the backbone answered


@dataclass(frozen=True)
class Exported:
    """What `export` wrote."""

    rows: int
    left_out: int  # rows whose inputs have another dtype or shape than most


def read_recording(folder: Path, model: str) -> list[Recorded]:
    """All rows of a model: one group for each combination of dtypes and shapes of a row, largest first.

    Every row is checked against its checksum. Raises `UsageError` where the folder holds no recording or no row of
    the model, `StorageError` where it is damaged.
    """
    groups: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in _samples(folder, model):
        kind = tuple((name, array.dtype.str, array.shape) for name, array in sample.inputs.items())
        groups.setdefault((kind, len(sample.early), len(sample.final)), []).append(sample)
    if not groups:
        raise UsageError(f"{folder}: holds no row of model {model!r}; it holds {', '.join(models(folder)) or 'none'}")
    return sorted(map(_together, groups.values()), key=lambda group: -len(group.exits))


def export(folder: Path, model: str, out: Path) -> Exported:
    """Write recorded inputs as an .npz that `offramp compile --data` reads, whole or not at all.

    Where inputs differ in dtype or shape, as texts of different lengths do, the largest group is written. Raises as
    `read_recording`, and `StorageError` where `out` cannot be written.
    """
    first, *others = read_recording(folder, model)
    write_arrays(out, first.inputs)
    return Exported(len(first.exits), sum(len(group.exits) for group in others))


def live_disagreement(folder: Path, model: str, digest: str) -> tuple[int, int]:
    """Recorded rows that this version of a model answered, and how many of them otherwise than by its backbone."""
    with _opened(folder) as database:
        where = "WHERE model = ? AND digest = ?"
        told = database.execute(f"SELECT count(*), total(disagrees) FROM rows {where}", (model, digest)).fetchone()
    return int(told[0]), int(told[1])


def models(folder: Path) -> list[str]:
    """The models it holds rows of."""
    with _opened(folder) as database:
        return [name for (name,) in database.execute("SELECT DISTINCT model FROM rows ORDER BY model")]


def check_recording(folder: Path) -> int:
    """Check the store's structure and every row's checksum -> the number of rows. Raises `StorageError`."""
    with _opened(folder) as database:
        verdict = [line for (line,) in database.execute("PRAGMA integrity_check")]
    if verdict != ["ok"]:
        raise StorageError(f"{folder / FILE}: is damaged ({verdict[0]}); delete it or choose another folder")
    return sum(1 for _ in _samples(folder, None))


def _samples(folder: Path, model: str | None) -> Iterator[Sample]:
    """Checked samples of one model, or of all, oldest first."""
    where, given = ("", ()) if model is None else (" WHERE model = ?", (model,))
    with _opened(folder) as database:
        for number, *columns in database.execute(f"{_SELECT}{where} ORDER BY id", given):
            yield unpack(Row(*columns), f"{folder / FILE}, row {number}")


def _together(samples: list[Sample]) -> Recorded:
    return Recorded(
        {name: np.stack([sample.inputs[name] for sample in samples]) for name in samples[0].inputs},
        np.array([sample.exit for sample in samples], np.int64),
        np.stack([sample.early for sample in samples]),
        np.stack([sample.final for sample in samples]),
        tuple(sample.digest for sample in samples),
        np.array([sample.time for sample in samples], np.float64),
    )


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[sqlite3.Connection]:
    """The store, to be read only."""
    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"{folder}: holds no recording; give the folder that the server records to")
    with explained(path), contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as found:
        if not check_kind(found, path):
            raise UsageError(f"{folder}: nothing has been recorded here yet; give another folder")
        yield found
