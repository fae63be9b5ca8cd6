"""The command line: what it prints, what it writes, and one line for whatever goes wrong."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import Tiny, batch, write_tiny

from offramp.runtime import Session, dump_manifest, load, render
from offramp.runtime.cli import Command, main
from offramp.runtime.manifest import FORMAT_VERSION


@pytest.fixture
def data(tmp_path: Path) -> Path:
    arrays: dict[str, Any] = {**batch(70), "labels": np.arange(70) % 5}
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("offramp: error: ")
    assert err.count("\n") == 1
    return err


def test_inspect_shows_the_table_and_what_is_inside(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny.path)]) == 0
    out = capsys.readouterr().out
    assert render(tiny.manifest) in out
    assert "x float32 (batch, 6)" in out
    assert "* tolerance 1.00 %, certified: 0.5500, 0.5000" in out
    assert "  tolerance 0.10 %, joint: never, 0.9000" in out
    assert "distil 50, calibrate 10, select 20, certify 10, test 10; seed 0" in out
    for name, spec in tiny.manifest.all_files().items():
        assert name in out
        assert spec.sha256[:16] in out


def test_inspect_json_is_the_manifest(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", str(tiny.path)]) == 0
    assert capsys.readouterr().out.encode() == dump_manifest(tiny.manifest)


@pytest.mark.parametrize("size", [1, 32, 100])
def test_run_writes_the_session_s_answers(
    tiny: Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    out = tmp_path / "answers.npz"
    arguments = ["run", str(tiny.path), "--data", str(data), "-o", str(out), "--threads", "1"]
    assert main([*arguments, "--batch", str(size), "--providers", "CPUExecutionProvider"]) == 0
    answers = load(tiny.path, threads=1).run(batch(70))
    with np.load(out) as written:
        assert sorted(written.files) == ["classes", "confidence", "exits", "probabilities"]
        for name in written.files:
            np.testing.assert_allclose(written[name], getattr(answers, name), atol=1e-6)
            assert written[name].dtype == getattr(answers, name).dtype
    printed = capsys.readouterr().out
    agreement = (answers.classes == np.arange(70) % 5).mean() * 100
    assert "70 rows, " in printed
    assert f"labels on {agreement:.2f} %" in printed
    for index, count in enumerate(np.bincount(answers.exits, minlength=3)):
        assert f"  exit {index}  {count:>9,} rows" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.npz", "data.npz"]


def test_run_tells_how_far_it_is_without_tqdm(
    tiny: Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(seconds), perf_counter=time.perf_counter)
    monkeypatch.setattr("offramp.runtime.commands.time", clock)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    words = ["run", str(tiny.path), "--data", str(data), "-o", str(tmp_path / "answers.npz"), "--batch", "10"]
    assert main(words) == 0
    assert capsys.readouterr().err == ""  # into a file nothing is told
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(words) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == ["1 of 7 batches", "3 of 7 batches", "5 of 7 batches"]


def test_run_writes_the_name_it_was_given(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    assert main(["run", str(tiny.path), "--data", str(data), "-o", str(tmp_path / "answers")]) == 0
    assert (tmp_path / "answers").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"artifact": "nowhere"}, "nowhere: does not exist"),
        ({"--data": "nothing.npy"}, "nothing.npy: does not exist"),
        ({"--data": "nothing:callable"}, "No module named 'nothing'"),
        ({"-o": "/nowhere/answers.npz"}, "lies in none"),
        ({"-o": "/"}, "is a folder"),
        ({"--providers": "TPUExecutionProvider"}, "'TPUExecutionProvider' is not available; available here:"),
        ({"--providers": "CPUExecutionProvider", "--cuda-graphs": ""}, "CUDA graphs need CUDAExecutionProvider, and"),
        ({"--preprocess": "crop=2"}, "for folders of images"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tiny: Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    options = {"--data": str(data), "-o": str(tmp_path / "answers.npz"), **change}
    artifact = options.pop("artifact", str(tiny.path))
    before = sorted(tmp_path.iterdir())
    assert main(["run", artifact, *[word for pair in options.items() for word in pair if word]]) == 2
    assert message in error_line(capsys)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("arguments", [[], ["--batch", "0"], ["--batch", "many"], ["--threads", "-1"], ["--thre", "1"]])
def test_wrong_arguments_are_status_2(tiny: Tiny, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    complete = ["--data", "d.npy", "-o", "a.npz"] if arguments else []
    assert main(["run", str(tiny.path), *complete, *arguments]) == 2
    assert error_line(capsys).endswith("see offramp run --help\n")


def test_a_failed_write_leaves_the_old_answers(
    tiny: Tiny, data: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "answers.npz").write_bytes(b"old")
    code = (
        "import resource, sys; from offramp.runtime.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); sys.exit(main(sys.argv[1:]))"
    )
    words = ["run", str(tiny.path), "--data", str(data), "-o", str(tmp_path / "answers.npz")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "could not be written (File too large)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "answers.npz").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.npz", "data.npz"]


def test_a_long_name_is_as_good_as_any(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    out = tmp_path / f"{'a' * 240}.npz"
    assert main(["run", str(tiny.path), "--data", str(data), "-o", str(out)]) == 0
    assert out.is_file()


def test_that_nothing_can_be_written_is_said_before_anything_is_answered(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    monkeypatch.setattr(Session, "run", refused)
    assert main(["run", str(tiny.path), "--data", str(data), "-o", str(tmp_path / "a.npz")]) == 2
    assert "a.npz: could not be written (Read-only file system)" in error_line(capsys)


def test_the_overview_lists_every_command_and_the_road(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    places = [out.index(f"\n  {name} ") for name in ("candidates", "compile", "inspect", "run", "demo")]
    assert places == sorted(places)
    assert "offramp compile mymodels:resnet20" in out
    assert main([]) == 2


@pytest.mark.parametrize("name", ["inspect", "run"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert "ARTIFACT" in capsys.readouterr().out


def test_the_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("offramp ")


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fly"]) == 2
    known = "candidates, space, compile, inspect, run, tune, serve, demo"
    assert f"no command 'fly'; choose from {known}" in error_line(capsys)


def plug_in(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    entries = [SimpleNamespace(name="compile", load=load)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)


def command(run: Any) -> Command:
    def configure(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model")

    return Command("test", configure, run)


def test_a_plug_in_is_loaded_when_called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loaded: list[str] = []

    def entry() -> Command:
        loaded.append("compile")
        return command(lambda args: 0 if args.model == "m" else 1)

    plug_in(monkeypatch, entry)
    assert main(["--help"]) == 0
    assert loaded == []
    assert main(["compile", "m"]) == 0
    assert loaded == ["compile"]


def test_missing_training_dependencies_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def entry() -> Command:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    plug_in(monkeypatch, entry)
    assert main(["compile", "m"]) == 2
    assert error_line(capsys) == (
        "offramp: error: offramp compile needs its training dependencies: "
        "pip install 'offramp[compile]' (missing: torch)\n"
    )


def test_a_command_that_is_not_installed_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert main(["compile", "m"]) == 2
    assert "pip install 'offramp[compile]'" in error_line(capsys)


def test_an_interruption_is_one_line_and_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    plug_in(monkeypatch, lambda: command(interrupt))
    assert main(["compile", "m"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_reader_that_left_is_no_traceback(tiny: Tiny, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "offramp.runtime", "inspect", "--json", str(tiny.path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="takes a device that is always full")
def test_a_full_disk_behind_stdout_is_one_line(tiny: Tiny, environment: dict[str, str]) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "offramp.runtime", "inspect", "--json", str(tiny.path)]
        told = subprocess.run(command, check=False, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert told.returncode == 2
    assert told.stderr.startswith("offramp: error: standard output: could not be written (No space left on device)")
    assert told.stderr.count("\n") == 1


def test_the_module_is_the_command(tmp_path: Path, environment: dict[str, str]) -> None:
    path = write_tiny(tmp_path / "artifact").path
    (path / "model.onnx").write_bytes(b"")
    command = [sys.executable, "-m", "offramp.runtime", "inspect", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"offramp: error: {path}/model.onnx: truncated, 0 bytes instead of ")
    assert json.loads((path / "manifest.json").read_bytes())["format_version"] == FORMAT_VERSION
