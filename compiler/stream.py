"""The stream: rows go through the frozen backbone once, and whoever learns at a candidate reads its value there.

The papers make a data set of values and answers for every exit first (their medial data set, Eq. 1); here it is
made on the fly, and what fits a stated number of bytes is kept on disk for those who read the same batches again.
Kept values are half precision (bfloat16: the range of float32, so no activation overflows it); whether a batch was
kept or is computed anew, its readers get the same numbers.

Everything random in epoch e is drawn from (seed, e): the order of the rows, the augmentation. So epoch e is the same
for everybody who asks for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from offramp.passes import Backbone, Candidate, probabilities, row_shape
from offramp.passes.taps import tap
from offramp.runtime.data import Rows

from .augment import Augment
from .capture import bind

LAYOUT: torch.memory_format = torch.channels_last  # convolutions on CPU run a quarter faster on it
KEPT = torch.bfloat16


@dataclass(frozen=True, eq=False)
class Observed:
    """One batch as the frozen backbone sees it."""

    target: torch.Tensor  # [B, K] the backbone's probabilities
    values: tuple[torch.Tensor, ...]  # [B, ...] float32, one per candidate


class Stream:
    """Batches of rows with the backbone's answers and the values of some candidates."""

    def __init__(
        self, backbone: Backbone, candidates: Sequence[Candidate], data: Rows, batch: int, augment: Augment, seed: int
    ) -> None:
        self.backbone, self.candidates, self.data = backbone, tuple(candidates), data
        self.batch, self.augment, self.seed = batch, augment, seed
        # A copy: channels-last leaves the backbone's own parameters alone.
        self._taps = copy.deepcopy(tap(backbone, [c.name for c in candidates]))
        lay_out(self._taps, LAYOUT)

    def shuffled(self, rows: np.ndarray, epoch: int) -> list[np.ndarray]:
        """Row indices of the batches of an epoch; a last batch of one row has no batch statistics to norm by."""
        order = np.random.default_rng([self.seed, epoch]).permutation(rows)
        pieces = np.array_split(order, max(1, round(len(order) / self.batch)))
        return [piece for piece in pieces if len(piece) > 1]

    def augmented(self, pieces: Sequence[np.ndarray], epoch: int) -> Iterator[Observed]:
        """The batches of an epoch, augmented."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch + 1_000_003))
        for piece in pieces:
            yield self.observe(self.augment(tensors(self.data, piece), generator))

    def plain(self, rows: np.ndarray) -> Iterator[Observed]:
        """Rows in order, as they are."""
        for piece in batches(rows, self.batch):
            yield self.observe(tensors(self.data, piece))

    def observe(self, batch: Mapping[str, torch.Tensor]) -> Observed:
        """One pass of the frozen backbone."""
        inputs = bind(self.backbone.inputs, batch, self.backbone.name)
        with torch.no_grad():
            scores, *values = self._taps(*(x.to(memory_format=LAYOUT) if x.dim() == 4 else x for x in inputs))
            return Observed(probabilities(scores, self.backbone.scores, 1.0), tuple(values))


class Kept:
    """Batches on disk, as many as `budget` bytes hold, under names of the caller's; the rest is computed again.

    Lives in `folder`, which is the caller's to remove. Nothing is kept for candidates whose size per row varies.
    """

    def __init__(self, stream: Stream, folder: Path, budget: int) -> None:
        self.stream, self.folder = stream, folder
        self._left = budget
        self._files: dict[str, list[_Batch] | None] = {}
        fixed = all(isinstance(size, int) for c in stream.candidates for size in c.shape[1:])
        self._shapes = [row_shape(stream.backbone, c.name) for c in stream.candidates] if fixed else None

    def epoch(self, rows: np.ndarray, epoch: int) -> Iterator[Observed]:
        """The batches of an epoch, shuffled and augmented."""
        pieces = self.stream.shuffled(rows, epoch)
        return self._through(f"epoch{epoch}", pieces, lambda: self.stream.augmented(pieces, epoch))

    def plain(self, name: str, rows: np.ndarray) -> Iterator[Observed]:
        """Rows in order, as they are; `name` stands for these very rows."""
        return self._through(name, list(batches(rows, self.stream.batch)), lambda: self.stream.plain(rows))

    def _through(
        self, name: str, pieces: Sequence[np.ndarray], compute: Callable[[], Iterator[Observed]]
    ) -> Iterator[Observed]:
        if name not in self._files:
            self._files[name] = self._make_room(name, [len(piece) for piece in pieces])
        files = self._files[name]
        if files is None:
            for observed in compute():
                yield Observed(observed.target, tuple(v.to(KEPT).float() for v in observed.values))
        elif all(file.full for file in files):
            for file in files:
                yield file.read()
        else:
            for file, observed in zip(files, compute(), strict=True):
                file.write(observed)
                yield file.read()

    def _make_room(self, name: str, sizes: Sequence[int]) -> list[_Batch] | None:
        """Files for batches of `sizes` rows, or None when they are over the budget."""
        if self._shapes is None:
            return None
        per_row = sum(int(np.prod(shape)) for shape in self._shapes) * KEPT.itemsize + self.stream.backbone.classes * 4
        needed = per_row * sum(sizes)
        if needed > self._left:
            return None
        self._left -= needed
        self.folder.mkdir(parents=True, exist_ok=True)
        classes = self.stream.backbone.classes
        return [
            _Batch(self.folder / f"{name}-{index}", rows, self._shapes, classes) for index, rows in enumerate(sizes)
        ]


class _Batch:
    """One batch in a memory-mapped file."""

    def __init__(self, path: Path, rows: int, shapes: Sequence[tuple[int, ...]], classes: int) -> None:
        self.full = False
        self._path, self._rows, self._shapes = path, rows, shapes
        self._sizes = [rows * int(np.prod(shape)) for shape in shapes]
        self._target = torch.empty(0, classes)

    def write(self, observed: Observed) -> None:
        """Channels-last values are written as they lie in memory and read back so."""
        whole = torch.from_file(str(self._path), shared=True, size=sum(self._sizes), dtype=KEPT)
        for part, value in zip(torch.split(whole, self._sizes), observed.values, strict=True):
            part.copy_(_flat(value))
        self._target = observed.target
        self.full = True

    def read(self) -> Observed:
        whole = torch.from_file(str(self._path), shared=False, size=sum(self._sizes), dtype=KEPT)
        parts = zip(torch.split(whole, self._sizes), self._shapes, strict=True)
        return Observed(self._target, tuple(_shaped(part, self._rows, shape) for part, shape in parts))


def _flat(value: torch.Tensor) -> torch.Tensor:
    return (value.permute(0, 2, 3, 1) if value.dim() == 4 else value).reshape(-1)


def _shaped(part: torch.Tensor, rows: int, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 3:
        channels, height, width = shape
        return part.view(rows, height, width, channels).permute(0, 3, 1, 2).float()
    return part.view(rows, *shape).float()


def tensors(data: Rows, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Rows of the data as tensors by input name."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in data.take(rows).items()}


def batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Row indices in order, in pieces of `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def mix(seed: int, stream: int) -> int:
    """A seed of its own for every stream of random numbers drawn from one seed."""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def lay_out(module: nn.Module, layout: torch.memory_format) -> None:
    """In place: the parameters' memory order."""
    module.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks this documented form
