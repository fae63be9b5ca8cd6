"""What is published: whoever deploys gets the runtime alone, and the extras bring the rest."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from collections import Counter
from importlib.metadata import Distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from benchmarks.wheels import install, needs

HOUSE = Path(__file__).parents[1]
PROJECT = tomllib.loads((HOUSE / "pyproject.toml").read_text())
LIMIT = 1_000_000  # bytes that offramp[cpu] may install beside numpy and onnxruntime


def contents(wheels: Path) -> dict[str, set[str]]:
    """The files of each wheel, but for those about itself."""
    return {
        path.name.partition("-")[0]: {name for name in ZipFile(path).namelist() if ".dist-info/" not in name}
        for path in wheels.iterdir()
    }


def installed(site: Path) -> dict[str, Distribution]:
    return {found.name: found for found in importlib.metadata.distributions(path=[str(site)])}


def test_every_file_is_in_one_wheel(wheels: Path) -> None:
    held = contents(wheels)
    assert set(held) == {"offramp", "offramp_compile", "offramp_serve"}
    kinds = {".py", ".j2", ".html"}
    rooms = ("compiler", "passes", "runtime")
    here = [
        path for room in rooms for path in (HOUSE / room).rglob("*") if path.suffix in kinds or path.name == "py.typed"
    ]
    assert Counter(name for names in held.values() for name in names) == Counter(
        f"offramp/{path.relative_to(HOUSE).as_posix()}" for path in here
    )
    assert {Path(name).parts[1] for name in held["offramp"]} == {"runtime"}
    assert {Path(name).parts[1] for name in held["offramp_compile"]} == {"compiler", "passes"}
    assert all(name.startswith("offramp/runtime/serve/") for name in held["offramp_serve"])


def test_what_a_deployment_installs_is_small(wheels: Path, tmp_path: Path) -> None:
    """With the bytecode that pip makes, and nothing of others but onnxruntime and numpy."""
    install(tmp_path, wheels, "offramp")
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert any(tmp_path.rglob("*.pyc"))
    assert size < LIMIT
    assert {need.name for need in needs(installed(tmp_path)["offramp"], "cpu")} == {"numpy", "onnxruntime"}


def test_the_extras_ask_for_their_wheel_of_the_same_version(wheels: Path, tmp_path: Path) -> None:
    install(tmp_path, wheels, "offramp", "offramp-compile", "offramp-serve")
    found = installed(tmp_path)
    version = PROJECT["project"]["version"]
    assert {distribution.version for distribution in found.values()} == {version}
    for extra in ("compile", "serve"):
        asked = needs(found["offramp"], extra) - needs(found["offramp"], "")
        assert {str(need).partition(";")[0] for need in asked} == {f"offramp-{extra}=={version}"}
        listed = [f"offramp=={version}", *PROJECT["project"]["optional-dependencies"][extra]]
        assert needs(found[f"offramp-{extra}"], "") == {Requirement(need) for need in listed}


@pytest.mark.parametrize(("extra", "command"), [("compile", "candidates"), ("serve", "serve")])
def test_commands_come_with_their_wheel(extra: str, command: str, wheels: Path, tmp_path: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        """With this environment's libraries; the wheels come before its own offramp."""
        words = [sys.executable, "-m", "offramp.runtime", command, "--help"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    install(tmp_path, wheels, "offramp")
    done = run()
    assert done.returncode == 2
    assert f"offramp {command} is not in this installation; run pip install 'offramp[{extra}]'" in done.stderr
    install(tmp_path, wheels, f"offramp-{extra}")
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: offramp {command}")
