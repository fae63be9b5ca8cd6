"""What a recording refuses, in one line each, and leaves as it was."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from recording_help import record_all, recording, sample

from offramp.runtime import OfframpError, StorageError, UsageError
from offramp.runtime.serve.record_reading import (
    check_recording,
    live_disagreement,
    read_recording,
)
from offramp.runtime.serve.record_store import FILE, SMALLEST, Store


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs (x)")
    database.close()


def newer(path: Path) -> None:
    Store(path.parent, SMALLEST).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 2")
    database.close()


def damaged(path: Path) -> None:
    Store(path.parent, SMALLEST).close()
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([0xFF]) * (len(data) - 100))


WRONG = {
    "no store": (lambda path: path.write_text("my notes, not a recording" * 50), UsageError, "is no recording"),
    "another's": (foreign, UsageError, "is no recording"),
    "newer": (newer, UsageError, "recorded in format 2, newer than this offramp knows"),
    "damaged": (damaged, StorageError, "is damaged"),
    "a folder": (lambda path: path.mkdir(), StorageError, "cannot be written"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_stands_there_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    make, error, words = WRONG[kind]
    path = tmp_path / FILE
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(error, match=words) as caught:
        recording(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert before == (path.read_bytes() if path.is_file() else None)


def test_folders_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/offramp")):
        with pytest.raises(StorageError, match="cannot be written"):
            recording(folder)


def test_arguments_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    for wrong in ({"rate": 1.5}, {"rate": -0.1}, {"rate": float("nan")}, {"queue": 0}, {"seed": -1}, {"limit": 4096}):
        with pytest.raises(UsageError, match="give"):
            recording(tmp_path / "new", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_reading_what_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / FILE).touch()
    for folder in (tmp_path, tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(OfframpError, match=r"another folder|give the folder"):
            read_recording(folder, "tiny")
    (tmp_path / FILE).write_text("my notes" * 100)
    with pytest.raises(UsageError, match="is no recording"):
        live_disagreement(tmp_path, "tiny", "d0")


def test_a_row_altered_on_disk_is_named(tmp_path: Path) -> None:
    kept = recording(tmp_path)
    record_all(kept, [sample(n) for n in range(3)])
    kept.close()
    with sqlite3.connect(tmp_path / FILE) as database:
        database.execute("UPDATE rows SET exit = 9 WHERE id = 2")
    database.close()
    with pytest.raises(StorageError, match="row 2: altered"):
        check_recording(tmp_path)
