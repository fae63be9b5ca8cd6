"""An artifact is written whole or not at all, and opened only if every byte is as it was written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import Tiny, batch, sign, write_tiny

from offramp.runtime import (
    ArtifactError,
    StorageError,
    UsageError,
    file_spec,
    load,
    open_artifact,
    write_artifact,
)
from offramp.runtime.renaming import exchange


def zipped(folder: Path, out: Path, prefix: str = "", compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(out, "w", compression) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, prefix + path.relative_to(folder).as_posix())
    return out


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def resign(folder: Path, change: Any) -> None:
    path = folder / "manifest.json"
    body = json.loads(path.read_bytes())
    change(body)
    path.write_bytes(sign(body))


def test_what_was_written_is_read(tiny: Tiny) -> None:
    artifact = open_artifact(tiny.path)
    assert artifact.manifest == tiny.manifest
    assert {name: artifact.read(name) for name in tiny.files} == tiny.files
    assert sorted(tree(tiny.path)) == sorted([*tiny.files, "manifest.json"])


@pytest.mark.parametrize("prefix", ["", "artifact/"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_the_same_artifact(tiny: Tiny, tmp_path: Path, prefix: str, compression: int) -> None:
    path = zipped(tiny.path, tmp_path / "a.zip", prefix, compression)
    artifact = open_artifact(path)
    assert {name: artifact.read(name) for name in tiny.files} == tiny.files
    with load(path, threads=1) as inside, load(tiny.path, threads=1) as outside:
        np.testing.assert_array_equal(inside.run(batch(9)).exits, outside.run(batch(9)).exits)


def test_a_name_that_is_not_listed_is_refused(tiny: Tiny) -> None:
    for name in ("manifest.json", "../artifact/model.onnx", "nothing"):
        with pytest.raises(ArtifactError, match="lists no file"):
            open_artifact(tiny.path).read(name)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), flip=st.integers(1, 255))
def test_one_altered_byte_of_any_file_is_refused(tiny: Tiny, broken: Path, data: st.DataObject, flip: int) -> None:
    name = data.draw(st.sampled_from(sorted(tiny.files)))
    content = bytearray(tiny.files[name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= flip
    (broken / name).write_bytes(content)
    try:
        with pytest.raises(ArtifactError, match=rf"{name}: altered"):
            load(broken)
    finally:
        (broken / name).write_bytes(tiny.files[name])


@pytest.mark.parametrize("name", ["stages/0.onnx", "stages/2.onnx", "model.onnx", "report.html"])
def test_a_missing_truncated_or_longer_file_is_named(tiny: Tiny, broken: Path, name: str) -> None:
    size = len(tiny.files[name])
    (broken / name).write_bytes(tiny.files[name][:-1])
    with pytest.raises(ArtifactError, match=rf"{name}: truncated, {size - 1} bytes instead of {size}"):
        load(broken)
    (broken / name).write_bytes(tiny.files[name] + b"x")
    with pytest.raises(ArtifactError, match=rf"{name}: too long, {size + 1} bytes instead of {size}"):
        load(broken)
    (broken / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: missing"):
        load(broken)


def test_a_file_altered_after_opening_is_not_executed(tiny: Tiny, broken: Path) -> None:
    artifact = open_artifact(broken)
    content = tiny.files["model.onnx"]
    (broken / "model.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="altered"):
        artifact.read("model.onnx")


def link_file(path: Path) -> None:
    target = path / "elsewhere"
    (path / "model.onnx").rename(target)
    (path / "model.onnx").symlink_to(target)


def link_folder(path: Path) -> None:
    (path / "stages").rename(path.parent / "elsewhere")
    (path / "stages").symlink_to(path.parent / "elsewhere")


def pipe(path: Path) -> None:
    (path / "model.onnx").unlink()
    os.mkfifo(path / "model.onnx")


def folder_for_file(path: Path) -> None:
    (path / "model.onnx").unlink()
    (path / "model.onnx").mkdir()


def file_for_folder(path: Path) -> None:
    shutil.rmtree(path / "stages")
    (path / "stages").write_bytes(b"")


def manifest_is_a_pipe(path: Path) -> None:
    no_manifest(path)
    os.mkfifo(path / "manifest.json")


def no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def manifest_is_a_folder(path: Path) -> None:
    no_manifest(path)
    (path / "manifest.json").mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (link_file, "symbolic link"),
        (link_folder, "symbolic link"),
        (pipe, "not a regular file"),
        (folder_for_file, "not a regular file"),
        (file_for_folder, "stages/0.onnx: missing"),
        (no_manifest, r"not an artifact \(no manifest.json\)"),
        (manifest_is_a_folder, "not a regular file"),
        (manifest_is_a_pipe, "not a regular file"),
    ],
)
def test_a_malicious_folder_is_refused(broken: Path, damage: Any, message: str) -> None:
    damage(broken)
    with pytest.raises(ArtifactError, match=message):
        load(broken)


def test_paths_that_are_no_artifact_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="not a regular file"):
        load(tmp_path / "pipe")
    for name, message in (("absent", "does not exist"), ("text", "neither"), ("empty", "not an artifact")):
        with pytest.raises(ArtifactError, match=message):
            load(tmp_path / name)


def test_damaged_archives_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    whole = zipped(tiny.path, tmp_path / "whole.zip").read_bytes()
    bad = tmp_path / "bad.zip"
    for length in range(1, len(whole), 97):
        bad.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            load(bad)
    noticed = 0
    for position in range(0, len(whole), 31):
        bad.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        # A byte of a time stamp, say, changes nothing that is read.
        try:
            artifact = open_artifact(bad)
        except ArtifactError:
            noticed += 1
        else:
            assert {name: artifact.read(name) for name in tiny.files} == tiny.files
    assert noticed > 20


@pytest.mark.parametrize("method", [1, 12, 14, 93, 200])
def test_archives_that_say_they_are_compressed_otherwise_are_refused(tiny: Tiny, tmp_path: Path, method: int) -> None:
    path = zipped(tiny.path, tmp_path / "a.zip", "", zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    entries = [at for at in range(len(whole)) if whole.startswith(b"PK\1\2", at)]
    for at in entries:
        path.write_bytes(whole[: at + 10] + bytes([method]) + whole[at + 11 :])
        with pytest.raises(ArtifactError, match="damaged archive"):
            open_artifact(path)


def test_an_archive_with_a_name_that_is_no_text_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = zipped(tiny.path, tmp_path / "a.zip", "é/")
    whole, name = path.read_bytes(), "é/".encode()
    at = whole.index(name, whole.index(b"PK\1\2"))
    path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    with pytest.raises(ArtifactError, match="damaged archive"):
        open_artifact(path)


def test_archives_of_another_form_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no manifest"):
        load(zipped(tiny.path, tmp_path / "deep.zip", "a/b/"))
    two = zipped(tiny.path, tmp_path / "two.zip", "a/")
    with zipfile.ZipFile(two, "a") as archive:
        archive.writestr("b/manifest.json", "{}")
    with pytest.raises(ArtifactError, match="2 folders"):
        load(two)


def test_no_more_is_decompressed_than_is_listed(tiny: Tiny, broken: Path, tmp_path: Path) -> None:
    (broken / "report.html").write_bytes(bytes(50_000_000))
    bomb = zipped(broken, tmp_path / "bomb.zip")
    assert bomb.stat().st_size < 200_000
    with pytest.raises(ArtifactError, match=r"report\.html: too long, 50000000 bytes"):
        load(bomb)
    # The same with an archive that lies about the size: the hash is of the listed bytes alone.
    honest, lie = (50_000_000).to_bytes(4, "little"), len(tiny.files["report.html"]).to_bytes(4, "little")
    assert honest in bomb.read_bytes()
    bomb.write_bytes(bomb.read_bytes().replace(honest, lie))
    with pytest.raises(ArtifactError, match=r"altered|damaged archive"):
        load(bomb)


def test_a_stage_that_is_no_model_is_refused(broken: Path) -> None:
    for content in (b"", b"garbage", bytes(64)):
        (broken / "stages/1.onnx").write_bytes(content)
        resign(broken, lambda body, c=content: body["files"].update({"stages/1.onnx": vars(file_spec(c))}))
        with pytest.raises(ArtifactError, match=r"stages/1\.onnx: refused by onnxruntime"):
            load(broken)


@pytest.mark.parametrize(
    ("stage", "field", "value", "message"),
    [
        (0, "inputs", ["y"], "needs 'y'"),
        (0, "carries", ["h0", "skip", "z"], "needs 'z'"),
        (1, "carries", ["h1", "skip"], r"needs 'side', which no stage before"),
        (0, "inputs", ["side"], "differ on 'x'"),
        (0, "outputs", ["h0", "skip", "z"], "differ on 'z'"),
        (2, "inputs", ["h1", "skip"], "differ on 'side'"),
    ],
)
def test_a_stage_that_is_not_as_listed_is_refused(
    broken: Path, stage: int, field: str, value: list[str], message: str
) -> None:
    resign(broken, lambda body: body["stages"][stage].update({field: value}))
    with pytest.raises(ArtifactError, match=rf"stages/\d\.onnx: .*{message}"):
        load(broken)


def test_a_single_file_that_is_not_as_listed_is_refused(tiny: Tiny, broken: Path) -> None:
    shutil.copyfile(broken / "stages/0.onnx", broken / "model.onnx")
    spec = vars(file_spec(tiny.files["stages/0.onnx"]))
    resign(broken, lambda body: body["files"].update({"model.onnx": spec}))
    with pytest.raises(ArtifactError, match=r"model\.onnx: has no 'exit'"):
        load(broken, executor="single-file")


def test_an_artifact_with_one_form_runs_in_that_form(tiny: Tiny, tmp_path: Path) -> None:
    staged = {name: data for name, data in tiny.files.items() if name != "model.onnx"}
    single = {name: data for name, data in tiny.files.items() if not name.startswith("stages")}
    for files, stages, other in (
        (staged, tiny.manifest.stages, "single-file"),
        (single, (), "segments"),
    ):
        specs = {name: file_spec(data) for name, data in files.items() if name != "report.html"}
        path = tmp_path / other
        write_artifact(path, dataclasses.replace(tiny.manifest, files=specs, stages=stages), files)
        with load(path, threads=1) as session, load(tiny.path, threads=1) as both:
            np.testing.assert_array_equal(session.run(batch(20)).exits, both.run(batch(20)).exits)
        with pytest.raises(UsageError, match=f"holds no {other} form"):
            load(path, executor=other)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="executor is 'eager'"):
        load(tiny.path, executor="eager")  # type: ignore[arg-type]


def test_a_single_file_without_its_confidence_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    learned = dataclasses.replace(tiny.manifest, confidence="learned")
    write_artifact(tmp_path / "learned", learned, tiny.files)
    load(tmp_path / "learned")
    with pytest.raises(ArtifactError, match="executor='segments'"):
        load(tmp_path / "learned", executor="single-file")


def test_writing_replaces_an_artifact_and_nothing_else(tiny: Tiny, tmp_path: Path) -> None:
    out = write_tiny(tmp_path / "deep" / "out").path
    smaller = {name: data for name, data in tiny.files.items() if not name.startswith("stages")}
    specs = {"model.onnx": file_spec(tiny.files["model.onnx"])}
    write_artifact(out, dataclasses.replace(tiny.manifest, files=specs, stages=()), smaller)
    assert sorted(tree(out)) == ["manifest.json", "model.onnx", "report.html"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"'notes\.txt', which no artifact put there"):
        write_tiny(out)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "aside").symlink_to(tmp_path)
    (out / "notes.txt").unlink()
    with pytest.raises(UsageError, match="'aside', which no artifact put there"):
        write_tiny(out)
    (out / "aside").unlink()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an artifact directory"):
        write_tiny(out / "notes.txt")
    web = tmp_path / "web"
    web.mkdir()
    (web / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(UsageError, match="manifest"):
        write_tiny(web)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "web"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_writing_goes_through_a_link_and_into_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_tiny(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert open_artifact(tmp_path / "real").manifest.classes == 5


def test_an_artifact_cannot_be_the_root_of_a_file_system(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="/: has no name that an artifact could take"):
        write_artifact("/", tiny.manifest, tiny.files)


def test_files_that_are_not_the_manifest_s_are_a_bug(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the files given"):
        write_artifact(tmp_path / "out", tiny.manifest, {**tiny.files, "more": b""})
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tiny import write_tiny
from offramp.runtime import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    write_tiny(Path(sys.argv[1]))
except StorageError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("limit", [0, 100, 1500])
@pytest.mark.parametrize("replacing", [True, False])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, environment: dict[str, str], limit: int, replacing: bool
) -> None:
    out = tmp_path / "out"
    before = tree(write_tiny(out).path) if replacing else {}
    command = [sys.executable, "-c", FULL_DISK, str(out), str(Path(__file__).parent), str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith(f"{out}: could not be written (File too large); free space")
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if replacing else [])
    assert (tree(out) if replacing else {}) == before


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from offramp.runtime import artifact
from tiny import write_tiny

def killing(step):
    def killed(*names):
        step(*names)
        os._exit(9)
    return killed

Path.rename = killing(Path.rename)
artifact.exchange = killing(artifact.exchange)
write_tiny(Path(sys.argv[1]))
"""


