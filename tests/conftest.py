"""Shared by all rooms: `models` and `benchmarks` on the import path, one compiled artifact of a small network."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from offramp.compiler import Options, Training, compile
from offramp.compiler.demo import Digits, train_digits
from offramp.runtime import Manifest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are no part of the package

QUICK = Options(tolerance=0.02, policy="joint", training=Training(epochs=3), batches=())


@dataclass(frozen=True)
class Compiled:
    """An artifact and what it was made from."""

    path: Path
    manifest: Manifest
    digits: Digits


@pytest.fixture(scope="session")
def digits() -> Digits:
    """A residual network a few epochs old, and the 899 digits it has not seen."""
    return train_digits(0, lambda line: None, epochs=4)


@pytest.fixture(scope="session")
def compiled(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    out = tmp_path_factory.mktemp("compiled") / "artifact"
    manifest = compile(digits.model, digits.images, out, labels=digits.labels, options=QUICK)
    return Compiled(out, manifest, digits)
