"""`offramp inspect --passes`: the folder it writes, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from pathlib import Path

import pytest
from tiny import Tiny

from offramp.runtime import ArtifactError, StorageError, UsageError, file_spec, open_artifact, write_artifact
from offramp.runtime.artifact import Artifact
from offramp.runtime.cli import main
from offramp.runtime.trace import PassRecord, dump_passes, read_passes, write_passes

RECORDS = (
    PassRecord("capture", True, 3, "a\nb\nc\n"),
    PassRecord("Idle", False, 3, "a\nb\nc\n"),
    PassRecord("DropB", True, 2, "a\nc\n"),
)


def with_passes(tiny: Tiny, folder: Path, data: bytes) -> Artifact:
    files = {**tiny.files, "passes.zip": data}
    specs = {**tiny.manifest.files, "passes.zip": file_spec(data)}
    write_artifact(folder / "traced", dataclasses.replace(tiny.manifest, files=specs), files)
    return open_artifact(folder / "traced")


@pytest.fixture
def traced(tiny: Tiny, tmp_path: Path) -> Artifact:
    return with_passes(tiny, tmp_path, dump_passes(RECORDS))


def test_what_was_dumped_is_read(traced: Artifact) -> None:
    assert read_passes(traced) == RECORDS
    assert dump_passes(RECORDS) == dump_passes(list(RECORDS))


def test_inspect_writes_graphs_and_differences(
    traced: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "passes"
    assert main(["inspect", str(traced.path), "--passes", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "00-capture.txt", "01-Idle.diff", "01-Idle.txt", "02-DropB.diff", "02-DropB.txt",
    ]  # fmt: skip
    assert (out / "00-capture.txt").read_text() == "a\nb\nc\n"
    assert (out / "01-Idle.diff").read_text() == ""
    assert (out / "02-DropB.diff").read_text().splitlines() == [
        "--- 01-Idle.txt", "+++ 02-DropB.txt", "@@ -1,3 +1,2 @@", " a", "-b", " c",
    ]  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in said[:3]] == [
        ["00-capture", "captured", "3", "nodes"],
        ["01-Idle", "no", "change", "3", "->", "3", "nodes"],
        ["02-DropB", "changed", "3", "->", "2", "nodes"],
    ]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_an_empty_folder_is_filled_and_any_other_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_passes(RECORDS, tmp_path / "empty")
    assert (tmp_path / "empty" / "00-capture.txt").is_file()
    for taken in ("empty", "file"):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(UsageError, match="exists and is not an empty folder; choose another or remove it"):
            write_passes(RECORDS, tmp_path / taken)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        write_passes(RECORDS, tmp_path / "file" / "passes")
    with pytest.raises(StorageError, match=r"could not be written|cannot be looked at"):
        write_passes(RECORDS, tmp_path / ("long" * 75))


def test_an_artifact_without_passes_says_so(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny.path), "--passes", str(tmp_path / "out")]) == 2
    assert "holds no passes.zip; compile the model again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def archive(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        for name, text in files.items():
            made.writestr(name.replace("_json", ".json").replace("_txt", ".txt"), text)
    return buffer.getvalue()


ENTRY = {"name": "capture", "modified": True, "nodes": 1}
HOSTILE = {
    "no archive": (b"PK nothing", "not readable"),
    "no index": (archive(other_txt="x"), "not readable"),
    "an index that is no list": (archive(passes_json="7"), "not readable"),
    "a name that leaves the folder": (
        archive(passes_json=json.dumps([{**ENTRY, "name": "../../evil"}])), "names a pass that cannot be a file's name"
    ),
    "a missing text": (archive(passes_json=json.dumps([ENTRY])), "not readable"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_refused_archives(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    data, says = HOSTILE[kind]
    with pytest.raises(ArtifactError, match=says):
        read_passes(with_passes(tiny, tmp_path, data))


def test_an_archive_that_unpacks_to_too_much_is_not_unpacked(traced: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.runtime.trace.LIMIT", 5)
    with pytest.raises(ArtifactError, match="holds more than 5 bytes of text"):
        read_passes(traced)
