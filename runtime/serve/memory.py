"""How much memory a stage takes, measured in this process.

The difference of the process's anonymous memory before and after loading, both times after what is free was handed
back to the system. Measured on ResNet-50's stages: without that the differences are three times too large.

What other threads take and give back meanwhile counts too: a request's body is parsed, say. So no stage is believed to
take less than the bytes of its file, a figure taken while nothing was computed is worth more than any other, of several
the median counts, and a stage is refused only where several loadings all took too much.

Where the system cannot be asked (it is no Linux, or its C library hands nothing back) the size of the model's file
stands in: too little, for ONNX Runtime keeps weights in layouts of its own and the graph beside them. The same for a
stage on a GPU, whose memory is not the process's.
"""

from __future__ import annotations

import functools
from collections import deque
from pathlib import Path
from statistics import median_low

from ..process import hand_back

_STATUS = Path("/proc/self/status")
_ANONYMOUS = "RssAnon:"
_KEPT = 5  # figures of one stage, of either kind
_ENOUGH = 3  # figures; one that others spoilt does not matter among so many


@functools.cache
def measurable() -> bool:
    """Whether this system tells; else sizes are those of files."""
    return hand_back() and _anonymous() is not None


def in_use() -> int:
    """Bytes of anonymous memory this process takes, after what is free was handed back; 0 where none can be told."""
    hand_back()
    return _anonymous() or 0


def _anonymous() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(_ANONYMOUS)), None)


class Sizes:
    """What the loadings of one stage were measured to take."""

    def __init__(self, file_bytes: int) -> None:
        """`file_bytes`, of the stage's file and the weights beside it, are expected before the first loading, and are
        the least that any is believed to take.
        """
        self.file_bytes = file_bytes
        self._quiet: deque[int] = deque(maxlen=_KEPT)
        self._noisy: deque[int] = deque(maxlen=_KEPT)

    def add(self, size: int, quiet: bool) -> None:
        """One loading's bytes; `quiet` where nothing was computed meanwhile."""
        # Less than the file: others gave memory back meanwhile, or the weights are mapped, which is not measured.
        whole = size >= self.file_bytes
        (self._quiet if quiet and whole else self._noisy).append(max(size, self.file_bytes))

    def drop(self) -> None:
        """Forget the figures: the next loading is measured as if it were the first."""
        self._quiet.clear()
        self._noisy.clear()

    @property
    def bytes(self) -> int:
        """The median of the quiet figures where there are enough, else of all; 0 before the first."""
        figures = self._quiet if len(self._quiet) >= _ENOUGH else self._all()
        return median_low(figures) if figures else 0

    @property
    def expected(self) -> int:
        """`bytes`, or before the first loading the size of the file."""
        return self.bytes or self.file_bytes

    @property
    def least(self) -> int:
        """The least of all figures, or before the first loading the size of the file."""
        return min(self._all(), default=self.file_bytes)

    @property
    def certain(self) -> bool:
        """Whether a refusal may be based on `least`."""
        return len(self._all()) >= _ENOUGH

    def _all(self) -> list[int]:
        return [*self._quiet, *self._noisy]
