"""Samples for the recording's tests, and a process that records until it is killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from offramp.runtime.serve.record_reading import read_recording
from offramp.runtime.serve.record_store import SMALLEST
from offramp.runtime.serve.recording import Recording
from offramp.runtime.serve.work import Sample

PATIENCE = 60.0  # seconds after which a test gives up waiting


def sample(number: int, model: str = "tiny", floats: int = 6, classes: int = 5, digest: str = "d0") -> Sample:
    """The same for the same number; its first input says which it is."""
    rng = np.random.default_rng([11, number])
    inputs = {"x": rng.standard_normal(floats).astype(np.float32), "n": np.array([number], np.int64)}
    early, final = (rng.dirichlet(np.ones(classes)).astype(np.float32) for _ in range(2))
    return Sample(model, digest, inputs, number % 3, early, final, 1e9 + number / 3)


def record_all(recording: Recording, samples: list[Sample]) -> None:
    """Record each, waiting for the writer before its queue is full, so that none is dropped."""
    deadline = time.monotonic() + PATIENCE
    before = recording.counts().recorded
    for index, one in enumerate(samples):
        while index - (recording.counts().recorded - before) >= 200:
            assert time.monotonic() < deadline, "the writer stands still"
            time.sleep(0.001)
        recording.record(one)
    while recording.counts().recorded - before < len(samples):
        assert time.monotonic() < deadline, f"{recording.counts()} of {len(samples)}"
        time.sleep(0.001)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # SQLite has removed it since
            continue
    return total


def recording(folder: Path, limit: int = 4 * SMALLEST, rate: float = 1.0, seed: int = 0, queue: int = 256) -> Recording:
    return Recording(folder, rate=rate, seed=seed, limit=limit, queue=queue)


def numbers(folder: Path, model: str = "tiny") -> list[int]:
    """Which samples a folder holds, oldest first."""
    (group,) = read_recording(folder, model)
    return [int(number) for number in group.inputs["n"][:, 0]]


def main() -> None:
    """FOLDER START FLOATS: record samples START, START + 1, ... and say how many are recorded, until killed."""
    folder, start, floats = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    recording = Recording(folder, rate=1.0, seed=0, limit=2 * SMALLEST, queue=8)
    number, told = start, 0
    while True:
        recorded = recording.counts().recorded
        if recorded > told:
            print(recorded, flush=True)
            told = recorded
        if number - start - recorded < 8:
            recording.record(sample(number, floats=floats))
            number += 1


if __name__ == "__main__":
    main()
