"""Values on disk: what the frozen backbone made of rows that will be asked for again.

Kept values are half precision (bfloat16: the range of float32, so no activation overflows it) in memory-mapped files,
a row after the other. Whatever is read through here is rounded so, kept or not: whether a batch was kept or is computed
anew, its readers get the same numbers.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .stream import Observed, Stream, batches

KEPT = torch.bfloat16


class Kept:
    """Batches of a stream on disk, as many as `budget` bytes hold, under names of the caller's.

    Lives in `folder`. Nothing is kept of values whose size differs from row to row.
    """

    def __init__(self, stream: Stream, folder: Path, budget: int) -> None:
        self.stream, self.folder = stream, folder
        self._left = budget
        self._tables: dict[str, _Table] = {}

    def epoch(self, rows: np.ndarray, epoch: int) -> Iterator[Observed]:
        """The batches of an epoch, shuffled and augmented; of a stream that repeats, every row is computed once."""
        pieces = self.stream.shuffled(rows, epoch)
        if not self.stream.repeats:
            return self._through(f"epoch{epoch}", pieces, lambda: self.stream.augmented(pieces, epoch))
        return self._gathered(np.sort(rows), pieces, epoch)

    def plain(self, name: str, rows: np.ndarray) -> Iterator[Observed]:
        """Rows in order, as they are; `name` stands for these very rows."""
        pieces = list(batches(rows, self.stream.batch))
        return self._through(name, pieces, lambda: self.stream.plain(rows))

    def close(self) -> None:
        """Remove what is kept."""
        self._tables.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _gathered(self, rows: np.ndarray, pieces: Sequence[np.ndarray], epoch: int) -> Iterator[Observed]:
        """Pieces of rows whose values are all kept. They are computed in the rows' own order, so that an epoch is the
        same whichever came first."""
        if not self._is_full("rows"):
            for observed in self.plain("rows", rows):
                observed.values.clear()
                if "rows" not in self._tables:  # no room
                    break
        if not self._is_full("rows"):
            yield from map(_rounded, self.stream.augmented(pieces, epoch))
            return
        for piece in pieces:
            yield self._read("rows", torch.from_numpy(np.searchsorted(rows, piece)))

    def _read(self, name: str, rows: slice | torch.Tensor) -> Observed:
        device = self.stream.device
        target, values = self._tables[name].read(rows)
        return Observed(target.to(device), [value.to(device) for value in values], self.stream.features > 0)

    def _is_full(self, name: str) -> bool:
        return name in self._tables and self._tables[name].full

    def _through(
        self, name: str, pieces: Sequence[np.ndarray], compute: Callable[[], Iterable[Observed]]
    ) -> Iterator[Observed]:
        sizes = [len(piece) for piece in pieces]
        starts = np.cumsum([0, *sizes])
        if self._is_full(name):
            for start, end in itertools.pairwise(starts):
                yield self._read(name, slice(int(start), int(end)))
            return
        self._drop(name)
        for start, observed in zip(starts[:-1], map(_rounded, compute()), strict=True):
            if start == 0:
                self._make_room(name, int(starts[-1]), observed)
            if name in self._tables and not self._tables[name].write(int(start), observed):
                self._drop(name)
            yield observed

    def _make_room(self, name: str, rows: int, like: Observed) -> None:
        """A table for `rows` rows such as these, if the budget holds it."""
        shapes = [tuple(value.shape[1:]) for value in like.values]
        needed = rows * (sum(map(_size, shapes)) * KEPT.itemsize + like.target.shape[1] * like.target.itemsize)
        if needed <= self._left:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._tables[name] = _Table(self.folder / name, rows, shapes, needed)
            except OSError:  # the disk holds less than the budget: what does not fit is computed again, as past it
                for file in self.folder.glob(f"{name}-*"):
                    file.unlink()
                return
            self._left -= needed

    def _drop(self, name: str) -> None:
        table = self._tables.pop(name, None)
        if table is not None:
            self._left += table.bytes
            table.remove()


class _Table:
    """Rows of all values, each candidate's in a memory-mapped file, with the backbone's answers."""

    def __init__(self, path: Path, rows: int, shapes: Sequence[tuple[int, ...]], size: int) -> None:
        self.bytes = size
        self._rows, self._filled, self._shapes = rows, 0, list(shapes)
        self._files = [path.with_name(f"{path.name}-{index}") for index in range(len(shapes))]
        self._parts = [
            _mapped(file, rows * _size(shape)).view(rows, _size(shape))
            for file, shape in zip(self._files, shapes, strict=True)
        ]
        self._targets: list[torch.Tensor] = []

    @property
    def full(self) -> bool:
        return self._filled == self._rows

    def write(self, start: int, observed: Observed) -> bool:
        """Rows from `start` on; False if they are of other shapes. Channels-last values are written as they lie."""
        if [tuple(value.shape[1:]) for value in observed.values] != self._shapes:
            return False
        end = start + len(observed.target)
        for part, value in zip(self._parts, observed.values, strict=True):
            part[start:end] = (value.permute(0, 2, 3, 1) if value.dim() == 4 else value).flatten(1)
        self._targets.append(observed.target.cpu())
        self._filled = end
        if self.full:
            self._targets = [torch.cat(self._targets)]
        return True

    def read(self, rows: slice | torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Targets and values."""
        parts = zip(self._parts, self._shapes, strict=True)
        return self._targets[0][rows], [_shaped(part[rows], shape) for part, shape in parts]

    def remove(self) -> None:
        for file in self._files:
            file.unlink(missing_ok=True)


def _mapped(file: Path, size: int) -> torch.Tensor:
    """A file's bytes as a tensor. All of them are allotted now: a disk found full later would kill the process."""
    with file.open("wb") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size * KEPT.itemsize)
    return torch.from_file(str(file), shared=True, size=size, dtype=KEPT)


def _rounded(observed: Observed) -> Observed:
    values = []
    while observed.values:  # one after the other, so that not all are there twice
        values.append(observed.values.pop(0).to(KEPT).float())
    return replace(observed, values=values)


def _shaped(part: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 3:
        channels, height, width = shape
        return part.view(len(part), height, width, channels).permute(0, 3, 1, 2).float()
    return part.view(len(part), *shape).float()


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape))
