"""Checkpoints: what long work leaves behind, so that an interruption costs little."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from offramp.runtime.errors import StorageError

from .quiet import quiet

# What torch.load raises for bytes that no torch.save wrote.
_UNREADABLE = (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError, pickle.PickleError)


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all. Raises `StorageError`."""
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(state, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as the latter
        raise StorageError(f"{path}: heads in training could not be kept ({_reason(error)}); free space") from error
    finally:
        partial.unlink(missing_ok=True)


def load_state(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The checkpoint at `path` if it is one and of this very job; an unreadable one only costs time."""
    if not path.is_file():
        return None
    try:
        with quiet():
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE:
        return None
    return state if isinstance(state, dict) and state.get("fingerprint") == fingerprint else None


def make_folder(folder: Path) -> None:
    """Before training rather than after an epoch of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made ({_reason(error)}); choose another output") from error


def _reason(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(said).splitlines()[0][:200]
