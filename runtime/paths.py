"""What stands at a path, where looking may be forbidden."""

from __future__ import annotations

from pathlib import Path

from .errors import StorageError


def folder_at(path: Path) -> bool | None:
    """Whether a folder stands there; None: nothing does. Raises `StorageError` where looking is not allowed."""
    try:
        return path.is_dir() if path.exists() else None
    except OSError as error:
        raise StorageError(f"{path}: cannot be looked at ({error.strerror}); check its folder's permissions") from error
