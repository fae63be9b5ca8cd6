"""What a host knows of one stage, and of stages that come and go together. Guarded by the shelf's lock."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..artifact import Artifact
from ..errors import OfframpError
from ..execution import Stage
from .loader import Loaded
from .memory import Sizes
from .policies import Resident, decayed


class Slot:
    """One stage of one version of a model."""

    def __init__(self, index: int, file_bytes: int) -> None:
        self.index = index
        self.stage: Stage | None = None  # None: not in memory
        self.sizes = Sizes(file_bytes)
        self.load_seconds = 0.0  # of the last loading
        self.uses = 0
        self.used = -math.inf  # when it was last taken
        self._rate, self._counted = 0.0, 0  # uses decayed to that many uses of anything

    def use(self, now: float, count: int) -> None:
        """It is taken; `count` is the number of uses of anything so far."""
        self.uses += 1
        self.used = now
        self._rate, self._counted = self.rate(count) + 1, count

    def rate(self, count: int) -> float:
        """Its uses, decayed to now."""
        return decayed(self._rate, count - self._counted)


class Part:
    """Stages of one version that are loaded and evicted together: one, or all of them."""

    def __init__(self, model: str, version: int, artifact: Artifact, depth: int, slots: Sequence[Slot]) -> None:
        """`version` is a number no other version has; `artifact` is what it is loaded from; `depth` 0 goes last."""
        self.model, self.version, self.artifact, self.depth = model, version, artifact, depth
        self.slots = tuple(slots)
        self.loaded = False
        self.takers = 0
        self.leaving = False  # goes as soon as nobody has it; nobody takes it any more
        self.dead = False  # nobody will ask for it again
        self.untried = True  # so it is loaded when there is room to spare
        self.promised = -math.inf  # until then it waits for those it was loaded for
        self.error: OfframpError | None = None  # for the next who asks
        self.refused = -math.inf  # until then it is too large without being measured again

    @property
    def bytes(self) -> int:
        return sum(slot.sizes.bytes for slot in self.slots)

    @property
    def expected(self) -> int:
        return sum(slot.sizes.expected for slot in self.slots)

    @property
    def file_bytes(self) -> int:
        return sum(slot.sizes.file_bytes for slot in self.slots)

    @property
    def least(self) -> int:
        return sum(slot.sizes.least for slot in self.slots)

    @property
    def certain(self) -> bool:
        return all(slot.sizes.certain for slot in self.slots)

    @property
    def title(self) -> str:
        """For messages."""
        first, last = self.slots[0].index, self.slots[-1].index
        return f"{self.model}: " + (f"stage {first}" if first == last else f"the model of {last + 1} stages")

    def resident(self, count: int) -> Resident:
        """What a policy judges it by; `count` is the number of uses of anything so far."""
        return Resident(
            model=self.version,
            depth=self.depth,
            bytes=self.bytes,
            used=max(slot.used for slot in self.slots),
            rate=max(slot.rate(count) for slot in self.slots),
            load_seconds=sum(slot.load_seconds for slot in self.slots),
            taken=self.takers > 0,
        )

    def fill(self, stages: Sequence[Loaded], quiet: bool) -> None:
        """It is in memory."""
        for slot, loaded in zip(self.slots, stages, strict=True):
            slot.stage, slot.load_seconds = loaded.stage, loaded.seconds
            slot.sizes.add(loaded.bytes, quiet)
        self.loaded = True

    def measure_again(self) -> None:
        """Nothing is known of its size any more; not while it is in memory."""
        for slot in self.slots:
            slot.sizes.drop()

    def empty(self) -> list[Stage]:
        """It is not, once the stages given back are let go of."""
        stages = [slot.stage for slot in self.slots if slot.stage is not None]
        for slot in self.slots:
            slot.stage = None
        self.loaded = self.leaving = False
        return stages
