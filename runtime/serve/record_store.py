"""The store of watched rows: one SQLite file in a folder, never larger than it may be, whole whenever it is killed.

Rows are added in small transactions to a write-ahead log. `synchronous` is NORMAL: a process killed at any moment loses
nothing that was committed, for the system holds it; when the power fails the last transactions may be gone and none is
half there. FULL would wait for the disk at each of them, to save a few rows of a sample.

The bound is kept by pages. A quarter of it is the log's, 64 MiB at most: SQLite copies the log into the file when it
has grown to half of that, and a transaction fills at most a quarter of it. The rest is the file's: before rows are
added, the oldest go until the pages in use and those needed fit, and SQLite fills freed pages first. A reader that
stays in the middle of the store keeps the log from being copied; while it is over its share nothing is added.

Refused: a folder that cannot be written, a file there that is no store, a store of a newer format.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from ..errors import StorageError, UsageError
from .record_format import Row

FILE = "rows.sqlite"
SCHEMA = 1
SMALLEST = 1 << 20  # bytes a store may be limited to
_APPLICATION = 0x4F666672  # says in the file's header whose it is
_PAGE = 4096
_LOG_BYTES = 64 << 20  # at most: a longer log saves nothing
_INDEX_BYTES = 64 << 10  # of the log's index, a file beside it, and 8 for every page of the log
_BUSY_SECONDS = 5.0  # to wait for another process that writes
COLUMNS = tuple(field.name for field in fields(Row))
_INSERT = f"INSERT INTO rows ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
_CREATE = """CREATE TABLE rows (
    id INTEGER PRIMARY KEY, model TEXT NOT NULL, digest TEXT NOT NULL, exit INTEGER NOT NULL,
    disagrees INTEGER NOT NULL, time REAL NOT NULL, checksum BLOB NOT NULL,
    early BLOB NOT NULL, final BLOB NOT NULL, inputs BLOB NOT NULL)"""


class Store:
    """Adds rows; one thread at a time."""

    def __init__(self, folder: Path, limit: int) -> None:
        """`limit` bytes for all files together. A larger store that stands there is cut down to it, oldest rows first.

        Raises `UsageError` for a limit below `SMALLEST` and for a file that is no store or a newer one, `StorageError`
        for one that cannot be written.
        """
        if limit < SMALLEST:
            raise UsageError(f"a recording may take {limit} bytes; give at least {SMALLEST}")
        self._path = folder / FILE
        self._log = folder / f"{FILE}-wal"
        self._log_bytes = min(limit // 4, _LOG_BYTES)
        beside = self._log_bytes + self._log_bytes // _PAGE * 8 + _INDEX_BYTES
        self._pages = (limit - beside) // _PAGE
        self.transaction_bytes = self._log_bytes // 4  # of rows to be added at once; no row may be larger
        _make_file(self._path)
        with explained(self._path):
            self._database = sqlite3.connect(
                self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            with explained(self._path):
                self._open()
        except BaseException:
            self._database.close()
            raise

    def add(self, rows: Sequence[Row]) -> bool:
        """Add rows, of `transaction_bytes` at most, all or none; False where a reader keeps the log over its share.

        Raises `sqlite3.Error` where they cannot be written, a full disk for one; the store is as it was.
        """
        if self._log_size() > self._log_bytes // 2:
            self._checkpoint()
            if self._log_size() > self._log_bytes // 2:
                return False
        with self._transaction():
            self._make_room(pages_of([row.size for row in rows]), len(rows))
            self._database.executemany(_INSERT, map(astuple, rows))
        return True

    def close(self) -> None:
        """Copy the log into the file, and let go of it."""
        self._database.close()

    def _open(self) -> None:
        begun = check_kind(self._database, self._path)
        if not begun:
            # Both must stand before the first page does.
            self._database.execute(f"PRAGMA page_size = {_PAGE}")
            self._database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        if self._database.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise StorageError(f"{self._path}: its file system lacks shared memory; choose a folder on a local disk")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute(f"PRAGMA wal_autocheckpoint = {self._log_bytes // 2 // _PAGE}")
        self._database.execute(f"PRAGMA journal_size_limit = {self._log_bytes // 2}")
        with self._transaction():
            # Again: another process may have begun it since.
            if not check_kind(self._database, self._path):
                self._database.execute(_CREATE)
            # Written even where it says so already, to learn now whether the file can be.
            self._database.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._database.execute(f"PRAGMA user_version = {SCHEMA}")
        self._shrink()

    def _shrink(self) -> None:
        """Cut a store that was allowed more down to size, in steps the log has room for."""
        while self._number("page_count") > self._pages:
            with self._transaction():
                self._make_room(0, 1)
            step = self.transaction_bytes // _PAGE
            self._database.execute(f"PRAGMA incremental_vacuum({step})").fetchall()
            if self._log_size() > self._log_bytes // 2:
                self._checkpoint()
        self._checkpoint()

    def _make_room(self, pages: int, step: int) -> None:
        """Delete the oldest rows, `step` at a time, until so many pages more fit."""
        oldest = "DELETE FROM rows WHERE id IN (SELECT id FROM rows ORDER BY id LIMIT ?)"
        while self._number("page_count") - self._number("freelist_count") + pages > self._pages:
            if not self._database.execute(oldest, (step,)).rowcount:
                return

    def _number(self, pragma: str) -> int:
        return int(self._database.execute(f"PRAGMA {pragma}").fetchone()[0])

    def _log_size(self) -> int:
        try:
            return self._log.stat().st_size
        except FileNotFoundError:
            return 0

    def _checkpoint(self) -> None:
        """Copy the log into the file and empty it, as far as readers let it; it waits for none of them."""
        self._database.execute("PRAGMA busy_timeout = 0")
        try:
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            self._database.execute(f"PRAGMA busy_timeout = {int(_BUSY_SECONDS * 1e3)}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:  # some errors have ended it already
                self._database.execute("ROLLBACK")
            raise


def pages_of(sizes: Sequence[int]) -> int:
    """At most so many pages are needed for rows of so many bytes, see "B-tree Pages" in SQLite's file format."""
    # What does not fit beside its neighbours goes to pages of its own; what does may leave a page half full. The rest
    # is for inner pages and for those that say where the others lie.
    whole = [(size + 64) / (_PAGE - 4) + min(1, 2 * (size + 64) / _PAGE) for size in sizes]
    return math.ceil(sum(whole)) + len(whole) // 64 + sum(sizes) // (_PAGE << 9) + 4


