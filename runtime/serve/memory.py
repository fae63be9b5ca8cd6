"""How much memory a stage takes, measured in this process.

The difference of the process's anonymous memory before and after loading, both times after what is free was handed
back to the system. Measured on ResNet-50's stages: without that the differences are three times too large.

What other threads take and give back meanwhile counts too. So a figure taken while nothing was computed is worth more
than any other, and of several the median counts.

Where the system cannot be asked (it is no Linux, or its C library hands nothing back) the size of the model's file
stands in: too little, for ONNX Runtime keeps weights in layouts of its own and the graph beside them. The same for a
stage on a GPU, whose memory is not the process's.
"""

from __future__ import annotations

import functools
from collections import deque
from pathlib import Path
from statistics import median

from ..process import hand_back

_STATUS = Path("/proc/self/status")
_ANONYMOUS = "RssAnon:"
_KEPT = 5  # figures of one stage


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
        """`file_bytes` is what is expected before the first loading."""
        self._file_bytes = file_bytes
        self._quiet: deque[int] = deque(maxlen=_KEPT)
        self._noisy: deque[int] = deque(maxlen=_KEPT)

    def add(self, size: int, quiet: bool) -> None:
        """One loading's bytes; `quiet` where nothing was computed meanwhile."""
        (self._quiet if quiet else self._noisy).append(max(size, 0))

    @property
    def bytes(self) -> int:
        """The median of the quiet figures, else of the noisy ones; 0 before the first."""
        figures = self._quiet or self._noisy
        return int(median(figures)) if figures else 0

    @property
    def expected(self) -> int:
        """`bytes`, or before the first loading the size of the file."""
        return self.bytes if self._quiet or self._noisy else self._file_bytes

    @property
    def certain(self) -> bool:
        """Whether a refusal may be based on it."""
        return bool(self._quiet) or len(self._noisy) == _KEPT
