"""What the runtime needs from its surroundings: numpy, onnxruntime, and a clear word if they are missing."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Compiled
from tiny import Tiny, batch, reference

import offramp.runtime
from benchmarks.wheels import install
from offramp.runtime import InputError, ProviderError, load
from offramp.runtime.engine import EngineSession


def python(code: str, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_public_names_are_all() -> None:
    public = {
        name
        for name, value in vars(offramp.runtime).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public - {"annotations"} == set(offramp.runtime.__all__)
    assert sorted(offramp.runtime.__all__) == list(offramp.runtime.__all__)


IMPORTS = """
import sys
import offramp.runtime
assert "onnxruntime" not in sys.modules, "onnxruntime is imported before it is needed"
import numpy as np
from offramp.runtime.cli import main
assert main(["inspect", sys.argv[1]]) == 0
with offramp.runtime.load(sys.argv[1], threads=1) as session:
    session.run({"x": np.zeros((4, 6), np.float32), "side": np.zeros((4, 3), np.float32)})
rooms = ("torch", "onnx", "onnxscript", "networkx", "nni", "scipy", "offramp.compiler", "offramp.passes")
print("loaded:", *[name for name in rooms if name in sys.modules])
"""


def test_the_runtime_imports_nothing_of_training(tiny: Tiny, environment: dict[str, str]) -> None:
    done = python(IMPORTS, environment, str(tiny.path))
    assert done.stderr == ""
    assert done.stdout.endswith("loaded:\n")


MISSING = """
import sys
sys.modules["onnxruntime"] = None
from offramp.runtime import ProviderError, load, open_artifact
assert open_artifact(sys.argv[1]).manifest.classes == 5
try:
    load(sys.argv[1])
except ProviderError as error:
    print(error)
from offramp.runtime.cli import main
sys.exit(main(["run", sys.argv[1], "--data", "d.npy", "-o", "a.npz"]))
"""


def test_without_onnxruntime_the_message_says_what_to_install(tiny: Tiny, environment: dict[str, str]) -> None:
    done = python(MISSING, environment, str(tiny.path))
    assert done.returncode == 2
    for text in (done.stdout, done.stderr):
        assert "pip install 'offramp[cpu]', or 'offramp[gpu]'" in text
        assert text.count("\n") == 1


BARE = """
import importlib.util, sys
import numpy as np
from offramp.runtime import load
strangers = ("torch", "onnx", "networkx", "nni", "tqdm", "PIL", "offramp.compiler", "pytest")
for name in strangers:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    assert found is None, name
with np.load(sys.argv[2]) as data, load(sys.argv[1]) as session:
    answers = session.run(dict(data))
    assert (session.run_all(dict(data)).probabilities.shape) == (3, 50, 5)
print(*answers.exits)
"""


def test_numpy_and_onnxruntime_are_enough(tiny: Tiny, compiled: Compiled, wheels: Path, tmp_path: Path) -> None:
    """A virtual environment of its own, with the packages of this one linked and what `offramp[cpu]` installs."""
    venv.create(tmp_path / "env", symlinks=True, with_pip=False)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    for distribution in ("numpy", "onnxruntime"):
        files = importlib.metadata.files(distribution)
        assert files is not None
        for name in {file.parts[0] for file in files if file.parts[0] != ".."}:
            (site / name).symlink_to(Path(str(importlib.metadata.distribution(distribution).locate_file(name))))
    install(site, wheels, "offramp")
    arrays: dict[str, Any] = {**batch(50)}
    np.savez(tmp_path / "data.npz", **arrays)
    interpreter = str(tmp_path / "env" / "bin" / "python")
    words = [str(tiny.path), str(tmp_path / "data.npz")]

    def bare(*command: str) -> str:
        done = subprocess.run(
            [interpreter, *command], env={}, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert [int(exit) for exit in bare("-c", BARE, *words).split()] == reference(batch(50), (0.55, 0.5))[1].tolist()
    out = str(tmp_path / "answers.npz")
    assert "50 rows" in bare("-m", "offramp.runtime", "run", words[0], "--data", words[1], "-o", out)
    tuned = str(tmp_path / "tuned")
    assert "tuned artifact" in bare("-m", "offramp.runtime", "tune", str(compiled.path), "-o", tuned, "--threads", "1")


def test_unknown_providers_are_refused_with_those_there(tiny: Tiny) -> None:
    for providers in (["TPUExecutionProvider"], ["CPUExecutionProvider", "cuda"], "TPUExecutionProvider", []):
        with pytest.raises(ProviderError, match=r"available here: .*CPUExecutionProvider"):
            load(tiny.path, providers=providers)
    with load(tiny.path, providers=["CPUExecutionProvider"], threads=1) as session:
        assert session.run(batch(3)).exits.shape == (3,)


def test_a_provider_that_cannot_start_is_refused_if_asked_for(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fallen:
        """ONNX Runtime without the CUDA libraries: it warns and goes on with the CPU."""

        def __init__(self, session: Any) -> None:
            self.session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self.session, name)

    import onnxruntime

    inference = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda model, options, providers, **_: Fallen(inference(model, options, providers=["CPUExecutionProvider"])),
    )
    with pytest.raises(ProviderError, match=r"could not start .*works with CPUExecutionProvider"):
        load(tiny.path, providers=["CUDAExecutionProvider"])


def test_what_onnxruntime_refuses_in_a_run_names_the_stage(tiny: Tiny) -> None:
    engine = EngineSession(tiny.files["stages/0.onnx"], "artifact/stages/0.onnx", ["CPUExecutionProvider"], 1, True)
    with pytest.raises(InputError, match=r"artifact/stages/0\.onnx: onnxruntime failed on this batch") as caught:
        engine.run(["probabilities"], {"x": np.zeros((2, 7), np.float32)})
    assert "\n" not in str(caught.value)
