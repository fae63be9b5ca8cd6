"""The single file in JavaScript: `model.onnx` in onnxruntime-node gives the answers it gives in Python.

npm installs the binding below `build/`, once. Without node and npm, or without a way to npm's registry, these
tests say so and skip; anything else that goes wrong fails.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from models import Compiled

HERE = Path(__file__).parent / "node"
CACHE = Path(__file__).parent.parent / "build" / "node"
ROWS = 64
_UNREACHABLE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH")


@pytest.fixture(scope="module")
def binding() -> Path:
    """The `node_modules` in which onnxruntime-node lies."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node or npm is not installed; install Node.js 18 or later to run these tests")
    wanted = (HERE / "package.json").read_text()
    stamp = CACHE / "installed.json"
    if stamp.is_file() and stamp.read_text() == wanted:
        return CACHE / "node_modules"
    draft = CACHE.with_name(f"node-{os.getpid()}")  # another worker may be at it too
    draft.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "package.json", draft)
    # The package brings its CPU library along; what its install script would fetch is CUDA's.
    environment = {**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--fetch-timeout=60000"]
    done = subprocess.run(command, cwd=draft, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and any(code in done.stderr for code in _UNREACHABLE):
        pytest.skip(f"npm's registry cannot be reached: {done.stderr.strip().splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    (draft / stamp.name).write_text(wanted)
    shutil.rmtree(CACHE, ignore_errors=True)
    draft.rename(CACHE)
    return CACHE / "node_modules"


def in_node(binding: Path, model: Path, given: dict[str, object], folder: Path) -> list[dict[str, np.ndarray]]:
    """What `tests/node/run.cjs` answers, one dictionary of arrays per run."""
    file = folder / "feed.json"
    file.write_text(json.dumps(given))
    command = ["node", str(HERE / "run.cjs"), str(model), str(file)]
    environment = {**os.environ, "NODE_PATH": str(binding)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [
        {name: np.array(value["data"]).reshape(value["dims"]) for name, value in run.items()}
        for run in json.loads(done.stdout)
    ]


def feed(compiled: Compiled, runs: list[list[float] | None]) -> dict[str, object]:
    rows = compiled.digits.images[:ROWS]
    (spec,) = compiled.manifest.inputs
    return {
        "inputs": {spec.name: {"type": spec.dtype, "dims": rows.shape, "data": rows.ravel().tolist()}},
        "runs": [{} if limits is None else {"thresholds": limits} for limits in runs],
    }


def in_python(compiled: Compiled, limits: list[float] | None) -> tuple[np.ndarray, np.ndarray]:
    session = ort.InferenceSession(compiled.path / "model.onnx")
    more = {} if limits is None else {"thresholds": np.array(limits, np.float32)}
    name = compiled.manifest.inputs[0].name
    probabilities, exits = session.run(["probabilities", "exit"], {name: compiled.digits.images[:ROWS], **more})
    return probabilities, exits


def test_javascript_gives_the_same_answers(binding: Path, compiled: Compiled, tmp_path: Path) -> None:
    (answer,) = in_node(binding, compiled.path / "model.onnx", feed(compiled, [None]), tmp_path)
    probabilities, exits = in_python(compiled, None)
    assert answer["exit"].tolist() == exits.tolist()
    assert len(set(exits.tolist())) > 1, "some rows leave early and others do not"
    assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-5)


def test_thresholds_given_in_javascript(binding: Path, compiled: Compiled, tmp_path: Path) -> None:
    """onnxruntime-node 1.30 feeds no input that has a default, so the default is taken out of the file for it."""
    model = onnx.load(compiled.path / "model.onnx")
    (default,) = [tensor for tensor in model.graph.initializer if tensor.name == "thresholds"]
    model.graph.initializer.remove(default)
    onnx.save(model, tmp_path / "asks.onnx")
    count = len(compiled.manifest.exits) - 1
    runs: list[list[float] | None] = [[0.5] * count, [2.0] * count, [-1.0] * count]
    answers = in_node(binding, tmp_path / "asks.onnx", feed(compiled, runs), tmp_path)
    for limits, answer in zip(runs, answers, strict=True):
        probabilities, exits = in_python(compiled, limits)
        assert answer["exit"].tolist() == exits.tolist()
        assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-5)
    assert set(answers[1]["exit"].tolist()) == {count}
    assert set(answers[2]["exit"].tolist()) == {0}


def test_the_binding_still_ignores_what_has_a_default(binding: Path, compiled: Compiled, tmp_path: Path) -> None:
    """Known of the version in `package.json`. When this fails, the test above no longer needs its own file."""
    count = len(compiled.manifest.exits) - 1
    answers = in_node(binding, compiled.path / "model.onnx", feed(compiled, [None, [2.0] * count]), tmp_path)
    assert answers[0]["exit"].tolist() == answers[1]["exit"].tolist()