def test_a_kill_while_one_takes_the_other_s_place_leaves_one_there(tmp_path: Path, environment: dict[str, str]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    other.mkdir()
    if not exchange(one, other):
        pytest.skip("this file system cannot exchange two names")
    assert (other.read_text(), one.is_dir()) == ("1", True)
    with pytest.raises(FileNotFoundError):
        exchange(one, tmp_path / "none")
    out = write_tiny(tmp_path / "out").path
    command = [sys.executable, "-c", KILLED, str(out), str(Path(__file__).parent)]
    assert subprocess.run(command, env=environment, check=False).returncode == 9
    open_artifact(out)


def test_an_artifact_is_replaced_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_tiny(tmp_path / "out").path
    inode = out.stat().st_ino
    monkeypatch.setattr("offramp.runtime.artifact.exchange", lambda one, other: False)
    write_tiny(out)
    assert out.stat().st_ino != inode
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_artifact_may_have_as_long_a_name_as_its_file_system_allows(tmp_path: Path) -> None:
    out = tmp_path / ("a" * 255)
    for _ in range(2):  # written, and replaced
        assert write_tiny(out).path == out
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_a_failed_exchange_puts_the_old_artifact_back(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_tiny(tmp_path / "out").path
    before = tree(out)
    monkeypatch.setattr("offramp.runtime.artifact.exchange", lambda one, other: False)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        write_tiny(out)
    assert tree(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