def check_kind(database: sqlite3.Connection, path: Path) -> bool:
    """Whether a store stands here; False for an empty file. Raises `UsageError` for anything else."""
    owner, version = (_header(database, name) for name in ("application_id", "user_version"))
    if owner == _APPLICATION and version > SCHEMA:
        raise UsageError(
            f"{path}: recorded in format {version}, newer than this offramp knows ({SCHEMA}); "
            "upgrade offramp or choose another folder"
        )
    if owner == _APPLICATION and version == SCHEMA:
        return True
    if owner or version or database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise UsageError(f"{path}: is no recording of offramp's; choose another folder")
    return False


def _header(database: sqlite3.Connection, name: str) -> int:
    return int(database.execute(f"PRAGMA {name}").fetchone()[0])


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """What SQLite says of a file, as an error of ours."""
    try:
        yield
    except sqlite3.Error as error:
        code = code_of(error)
        if code == sqlite3.SQLITE_NOTADB:
            raise UsageError(f"{path}: is no recording of offramp's; choose another folder") from error
        if code == sqlite3.SQLITE_CORRUPT:
            raise StorageError(f"{path}: is damaged ({error}); delete it or choose another folder") from error
        raise StorageError(
            f"{path}: the recording cannot be opened ({error}); check the folder and its rights, or choose another"
        ) from error


def code_of(error: Exception) -> int | None:
    """SQLite's primary result code, of which its extended ones hold more above the last byte."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _make_file(path: Path) -> None:
    """An empty file where none stands, readable by its owner alone, for it will hold what people sent."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({error.strerror or error}); check the folder's rights or choose another"
        ) from error
