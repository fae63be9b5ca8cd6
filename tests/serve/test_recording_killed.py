"""A recording whose process is killed at random moments: no row damaged or lost, and on it goes."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from recording_help import sample, size_of

from offramp.runtime.serve.record_reading import check_recording, read_recording
from offramp.runtime.serve.record_store import FILE, SMALLEST, Store

HERE = Path(__file__).parent
KILLS = 7


def killed_after(seconds: float, folder: Path, start: int, floats: int) -> int:
    """Let a process record for so long after its first row, kill it -> the rows it had said are recorded."""
    command = [sys.executable, "recording_help.py", str(folder), str(start), str(floats)]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = int(process.stdout.readline())
        time.sleep(seconds)
        process.kill()
        for line in process.stdout:
            told = int(line)
    return told


@pytest.mark.parametrize("floats", [50, 6_000])
def test_kill_at_random_moments(tmp_path: Path, floats: int) -> None:
    draw = random.Random(floats)
    start = 0
    for _ in range(KILLS):
        told = killed_after(draw.uniform(0, 0.1), tmp_path, start, floats)
        assert size_of(tmp_path) <= 2 * SMALLEST
        assert check_recording(tmp_path) > 0
        numbers = read_recording(tmp_path, "tiny")[0].inputs["n"][:, 0]
        assert (np.diff(numbers) > 0).all()
        # All that were said to be recorded are there, but for those that made room.
        ours = numbers[numbers >= start].tolist()
        last = start + told - 1
        assert ours[-1] >= last
        assert ours == list(range(ours[0], ours[-1] + 1))
        assert ours[0] == start or numbers[0] == ours[0]
        start = ours[-1] + 1
    for inputs, number in zip(read_recording(tmp_path, "tiny")[0].inputs["x"], numbers, strict=True):
        assert np.array_equal(inputs, sample(int(number), floats=floats).inputs["x"])


def test_killed_before_the_first_row(tmp_path: Path) -> None:
    """Every file that a kill can leave of a store that is being made is taken up."""
    draw = random.Random(3)
    program = (
        "import sys; from pathlib import Path; from offramp.runtime.serve.record_store import Store, SMALLEST\n"
        "print(flush=True); Store(Path(sys.argv[1]), SMALLEST); sys.stdin.read()"
    )
    for index in range(6):
        folder = tmp_path / str(index)
        command = [sys.executable, "-c", program, str(folder)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.uniform(0, 0.01))
            process.kill()
        Store(folder, SMALLEST).close()
        assert check_recording(folder) == 0


@pytest.mark.parametrize("step", ["empty file", "header alone"])
def test_a_store_half_made_is_made(tmp_path: Path, step: str) -> None:
    (tmp_path / FILE).touch()
    if step == "header alone":
        database = sqlite3.connect(tmp_path / FILE)
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        database.execute("PRAGMA journal_mode = WAL")
        database.close()
        assert (tmp_path / FILE).stat().st_size > 0
    Store(tmp_path, SMALLEST).close()
    assert check_recording(tmp_path) == 0
    database = sqlite3.connect(tmp_path / FILE)
    assert database.execute("PRAGMA auto_vacuum").fetchone() == (2,)
    database.close()
