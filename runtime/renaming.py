"""Two names in one folder that change places at once, where the system can."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from pathlib import Path
from typing import Any

_HERE = -100  # AT_FDCWD: paths are relative to the working directory
_EXCHANGE = 2  # RENAME_EXCHANGE
# The kernel is too old, the file system cannot (one of layers not for every folder), or a sandbox forbids it.
_UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM)


def exchange(one: Path, other: Path) -> bool:
    """What stands at each of two paths stands at the other one now; False, and nothing done, where that cannot be had.

    No moment lies between in which nothing stands at either. Raises `OSError` where the system can and fails.
    """
    rename = _rename()
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@functools.cache
def _rename() -> Any:
    """`renameat2` of the C library: glibc from 2.28, musl from 1.2.5."""
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
