"""Weights too large for a protobuf lie beside the model; the limit is set to some bytes here, to see it happen."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from models import INF, Chain, Compiled, captured, rows, with_exits

from offramp.compiler.emit import backbone_model, emit, model_files
from offramp.compiler.emit.external import temporary_folder
from offramp.passes import ExitProgram
from offramp.runtime import ArtifactError, file_spec, load, open_artifact, write_artifact
from offramp.runtime.engine import EngineSession
from offramp.runtime.errors import StorageError

LIMIT = 2048


@pytest.fixture(scope="module")
def program() -> ExitProgram:
    return with_exits(captured(Chain), ["relu", "relu_1"], [0.4, 0.5])


def test_a_temporary_folder_that_cannot_be_filled_is_said() -> None:
    with (
        pytest.raises(StorageError, match=r"temporary folder .*No space left on device.*; set TMPDIR"),
        temporary_folder(),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def large(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled artifact, its ONNX files with the weights outside."""
    files: dict[str, bytes] = {}
    for name in compiled.manifest.all_files():
        if name.endswith(".onnx"):
            files.update(model_files(onnx.load(compiled.path / name), name, LIMIT))
        elif name in compiled.manifest.files:
            files[name] = (compiled.path / name).read_bytes()
    specs = {name: file_spec(data) for name, data in files.items()}
    files |= {name: (compiled.path / name).read_bytes() for name in compiled.manifest.measured.files}
    out = tmp_path_factory.mktemp("large") / "artifact"
    write_artifact(out, dataclasses.replace(compiled.manifest, files=specs), files)
    return out


def test_weights_move_beside_the_model(program: ExitProgram) -> None:
    _, inside = emit(program)
    _, files = emit(program, limit=1024)
    assert "model.onnx.data" in files
    assert "stages/1.onnx.data" in files
    for name in inside:
        assert len(files[name]) <= len(inside[name])
    graph = onnx.load_from_string(files["stages/1.onnx"]).graph
    (weight,) = [t for t in graph.initializer if t.name == "second.weight"]
    assert {entry.key: entry.value for entry in weight.external_data}["location"] == "1.onnx.data"
    assert not weight.HasField("raw_data")
    assert all(t.data_location == onnx.TensorProto.DEFAULT for t in graph.initializer if np.prod(t.dims) < 100)


def test_only_models_over_the_limit_are_split(program: ExitProgram) -> None:
    """A stage may fit where the whole does not."""
    _, files = emit(program, limit=3000)
    assert "model.onnx.data" in files
    assert not any(name.startswith("stages/") and name.endswith(".data") for name in files)


def test_the_same_program_gives_the_same_bytes(program: ExitProgram) -> None:
    assert emit(program, limit=1024)[1] == emit(program, limit=1024)[1]


@pytest.mark.parametrize("limits", [(0.4, 0.5), (INF, INF), (INF, -INF)])
def test_plain_onnxruntime_opens_the_single_file_by_its_path(
    program: ExitProgram, limits: tuple[float, float], tmp_path: Path
) -> None:
    for name, data in emit(program, ["onnx"], limit=1024)[1].items():
        (tmp_path / name).write_bytes(data)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = ort.InferenceSession(tmp_path / "model.onnx")
    expected, exits = program.with_thresholds(limits)(rows(9))
    feed = {"x": rows(9).numpy(), "thresholds": np.array(limits, np.float32)}
    got = session.run(["probabilities", "exit"], feed)
    assert got[1].tolist() == exits.tolist()
    assert got[0] == pytest.approx(expected.numpy(), abs=1e-5)


def test_the_backbone_to_measure_against_may_be_large_too(program: ExitProgram) -> None:
    model = backbone_model(program.backbone, limit=1024)
    assert list(model.external) == ["backbone.onnx.data"]
    (got,) = EngineSession(model, "backbone", ["CPUExecutionProvider"], 1, True).run(
        ["probabilities"], {"x": rows(5).numpy()}
    )
    assert got == pytest.approx(program.with_thresholds([INF, INF])(rows(5))[0].numpy(), abs=1e-5)


@pytest.mark.parametrize("executor", ["segments", "single-file"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_runtime_loads_it(large: Path, compiled: Compiled, tmp_path: Path, executor: str, packed: bool) -> None:
    where = large
    if packed:
        where = tmp_path / "large.zip"
        with zipfile.ZipFile(where, "w") as archive:
            for path in sorted(large.rglob("*")):
                archive.write(path, path.relative_to(large).as_posix())
    images = compiled.digits.images[:33]
    with load(where, executor=executor) as session, load(compiled.path, executor=executor) as plain:  # type: ignore[arg-type]
        got, expected = session.run(images), plain.run(images)
        assert got.exits.tolist() == expected.exits.tolist()
        assert np.array_equal(got.probabilities, expected.probabilities)


@pytest.mark.parametrize(("name", "says"), [("altered", "altered since"), ("missing", "missing")])
def test_the_weights_are_checked_like_every_file(large: Path, tmp_path: Path, name: str, says: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(large, broken)
    (weights,) = broken.glob("model.onnx.data")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.unlink() if name == "missing" else weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"model\.onnx\.data: {says}"):
        open_artifact(broken)
