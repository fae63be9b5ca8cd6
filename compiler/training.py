"""How heads are trained: what a person may choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offramp.passes import Backbone, Candidate
from offramp.runtime.data import Rows
from offramp.runtime.errors import UsageError

from .augment import Augment, find_augmentation
from .stream import CPU, Stream


@dataclass(frozen=True)
class Training:
    """How heads are trained."""

    epochs: int = 30
    patience: int | None = None  # epochs without a lower loss after which a head stops; None: a third of all
    batch: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    soften: float = 1.0  # temperature of targets and answers in the loss (Hinton et al. 2015)
    hint: float = 3.0  # weight of the error in telling the backbone's last features (Romero et al. 2015); 0: none
    augment: str | Augment | None = None  # a name from AUGMENTATIONS or a function; None: by the kind of input
    device: str = CPU  # to train on, whatever is served on
    kept_bytes: int = 2 << 30  # of the backbone's values on disk, for rows that are read again

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise UsageError(f"{self.epochs} epochs of batches of {self.batch}: give 1 epoch and batches of 2 or more")
        if self.patience is not None and self.patience < 1:
            raise UsageError(f"a patience of {self.patience} epochs; give 1 or more, or None for a third of all")
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise UsageError(
                f"learning rate {self.learning_rate}, weight decay {self.weight_decay}: "
                "give a positive rate and a decay of 0 or more"
            )
        if not 1 <= self.soften < math.inf:
            raise UsageError(f"targets softened by {self.soften}; give a temperature of 1, for none, or more")
        if not 0 <= self.hint < math.inf:
            raise UsageError(f"hints of weight {self.hint}; give 0, for none, or more")
        if self.kept_bytes < 0:
            raise UsageError(f"{self.kept_bytes} bytes of kept values; give 0 or more")
        check_device(self.device)
        if isinstance(self.augment, str):
            find_augmentation(self.augment, ())
        elif self.augment is not None and not callable(self.augment):
            raise UsageError(f"augmentation {self.augment!r:.80} is neither a name nor a function; give one of them")

    def stream(self, backbone: Backbone, candidates: Sequence[Candidate], data: Rows, seed: int) -> Stream:
        """What heads of these candidates learn from: rows augmented, with hints unless they weigh nothing."""
        _, augment = find_augmentation(self.augment, backbone.inputs)
        return Stream(backbone, candidates, data, self.batch, augment, seed, self.device, self.hint > 0)

    @property
    def waits(self) -> int:
        """Epochs without a lower loss after which a head stops."""
        return -(-self.epochs // 3) if self.patience is None else self.patience


def check_device(name: str) -> None:
    """Raises `UsageError` for a device torch does not know, or does not find here."""
    try:
        if torch.empty(1, device=name).is_meta:
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:  # what torch raises of a missing build or driver
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here ({reason:.120}); train on {CPU!r}") from error
