"""One stage from an artifact's file into memory, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..artifact import EXTERNAL, Artifact
from ..engine import EngineSession, choose_providers, start_sessions
from ..execution import Stage, stage_of
from ..process import CPU, check_threads
from .memory import in_use, measurable


@dataclass(frozen=True)
class Loaded:
    """A stage that is in memory, and what that took."""

    stage: Stage
    bytes: int
    seconds: float


Load = Callable[[Artifact, int], Loaded]


class Loader:
    """Loads stages, one at a time."""

    def __init__(self, threads: int | None, providers: Sequence[str] | None) -> None:
        """As for `load`. Raises `UsageError` and `ProviderError` as it does."""
        check_threads(threads)
        self._threads = threads
        self._strict = providers is not None
        self._providers = choose_providers(providers)
        self._warm = False

    def __call__(self, artifact: Artifact, index: int) -> Loaded:
        """Raises `ArtifactError` where the file is not what the manifest says, and what `EngineSession` raises."""
        if not self._warm:
            # What all sessions of a process share comes with the first: 1.7 MiB, more than many a stage.
            self._session(artifact, index)
            self._warm = True
        before = in_use()
        start = time.perf_counter()
        session = self._session(artifact, index)
        stage = stage_of(artifact.manifest, index, session)
        seconds = time.perf_counter() - start
        told = measurable() and session.providers[0] == CPU
        return Loaded(stage, in_use() - before if told else stage_bytes(artifact, index), seconds)

    def _session(self, artifact: Artifact, index: int) -> EngineSession:
        file = artifact.manifest.stages[index].file
        model = (f"{artifact.path}/{file}", artifact.model(file))
        [session] = start_sessions([model], self._providers, self._threads, self._strict)
        self._providers = session.providers  # one that did not start is not tried for every stage
        return session


def stage_bytes(artifact: Artifact, index: int) -> int:
    """The size of a stage's file and of the weights beside it."""
    file = artifact.manifest.stages[index].file
    return sum(spec.size for name, spec in artifact.manifest.files.items() if name in (file, file + EXTERNAL))
