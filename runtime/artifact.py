"""The artifact on disk: written whole or not at all, and opened only when every byte is as it was written.

An artifact is a directory, or the same zipped, that holds `manifest.json` and the files it lists.
`write_artifact` builds it in a temporary sibling and moves that into place, so a reader sees the old artifact
or the new one; where the system cannot exchange two names, for a moment none. `open_artifact` checks the manifest, then
presence, size and SHA-256 of every listed file; `Artifact.read` checks again what it returns, so what was hashed is
what gets executed. `keep_open` lets a server read a version on after another has taken its place.

Refused when opening: a manifest that `parse_manifest` refuses, a listed file that is missing, truncated,
altered, a symbolic link or not a regular file, a damaged or encrypted archive. Nothing reads or decompresses
more than the size the manifest lists. Refused when writing: an output that exists and is not an artifact, or
that holds a file no artifact put there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

from .engine import ModelBytes
from .errors import ArtifactError, StorageError, UsageError
from .manifest import MANIFEST_NAME, FileSpec, Manifest, dump_manifest, parse_manifest
from .paths import beside, folder_at
from .renaming import exchange

EXTERNAL = ".data"  # behind a model's name: the file of weights too large for the model's own
_MANIFEST_LIMIT = 64 << 20  # a manifest is kilobytes; this bounds what a hostile archive makes us hold
_CHUNK = 1 << 20
F = TypeVar("F")
_ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError)
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class Artifact:
    """An artifact whose files were all found as the manifest lists them."""

    path: Path
    manifest: Manifest
    kept: Kept | _Archive | None = None  # read from there, whatever stands at the path; None: from the path

    def read(self, name: str) -> bytes:
        """The bytes of one listed file, checked against the manifest in this very reading."""
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """The same in pieces. Exhaust it before using any: the verdict comes after the last one."""
        spec = self.manifest.all_files().get(name)
        if spec is None:
            raise ArtifactError(f"{self.path}: the manifest lists no file {name!r}; use one of its files")
        with _container(self.path) if self.kept is None else _explained(self.path, self.kept) as files:
            yield from _checked(files, name, spec, self.path)

    def model(self, name: str) -> ModelBytes:
        """One ONNX file, and the weights beside it where it has any, checked like every reading."""
        beside = name + EXTERNAL
        here = beside in self.manifest.all_files()
        weights = {beside.rpartition("/")[2]: functools.partial(self.chunks, beside)} if here else {}
        return ModelBytes(self.read(name), weights)


def file_spec(data: bytes) -> FileSpec:
    """What the manifest says of a file with these bytes."""
    return FileSpec(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Check an artifact, directory or zip, from its manifest to its last byte."""
    where = Path(path)
    with _container(where) as container:
        manifest = parse_manifest(container.manifest(), f"{where}/{MANIFEST_NAME}")
        for name, spec in manifest.all_files().items():
            for _ in _checked(container, name, spec, where):
                pass
    return Artifact(where, manifest)


def keep_open(artifact: Artifact) -> Artifact:
    """The same with its files held open until `Artifact.kept` is closed, so that it can be read once it was replaced.

    On systems that cannot read at a position, directories are read from their path as before. Raises as `open_artifact`
    where a file is gone.
    """
    with _explained(artifact.path, _found(artifact.path)) as container:
        if isinstance(container, _Archive):
            return replace(artifact, kept=container)
        if hasattr(os, "pread"):
            return replace(artifact, kept=Kept(container, artifact.manifest.all_files()))
    return artifact


