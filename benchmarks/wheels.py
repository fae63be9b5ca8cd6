"""The published wheels, for what measures or tests an installation of them."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement

_BUILD = Path(__file__).parents[1] / ".ci" / "wheels.py"


def build(out: Path) -> None:
    """All of them, as `make wheels` does."""
    subprocess.run([sys.executable, str(_BUILD), str(out)], check=True)


def install(site: Path, wheels: Path, *names: str) -> None:
    """Into a folder, without what they depend on: no network is needed."""
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet", "--find-links", str(wheels))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(site), *names], check=True)


def needs(distribution: Distribution, extra: str) -> set[Requirement]:
    """What it asks for with an extra, or with none, ""."""
    asked = map(Requirement, distribution.requires or [])
    return {need for need in asked if need.marker is None or need.marker.evaluate({"extra": extra})}
