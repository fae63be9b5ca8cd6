"""The stream: rows go through the frozen backbone once, and whoever learns at a candidate reads its value there.

The papers make a data set of values and answers for every exit first (their medial data set, Eq. 1); here it is
made on the fly, and what fits a stated number of bytes is kept on disk for those who read the same batches again
(see `kept`).

Everything random in epoch e is drawn from (seed, e): the order of the rows, the augmentation. So epoch e is the same
for everybody who asks for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from offramp.passes import Backbone, Candidate, last_features, probabilities, row_shape
from offramp.passes.taps import tap
from offramp.runtime.data import Rows
from offramp.runtime.errors import ModelError

from .augment import Augment, apply, identity
from .capture import bind

CPU = "cpu"
FEATURES = 512  # of the backbone's last, that heads are told at most
LAYOUT: torch.memory_format = torch.channels_last  # convolutions on CPU run a quarter faster on it


@dataclass(frozen=True, eq=False)
class Observed:
    """One batch as the frozen backbone sees it.

    Who is done with it says so by `values.clear()`: iterators hold a batch until the next one is made, and two at a
    time would be twice the memory.
    """

    target: torch.Tensor  # [B, K] the backbone's probabilities
    values: list[torch.Tensor]  # [B, ...] float32, one per candidate, and of a stream that hints one more
    hints: bool = False

    @property
    def hint(self) -> torch.Tensor | None:
        """[B, D] the backbone's last features, of a stream that hints."""
        return self.values[-1] if self.hints else None


def _pieces(rows: int, batch: int) -> int:
    return max(1, round(rows / batch))


def largest_batch(rows: np.ndarray, batch: int) -> int:
    """Rows of the largest batch of an epoch: up to half as many again as asked for, where there are few."""
    return -(-len(rows) // _pieces(len(rows), batch))


class Stream:
    """Batches of rows with the backbone's answers, the values of some candidates and, if asked, its last features."""

    def __init__(
        self,
        backbone: Backbone,
        candidates: Sequence[Candidate],
        data: Rows,
        batch: int,
        augment: Augment,
        seed: int,
        device: str = CPU,
        hints: bool = False,
    ) -> None:
        """`device` is where the backbone runs and what is observed lies."""
        self.backbone, self.candidates, self.data = backbone, tuple(candidates), data
        self.batch, self.augment, self.seed, self.device = batch, augment, seed, device
        last, self.features = hinted(backbone) if hints else (None, 0)
        # A copy: channels-last leaves the backbone's own parameters alone.
        self._taps = copy.deepcopy(tap(backbone, [*(c.name for c in candidates), *([last] if last else ())]))
        lay_out(self._taps, LAYOUT)
        self._taps.to(device)

    @property
    def repeats(self) -> bool:
        """Whether every epoch shows the same rows."""
        return self.augment is identity

    def shuffled(self, rows: np.ndarray, epoch: int) -> list[np.ndarray]:
        """Row indices of the batches of an epoch; a last batch of one row has no batch statistics to norm by."""
        order = np.random.default_rng([self.seed, epoch]).permutation(rows)
        pieces = np.array_split(order, _pieces(len(order), self.batch))
        return [piece for piece in pieces if len(piece) > 1]

    def augmented(self, pieces: Sequence[np.ndarray], epoch: int) -> Iterator[Observed]:
        """The batches of an epoch, augmented."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch + 1_000_003))
        for piece in pieces:
            yield self.observe(apply(self.augment, tensors(self.data, piece), generator), piece)

    def plain(self, rows: np.ndarray) -> Iterator[Observed]:
        """Rows in order, as they are."""
        for piece in batches(rows, self.batch):
            yield self.observe(tensors(self.data, piece), piece)

    def observe(self, batch: Mapping[str, torch.Tensor], rows: np.ndarray) -> Observed:
        """One pass of the frozen backbone over `rows` of the data, as `batch` shows them. Raises `ModelError`."""
        inputs = bind(self.backbone.inputs, batch, self.backbone.name)
        laid_out = (x.to(memory_format=LAYOUT) if x.dim() == 4 else x for x in inputs)
        with torch.no_grad():
            scores, *values = self._taps(*(x.to(self.device) for x in laid_out))
            target = probabilities(scores, self.backbone.scores, 1.0)
            check_finite(target, rows, self.backbone.name)
            if self.features:
                values[-1] = hint(values[-1])
            return Observed(target, values, self.features > 0)


def hint(value: torch.Tensor) -> torch.Tensor:
    """[B, D], [B, T, D] or [B, C, H, W] -> means over tokens or the map, [B, D]; of many features some."""
    means = value.mean((2, 3)) if value.dim() == 4 else value.mean(1) if value.dim() == 3 else value
    return means[:, :: -(-means.shape[1] // FEATURES)]


def hinted(backbone: Backbone) -> tuple[str | None, int]:
    """Which value of the backbone hints are made of, and how many features they have; None and 0 where none can be."""
    name = last_features(backbone)
    if name is None:
        return None, 0
    with torch.device("meta"):
        return name, hint(torch.empty(1, *row_shape(backbone, name))).shape[1]


def check_finite(target: torch.Tensor, rows: np.ndarray, name: str) -> None:
    """Raises `ModelError` naming the first of `rows` whose probabilities `target` [B, K] are not all numbers."""
    wrong = (~torch.isfinite(target)).any(1)
    if wrong.any():
        row = int(rows[int(wrong.nonzero()[0])])
        raise ModelError(
            f"{name} gives a score that is not finite for row {row} of the data, as it is or as it was augmented; "
            "check the model on that row, or leave it out"
        )


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
