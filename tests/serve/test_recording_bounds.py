"""The recording stays within its limit, and stops where the disk is full."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recording_help import PATIENCE, numbers, record_all, recording, sample, size_of

from offramp.runtime.serve.record_format import pack
from offramp.runtime.serve.record_reading import (
    check_recording,
)
from offramp.runtime.serve.record_store import FILE, SMALLEST, Store
from offramp.runtime.serve.recording import Recording


@pytest.mark.parametrize("floats", [1, 900, 1100, 8_000])
def test_the_oldest_go_first_and_the_files_stay_within_the_limit(tmp_path: Path, floats: int) -> None:
    limit = SMALLEST
    written = 2 * limit // (floats * 4 + 150)  # twice what fits
    kept = recording(tmp_path, limit=limit)
    largest = 0
    for start in range(0, written, 150):
        record_all(kept, [sample(n, floats=floats) for n in range(start, min(written, start + 150))])
        largest = max(largest, size_of(tmp_path))
    kept.close()
    left = numbers(tmp_path)
    assert left == list(range(written - len(left), written))
    assert limit // 2 < max(largest, size_of(tmp_path)) <= limit
    assert check_recording(tmp_path) == len(left)


@settings(max_examples=8)
@given(st.lists(st.integers(1, 12_000), min_size=20, max_size=120), st.integers(0, 1_000))
def test_rows_of_any_sizes_stay_within_the_limit(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), SMALLEST)
        fitting = [min(size, store.transaction_bytes // 4 - 100) for size in sizes]
        added = 0
        while added < len(fitting):
            together = int(rng.integers(1, 9))
            rows = [pack(sample(added + n, floats=size)) for n, size in enumerate(fitting[added : added + together])]
            while sum(row.size for row in rows) > store.transaction_bytes:
                rows.pop()
            assert store.add(rows)
            added += len(rows)
            assert size_of(Path(folder)) <= SMALLEST
        store.close()
        assert size_of(Path(folder)) <= SMALLEST
        assert check_recording(Path(folder)) >= 1


def test_a_store_opened_with_a_smaller_limit_is_cut_down(tmp_path: Path) -> None:
    kept = recording(tmp_path, limit=8 * SMALLEST)
    record_all(kept, [sample(n, floats=4_000) for n in range(400)])
    kept.close()
    assert size_of(tmp_path) > 5 * SMALLEST
    again = recording(tmp_path, limit=SMALLEST)
    assert size_of(tmp_path) <= SMALLEST
    record_all(again, [sample(400, floats=4_000)])
    again.close()
    left = numbers(tmp_path)
    assert left == list(range(401 - len(left), 401))
    assert len(left) > 20


def test_a_reader_in_the_middle_does_not_make_it_grow(tmp_path: Path) -> None:
    kept = recording(tmp_path, limit=SMALLEST)
    record_all(kept, [sample(n, floats=1_000) for n in range(20)])
    reader = sqlite3.connect(tmp_path / FILE)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM rows").fetchone() == (20,)
    for number in range(20, 600):
        kept.record(sample(number, floats=1_000))
        assert size_of(tmp_path) <= SMALLEST
        if number % 50 == 0:
            settled(kept, number + 1)
    settled(kept, 600)
    assert kept.counts().dropped > 0
    reader.close()
    before = kept.counts().recorded
    record_all(kept, [sample(600)])
    assert kept.counts().recorded == before + 1  # goes on once the reader is gone
    kept.close()


def settled(kept: Recording, rows: int) -> None:
    """Wait until all of so many rows were recorded or dropped."""
    deadline = time.monotonic() + PATIENCE
    while sum(vars(kept.counts()).values()) < rows:
        assert time.monotonic() < deadline, kept.counts()
        time.sleep(0.001)


FULL = """
import resource, signal, sys
from pathlib import Path
from recording_help import sample, size_of
from offramp.runtime.serve.recording import Recording
import logging, time
logging.basicConfig(stream=sys.stdout, format="%(name)s %(message)s")
kept = Recording(Path(sys.argv[1]), rate=1.0, seed=0, limit=8 << 20)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for number in range(500):
    kept.record(sample(number, floats=2000))
    while sum(vars(kept.counts()).values()) <= number:
        time.sleep(0.001)
print(kept.chosen("tiny", 3).tolist(), vars(kept.counts()))
kept.close()
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on file sizes here")
def test_a_full_disk_stops_the_recording_with_one_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], check=False, cwd=Path(__file__).parent, text=True,
        capture_output=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    warning, last = done.stdout.splitlines()
    assert warning.startswith("offramp.runtime.serve.recording ")
    assert "recording stops, serving goes on" in warning
    assert last.startswith("[True, True, True]")
    kept = check_recording(tmp_path)
    assert 0 < kept < 100
    assert f"'recorded': {kept}, 'dropped': {500 - kept}" in last
    again = recording(tmp_path)  # there is room again
    record_all(again, [sample(1_000, floats=2000)])
    again.close()
    assert numbers(tmp_path) == [*range(kept), 1_000]


def test_a_store_held_by_another_process_drops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.runtime.serve.record_store._BUSY_SECONDS", 0.05)
    kept = recording(tmp_path)
    record_all(kept, [sample(0)])
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    kept.record(sample(1))
    settled(kept, 2)
    assert vars(kept.counts()) == {"recorded": 1, "dropped": 1}
    other.execute("ROLLBACK")
    other.close()
    record_all(kept, [sample(2)])
    kept.close()
    assert numbers(tmp_path) == [0, 2]


def test_two_recordings_share_a_folder_and_its_limit(tmp_path: Path) -> None:
    both = [recording(tmp_path, limit=SMALLEST) for _ in range(2)]

    def work(kept: Recording, start: int) -> None:
        for number in range(300):
            kept.record(sample(start + number, floats=1_000))
            settled(kept, number + 1)

    threads = [threading.Thread(target=work, args=given) for given in zip(both, (0, 1_000), strict=True)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert size_of(tmp_path) <= SMALLEST
        check_recording(tmp_path)  # readers come and go meanwhile
    for one in both:
        one.close()
        assert sum(vars(one.counts()).values()) == 300
    assert size_of(tmp_path) <= SMALLEST
    assert check_recording(tmp_path) > 20
