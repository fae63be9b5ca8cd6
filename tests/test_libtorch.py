"""An artifact's `model.ts` in a C++ program: built against the libtorch inside the torch wheel, the eager answers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import INF, QUICK

from offramp.compiler import Job, compile, pack
from offramp.compiler.demo import Digits
from offramp.compiler.equivalence import CLOSE, NEAR
from offramp.passes import ExitProgram
from offramp.runtime import Manifest

_MISSING = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.skipif(bool(_MISSING), reason=f"no {' and no '.join(_MISSING)} to build the C++ program with"),
    pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.jit ends with Python 3.13"),
]
SOURCE = Path(__file__).parent / "libtorch"


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program `answer`, unoptimised: torch's headers take long enough as it is."""
    build = tmp_path_factory.mktemp("libtorch")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    run("cmake", "-S", SOURCE, "-B", build, prefix, "-DCMAKE_CXX_COMPILER=g++", "-DCMAKE_CXX_FLAGS=-O0")
    run("cmake", "--build", build)
    return build / "answer"


@dataclass(frozen=True)
class Artifact:
    path: Path
    program: ExitProgram  # what was emitted
    images: np.ndarray  # [rows, 1, 8, 8] float32


@pytest.fixture(scope="module")
def artifact(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    made: list[ExitProgram] = []

    def keep(program: ExitProgram, job: Job) -> tuple[Manifest, dict[str, bytes]]:
        made.append(program)
        return pack(program, job)

    out = tmp_path_factory.mktemp("scripted") / "artifact"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[compile.__module__], "pack", keep)
        compile(digits.model, digits.images, out, options=replace(QUICK, targets=("torchscript",)))
    return Artifact(out, made[0], digits.images)


def answers(
    program: Path, artifact: Artifact, rows: np.ndarray, folder: Path, thresholds: Sequence[float] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[B, 10]` and exits `[B]` of the C++ program."""
    rows.tofile(folder / "rows.f32")
    shape = ",".join(map(str, rows.shape))
    limits = [",".join(map(str, thresholds))] if thresholds else []
    files = [folder / "probabilities.f32", folder / "exits.i64"]
    run(program, artifact.path / "model.ts", folder / "rows.f32", shape, *files, *limits)
    return np.fromfile(files[0], np.float32).reshape(-1, 10), np.fromfile(files[1], np.int64)


def assert_eager(
    artifact: Artifact, rows: np.ndarray, got: tuple[np.ndarray, np.ndarray], limits: Sequence[float]
) -> None:
    program = artifact.program.with_thresholds(limits)
    inputs = torch.from_numpy(rows)
    expected, exits = (value.numpy() for value in program(inputs))
    every = program.all_exits(inputs)[:-1].amax(2).numpy()
    sure = (np.abs(every - np.array(limits, np.float32)[:, None]) > NEAR).all(0)
    assert sure.sum() >= 0.95 * len(rows)
    assert got[0].shape == expected.shape
    np.testing.assert_array_equal(got[1][sure], exits[sure])
    np.testing.assert_allclose(got[0][sure], expected[sure], atol=CLOSE)


def test_the_program_holds_no_python(answer: Path) -> None:
    needed = run("readelf", "-d", answer)
    assert re.search(r"NEEDED.*libtorch", needed)
    assert not re.search(r"NEEDED.*python", needed)


@pytest.mark.parametrize("count", [0, 1, 3, 257])
def test_the_eager_answers(answer: Path, artifact: Artifact, tmp_path: Path, count: int) -> None:
    rows = artifact.images[:count]
    limits = artifact.program.plan.thresholds
    got = answers(answer, artifact, rows, tmp_path)
    assert_eager(artifact, rows, got, limits)
    if count == 257:
        assert len({*got[1].tolist()}) > 1


def test_other_thresholds(answer: Path, artifact: Artifact, tmp_path: Path) -> None:
    rows = artifact.images[:100]
    every = artifact.program.all_exits(torch.from_numpy(rows))[:-1].amax(2)
    half = [float(q) for q in every.quantile(0.5, 1)]
    never = [INF] * len(half)
    for limits in (half, never):
        got = answers(answer, artifact, rows, tmp_path, limits)
        assert_eager(artifact, rows, got, limits)
    assert {*got[1].tolist()} == {len(half)}


def test_thresholds_that_do_not_fit(answer: Path, artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "rows.f32").write_bytes(artifact.images[:1].tobytes())
    exits = len(artifact.program.plan.exits)
    command = [answer, artifact.path / "model.ts", tmp_path / "rows.f32", "1,1,8,8", tmp_path / "p", tmp_path / "e"]
    done = subprocess.run([*command, "0.5," * exits + "0.5"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"give {exits} thresholds in one dimension" in done.stderr