def write_artifact(out: str | os.PathLike[str], manifest: Manifest, files: Mapping[str, bytes]) -> None:
    """Write a directory artifact at `out`, replacing an artifact that stands there once all is written.

    On Linux the old and the new one change places at once. Elsewhere, and on file systems that cannot, the old one is
    moved aside first: killed between the two, this process leaves it beside `out`, as `.offramp-*.old`.
    """
    if {name: file_spec(data) for name, data in files.items()} != manifest.all_files():
        raise ValueError("the manifest's files are not the files given")
    target = Path(os.path.realpath(out))
    if not target.name:
        raise UsageError(f"{out}: has no name that an artifact could take; choose a folder in it")
    draft, retired = beside(target), beside(target, "old")
    try:
        check_output(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_files(draft, {**files, MANIFEST_NAME: dump_manifest(manifest)})
        _put_in_place(draft, target, retired)
    except OSError as error:
        raise StorageError(
            f"{out}: could not be written ({error.strerror or error}); "
            "free space or choose another output; what stood there is untouched"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)


def _put_in_place(draft: Path, target: Path, retired: Path) -> None:
    """Give the draft its name; what had it is called `draft` or `retired` now."""
    replacing = target.exists()
    if replacing and exchange(draft, target):
        return
    if replacing:
        target.rename(retired)
    try:
        draft.rename(target)
    except BaseException:  # an interruption too must not leave the old artifact under its hidden name
        if replacing:
            retired.rename(target)
        raise


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def check_output(target: Path) -> None:
    """Refuse to replace what no artifact put there: a mistyped `-o` must not cost a person's files.

    Only the names are taken from the old manifest, however old or damaged it is.
    """
    folder = folder_at(target)
    if folder is None:
        return
    if not folder:
        raise UsageError(f"{target}: exists and is not an artifact directory; choose another output or remove it")
    present = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_symlink() or not p.is_dir()}
    if not present:
        return
    strangers = sorted(present - _listed_names(target / MANIFEST_NAME))
    if strangers:
        raise UsageError(f"{target}: holds {strangers[0]!r}, which no artifact put there; remove it or choose another")


def _listed_names(path: Path) -> set[str]:
    try:
        body = json.loads(path.read_bytes())
        return {MANIFEST_NAME, *body["files"], *body["measured"]["files"]}
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return set()


class _Directory:
    def __init__(self, root: Path) -> None:
        self.root = root

    def manifest(self) -> bytes:
        path = self.root / MANIFEST_NAME
        if not path.exists():
            raise ArtifactError(f"{self.root}: not an artifact (no {MANIFEST_NAME}); give what compile wrote")
        _check_regular(path, path.stat())
        return _bounded(path.open("rb"), path)

    def size(self, name: str) -> int | None:
        path = self.root
        for part in name.split("/"):
            path /= part
            if path.is_symlink():
                raise ArtifactError(f"{path}: is a symbolic link; copy the artifact again with the files themselves")
        if not path.exists():
            return None
        entry = path.lstat()
        _check_regular(path, entry)
        return entry.st_size

    def open(self, name: str) -> IO[bytes]:
        return (self.root / name).open("rb")


def _check_regular(path: Path, entry: os.stat_result) -> None:
    """Opening a pipe would wait for ever."""
    if not stat.S_ISREG(entry.st_mode):
        raise ArtifactError(f"{path}: is not a regular file; copy the artifact again")


class Kept:
    """The open files of a directory. They outlive their names."""

    def __init__(self, directory: _Directory, names: Iterable[str]) -> None:
        self._files: dict[str, IO[bytes]] = {}
        try:
            for name in names:
                self._files[name] = directory.open(name)
        except OSError:
            self.close()
            raise

    def size(self, name: str) -> int | None:
        return os.fstat(self._files[name].fileno()).st_size

    def open(self, name: str) -> contextlib.nullcontext[_Positioned]:
        return contextlib.nullcontext(_Positioned(self._files[name].fileno()))

    def close(self) -> None:
        """Let go of the files; what reads them at this moment fails."""
        for file in self._files.values():
            file.close()


