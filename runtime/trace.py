"""What the compiler's passes did, as text: `passes.zip` in an artifact, and a folder a person can read.

`passes.zip` holds `passes.json`, a list of `{"name", "modified", "nodes"}` in the order things happened, and per
entry the graph afterwards as `<nn>-<name>.txt`. The first entry is the graph as it was captured. The folder that
`write_passes` makes holds the same texts and, from the second on, what changed: `<nn>-<name>.diff`.

Refused: an artifact without the file, an archive that holds anything else or more than `LIMIT` bytes, a folder
that exists and is not empty.
"""

from __future__ import annotations

import difflib
import io
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .artifact import Artifact
from .errors import ArtifactError, StorageError, UsageError
from .paths import beside, folder_at

PASSES_FILE = "passes.zip"
LIMIT = 256 << 20  # bytes of text; a large model's passes take a few megabytes
_INDEX = "passes.json"
_NAME = re.compile(r"[A-Za-z0-9_]+")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same texts, the same bytes


@dataclass(frozen=True)
class PassRecord:
    """The graph after one pass."""

    name: str
    modified: bool
    nodes: int
    text: str


def dump_passes(records: Sequence[PassRecord]) -> bytes:
    """The bytes of `passes.zip`; the same records give the same bytes."""
    index = [{"name": r.name, "modified": r.modified, "nodes": r.nodes} for r in records]
    texts = {_INDEX: json.dumps(index, indent=2) + "\n"}
    texts |= {f"{stem}.txt": record.text for stem, record in _stems(records)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in texts.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), text, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def read_passes(artifact: Artifact) -> tuple[PassRecord, ...]:
    """The passes an artifact was compiled with.

    Raises `UsageError` where the artifact does not say, `ArtifactError` where it is damaged.
    """
    if PASSES_FILE not in artifact.manifest.all_files():
        raise UsageError(f"{artifact.path}: holds no {PASSES_FILE}; compile the model again with this offramp")
    where = f"{artifact.path}/{PASSES_FILE}"
    try:
        with zipfile.ZipFile(io.BytesIO(artifact.read(PASSES_FILE))) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LIMIT:
                raise ArtifactError(f"{where}: holds more than {LIMIT} bytes of text; compile the model again")
            index = json.loads(archive.read(_INDEX))
            records = [PassRecord(str(e["name"]), bool(e["modified"]), int(e["nodes"]), "") for e in index]
            if not all(_NAME.fullmatch(record.name) for record in records):
                raise ArtifactError(f"{where}: names a pass that cannot be a file's name; compile the model again")
            texts = [archive.read(f"{stem}.txt").decode() for stem, _ in _stems(records)]
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{where}: not readable ({error}); compile the model again") from error
    return tuple(PassRecord(r.name, r.modified, r.nodes, t) for r, t in zip(records, texts, strict=True))


def write_passes(records: Sequence[PassRecord], folder: Path) -> None:
    """The texts and the differences between neighbours, in a new or empty folder; whole or not at all."""
    there = folder_at(folder)
    target = folder.absolute()
    draft = beside(target)
    try:
        if there is False or (there and any(folder.iterdir())):
            raise UsageError(f"{folder}: exists and is not an empty folder; choose another or remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        for name, text in _folder(records).items():
            (draft / name).write_text(text, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise StorageError(
            f"{folder}: could not be written ({error.strerror or error}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def summary(records: Sequence[PassRecord]) -> str:
    """One line per pass: its name, whether it changed anything, and how many nodes there were before and after."""
    lines = []
    before = None
    for stem, record in _stems(records):
        change = "captured" if before is None else "changed" if record.modified else "no change"
        nodes = f"{record.nodes} nodes" if before is None else f"{before} -> {record.nodes} nodes"
        lines.append(f"{stem:<24}  {change:<9}  {nodes}")
        before = record.nodes
    return "\n".join(lines)


def _stems(records: Sequence[PassRecord]) -> list[tuple[str, PassRecord]]:
    return [(f"{index:02}-{record.name}", record) for index, record in enumerate(records)]


def _folder(records: Sequence[PassRecord]) -> dict[str, str]:
    files = {}
    before: tuple[str, PassRecord] | None = None
    for stem, record in _stems(records):
        files[f"{stem}.txt"] = record.text
        if before is not None:
            old, new = (text.splitlines(keepends=True) for text in (before[1].text, record.text))
            files[f"{stem}.diff"] = "".join(difflib.unified_diff(old, new, f"{before[0]}.txt", f"{stem}.txt"))
        before = (stem, record)
    return files
