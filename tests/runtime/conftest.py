"""One tiny artifact for all tests that only read it, and a private copy for those that break it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny import Tiny, write_tiny

import offramp.runtime


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "artifact")


@pytest.fixture
def broken(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the artifact's directory, to be damaged."""
    return Path(shutil.copytree(tiny.path, tmp_path / "broken"))


@pytest.fixture
def environment() -> dict[str, str]:
    """For a process of its own that finds the same offramp as this one."""
    return {**os.environ, "PYTHONPATH": str(Path(offramp.runtime.__file__).parents[2])}
