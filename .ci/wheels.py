"""Builds what is published: a wheel for those who deploy, and one for each extra that brings packages of its own.

    python .ci/wheels.py dist

A checkout installs as one distribution that holds everything. As wheels, `offramp` is the runtime alone; the extras
that pyproject's `[tool.offramp.wheels]` names ask for the wheel with their packages, so that where nothing is compiled
or served nothing of compiler or server is installed. Needs setuptools, no network.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w

HOUSE = Path(__file__).resolve().parents[1]
BESIDE = ("README.md", "LICENSE", "compiler", "passes", "runtime")  # what a build reads next to pyproject.toml
Toml = dict[str, Any]


def projects(whole: Toml) -> Iterator[Toml]:
    """The checkout's pyproject.toml -> that of each wheel."""
    name, version = whole["project"]["name"], whole["project"]["version"]
    apart: dict[str, list[str]] = whole["tool"]["offramp"]["wheels"]
    extras: dict[str, list[str]] = whole["project"]["optional-dependencies"]
    for extra in apart:
        yield _part(
            whole, extra,
            name=f"{name}-{extra}",
            description=f"What {name}[{extra}] installs",
            readme={"text": f"Part of {name}: `pip install '{name}[{extra}]'`.", "content-type": "text/markdown"},
            dependencies=[f"{name}=={version}", *extras[extra]],
            scripts={},
            **{"optional-dependencies": {}},
        )  # fmt: skip
    asked = {extra: [f"{name}-{extra}=={version}"] for extra in apart}
    yield _part(whole, None, **{"optional-dependencies": extras | asked})


def _part(whole: Toml, extra: str | None, **changed: Any) -> Toml:
    """A project with the packages and commands of one extra, or with those of none."""
    apart: dict[str, list[str]] = whole["tool"]["offramp"]["wheels"]

    def belongs(module: str) -> bool:
        found = (e for e, packages in apart.items() if any(f"{module}.".startswith(f"{p}.") for p in packages))
        return next(found, None) == extra

    points = {
        group: {word: target for word, target in entries.items() if belongs(target.partition(":")[0])}
        for group, entries in whole["project"]["entry-points"].items()
    }
    setuptools = whole["tool"]["setuptools"]
    return {
        "build-system": whole["build-system"],
        "project": whole["project"] | {"entry-points": points} | changed,
        "tool": {"setuptools": setuptools | {"packages": [*filter(belongs, setuptools["packages"])]}},
    }


def build(project: Toml, out: Path) -> None:
    """Write one wheel, in a folder of its own so that nothing of an earlier build gets in."""
    with tempfile.TemporaryDirectory() as folder:
        for name in BESIDE:
            (Path(folder) / name).symlink_to(HOUSE / name)
        (Path(folder) / "pyproject.toml").write_text(tomli_w.dumps(project))
        options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
        subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", str(out), folder], check=True)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    for project in projects(tomllib.loads((HOUSE / "pyproject.toml").read_text())):
        build(project, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
