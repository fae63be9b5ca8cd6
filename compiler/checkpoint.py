"""Checkpoints: what long work leaves behind, so that an interruption costs little."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from offramp.runtime.errors import StorageError, UsageError

from .quiet import quiet

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCK = ".lock"  # in a folder of work

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


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else trains in a folder meanwhile: two would write over each other's values.

    Raises `UsageError` where somebody does, `StorageError` where it cannot be written to; systems and file systems
    without locks are trusted.
    """
    new = not folder.exists()
    make_folder(folder)
    try:
        opened = (folder / _LOCK).open("w")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written to ({_reason(error)}); choose another folder") from error
    with opened as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"{folder}: another compile trains there; wait for it or give another --work"
                ) from error
            except OSError:
                pass  # no locks here
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / _LOCK).unlink()
                if new:
                    folder.rmdir()  # if training left nothing there


def _reason(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(said).splitlines()[0][:200]
