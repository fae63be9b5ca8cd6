"""The published wheels, built once for all tests that install them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[1] / ".ci" / "wheels.py"


@pytest.fixture(scope="session", name="wheels")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder they are in."""
    out = tmp_path_factory.mktemp("wheels")
    subprocess.run([sys.executable, str(BUILD), str(out)], check=True)
    return out


def install(site: Path, wheels: Path, *names: str) -> None:
    """Into a folder, without what they depend on: no network is needed."""
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet", "--find-links", str(wheels))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(site), *names], check=True)
