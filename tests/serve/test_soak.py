"""Many clients at once, most of them ill-behaved: the others notice nothing, memory is steady; and kills at random."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from soak_help import (
    MODEL,
    PATIENCE,
    Tally,
    behaved,
    garbling,
    hammering,
    leaving,
    resident,
    scanning,
    server,
    settled,
    stalling,
    stop,
    together,
)
from tiny import THRESHOLDS, doubtful, reference, write_tiny

from offramp.runtime.serve.record_reading import check_recording, read_recording

ROUNDS = 4
GROWTH = 32 << 20  # bytes the server may grow by once it is warm
KILLS = 4


def one_round(url: str, seed: int) -> list[Tally]:
    """All kinds of clients at the same time -> the tallies of the well-behaved."""
    good = [behaved(url, seed + n, 60) for n in range(3)]
    others = [
        leaving(url, seed + 10, 12), leaving(url, seed + 11, 12), garbling(url, seed + 12, 25),
        garbling(url, seed + 13, 25), stalling(url, seed + 14, 40), scanning(url, seed + 15, 25),
        hammering(url, seed + 16, 600),
    ]  # fmt: skip
    return asyncio.run(together([*good, *others]))[: len(good)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_soak(tmp_path: Path) -> None:
    artifact = write_tiny(tmp_path / "tiny.offramp").path
    said = tmp_path / "said.txt"
    with server(artifact, said, "--workers", "2", "--threads", "1") as (process, url):
        sizes = []
        for index in range(ROUNDS):
            for tally in one_round(url, 1_000 * index):
                assert tally.answered > 0
            metrics = asyncio.run(settled(url))
            assert f'offramp_rows_failed_total{{model="{MODEL}"}} 0.0' in metrics
            sizes.append(resident(process.pid))
        assert sizes[-1] - sizes[1] < GROWTH, sizes
        assert process.poll() is None
        assert stop(process) == 0
    assert "Traceback" not in said.read_text()


def test_kills_leave_the_record_whole(tmp_path: Path) -> None:
    artifact = write_tiny(tmp_path / "tiny.offramp").path
    record, said, draw = tmp_path / "record", tmp_path / "said.txt", random.Random(5)
    options = ("--record", str(record), "--record-rate", "1", "--record-limit", "2MiB", "--workers", "1")
    kept = 0
    for index in range(KILLS):
        with server(artifact, said, *options) as (process, url):
            asyncio.run(until_killed(process, url, index, draw.uniform(0.05, 0.6)))
        kept = check_recording(record)
    assert kept > 0
    check_rows(record)
    with server(artifact, said, *options) as (process, url):
        assert asyncio.run(behaved(url, 99, 20)).answered > 0
        assert stop(process) == 0
    assert check_recording(record) > kept
    assert "Traceback" not in said.read_text()


async def until_killed(process: subprocess.Popen[str], url: str, seed: int, seconds: float) -> None:
    """Clients at work, and after a while the server is killed: they may notice nothing else."""

    async def work(client: int) -> None:
        try:
            while True:
                await behaved(url, seed * 100 + client, 40)
        except (aiohttp.ClientError, ConnectionError, AssertionError):
            if process.poll() is None and not killed.is_set():
                raise

    killed = asyncio.Event()
    clients = [asyncio.create_task(work(client)) for client in range(3)]
    await asyncio.sleep(seconds)
    killed.set()
    process.kill()
    process.wait(PATIENCE)
    for client in clients:
        await asyncio.wait_for(client, PATIENCE)


def check_rows(record: Path) -> None:
    """Every recorded row is one that was asked, answered as the program answers it."""
    for group in read_recording(record, MODEL):
        expected, exits = reference(group.inputs, THRESHOLDS)
        final, _ = reference(group.inputs, (np.inf, np.inf))
        sure = ~doubtful(group.inputs, THRESHOLDS)
        assert sure.any()
        assert np.array_equal(group.exits[sure], exits[sure])
        assert np.allclose(group.early[sure], expected[sure], atol=1e-4)
        assert np.allclose(group.final, final, atol=1e-4)
