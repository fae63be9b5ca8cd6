"""What stands at a path, where looking may be forbidden; names for what is on its way there."""

from __future__ import annotations

import secrets
from pathlib import Path

from .errors import StorageError


def folder_at(path: Path) -> bool | None:
    """Whether a folder stands there; None: nothing does. Raises `StorageError` where looking is not allowed."""
    try:
        return path.is_dir() if path.exists() else None
    except OSError as error:
        raise StorageError(f"{path}: cannot be looked at ({error.strerror}); check its folder's permissions") from error


def beside(target: Path, ending: str = "tmp") -> Path:
    """A name in the same folder that nobody has, short enough for any file system however long the target's is."""
    return target.with_name(f".offramp-{secrets.token_hex(4)}.{ending}")