class _Positioned:
    """One reader of an open file, with a position of its own: several threads may read it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._at = descriptor, 0

    def read(self, size: int) -> bytes:
        data = os.pread(self._descriptor, size, self._at)
        self._at += len(data)
        return data


class _Archive:
    """A zip, open until `close`. It outlives its name, and several threads may read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.archive = zipfile.ZipFile(path)
        try:
            self.root = self._root()
        except BaseException:
            self.close()
            raise

    def _root(self) -> str:
        archive, path = self.archive, self.path
        names = [n for n in archive.namelist() if n.split("/")[-1] == MANIFEST_NAME and n.count("/") <= 1]
        roots = [n.removesuffix(MANIFEST_NAME) for n in sorted(names, key=len)]
        if not roots or (roots[0] and len(roots) > 1):
            found = f"{len(roots)} folders with a {MANIFEST_NAME}" if roots else f"no {MANIFEST_NAME}"
            raise ArtifactError(f"{path}: not an artifact ({found}); zip the directory that compile wrote")
        return roots[0]

    def manifest(self) -> bytes:
        return _bounded(self.open(MANIFEST_NAME), self.path / MANIFEST_NAME)

    def size(self, name: str) -> int | None:
        try:
            return self.archive.getinfo(self.root + name).file_size
        except KeyError:
            return None

    def open(self, name: str) -> IO[bytes]:
        entry = self.archive.getinfo(self.root + name)
        if entry.compress_type not in _COMPRESSIONS:  # other methods have errors of their own
            raise zipfile.BadZipFile(f"{entry.filename} is not deflated")
        return self.archive.open(entry)

    def close(self) -> None:
        """Let go of the archive; what is being read at this moment is read to its end."""
        self.archive.close()


def _found(path: Path) -> _Directory | _Archive:
    """What stands at the path; an archive is to be closed."""
    with _explained(path, None):
        if path.is_dir():
            return _Directory(path)
        if not path.exists():
            raise ArtifactError(f"{path}: does not exist; give the directory or zip that compile wrote")
        _check_regular(path, path.stat())
        if not zipfile.is_zipfile(path):
            raise ArtifactError(f"{path}: neither a directory nor a zip archive; give what compile wrote")
        return _Archive(path)


@contextlib.contextmanager
def _container(path: Path) -> Iterator[_Directory | _Archive]:
    with _explained(path, _found(path)) as container:
        try:
            yield container
        finally:
            if isinstance(container, _Archive):
                container.close()


@contextlib.contextmanager
def _explained(path: Path, files: F) -> Iterator[F]:
    """The files of an artifact; what reading them raises is told as an `ArtifactError`."""
    try:
        yield files
    except _ARCHIVE_ERRORS as error:
        raise ArtifactError(f"{path}: damaged archive ({error}); copy the artifact again") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}); check it and its rights") from error
    except ValueError as error:  # Python's and zipfile's word for a file that was closed
        raise ArtifactError(f"{path}: let go of while it was read ({error}); open the artifact again") from error


def _bounded(file: IO[bytes], path: Path) -> bytes:
    with file:
        data = file.read(_MANIFEST_LIMIT + 1)
    if len(data) > _MANIFEST_LIMIT:
        raise ArtifactError(f"{path}: larger than any manifest ({_MANIFEST_LIMIT} bytes); copy the artifact again")
    return data


def _checked(container: _Directory | _Archive | Kept, name: str, spec: FileSpec, where: Path) -> Iterator[bytes]:
    """The file in chunks; the last one is followed by the verdict, so exhaust this before using any."""
    size = container.size(name)
    if size is None:
        raise ArtifactError(f"{where}/{name}: missing; copy the artifact again")
    if size != spec.size:
        kind = "truncated" if size < spec.size else "too long"
        raise ArtifactError(f"{where}/{name}: {kind}, {size} bytes instead of {spec.size}; copy the artifact again")
    digest: Any = hashlib.sha256()
    left = spec.size
    with container.open(name) as file:
        while left > 0 and (chunk := file.read(min(left, _CHUNK))):
            left -= len(chunk)
            digest.update(chunk)
            yield chunk
    if digest.hexdigest() != spec.sha256:
        raise ArtifactError(f"{where}/{name}: altered since it was written (SHA-256 differs); copy the artifact again")
