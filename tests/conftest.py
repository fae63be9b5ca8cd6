"""Shared by all rooms: `models` and `benchmarks` on the import path, one compiled artifact of a small network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import browser  # noqa: F401  # a fixture
from hypothesis import settings
from models import QUICK, Compiled

from benchmarks.wheels import build
from offramp.compiler import compile
from offramp.compiler.demo import Digits, train_digits
from offramp.passes import observed, verified

settings.register_profile("offramp", deadline=None)  # machines are shared: nothing fails for being slow
settings.load_profile("offramp")


@pytest.fixture(scope="session", autouse=True)
def _verify_after_every_pass() -> Iterator[None]:
    """As `--verify` does, in every test."""
    with observed(verified):
        yield


@pytest.fixture(scope="session")
def digits() -> Digits:
    """A residual network a few epochs old, and the 899 digits it has not seen."""
    return train_digits(0, lambda line: None, epochs=4)


@pytest.fixture(scope="session")
def compiled(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    out = tmp_path_factory.mktemp("compiled") / "artifact"
    manifest = compile(digits.model, digits.images, out, labels=digits.labels, options=QUICK)
    return Compiled(out, manifest, digits)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the published ones are in."""
    out = tmp_path_factory.mktemp("wheels")
    build(out)
    return out
