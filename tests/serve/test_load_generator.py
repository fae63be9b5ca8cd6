"""The benchmark's load generator: it never waits for the server, and says how long rows waited."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from benchmarks.load_generator import Generator, Load, Seen, told

ROWS = {"x": np.arange(12, dtype=np.float32).reshape(4, 3)}
HELD = 20  # requests that the stand-in keeps before it answers the first


def answer(number: int, row: int) -> bytes:
    header = json.dumps({"id": number, "row": row, "exit": number % 2, "class": 0}).encode()
    return struct.pack("<I", len(header)) + header


async def against(load: dict[str, Any], refuse: int) -> tuple[Load, Seen, list[int]]:
    """A run against a server that answers nothing until `HELD` requests are there, and refuses every `refuse`-th."""
    held: list[tuple[Any, int, int]] = []
    seen: list[int] = []

    async def stream(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            (length,) = struct.unpack_from("<I", message.data)
            header = json.loads(message.data[4 : 4 + length])
            (spec,) = header["inputs"]
            tensor = np.frombuffer(message.data, spec["dtype"], offset=4 + length).reshape(spec["shape"])
            assert all(row.tolist() in ROWS["x"].tolist() for row in tensor)
            seen.append(header["id"])
            held.append((socket, header["id"], len(tensor)))
            if len(seen) >= HELD:
                for waiting, number, rows in held:
                    if number % refuse == 0:
                        error = json.dumps({"id": number, "error": {"kind": "busy", "message": "full"}}).encode()
                        await waiting.send_bytes(struct.pack("<I", len(error)) + error)
                        continue
                    for row in range(rows):
                        await waiting.send_bytes(answer(number, row))
                held.clear()
        return socket

    app = web.Application()
    app.router.add_get("/v1/models/m/stream", stream)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    given = Load(f"http://127.0.0.1:{runner.addresses[0][1]}", "m", **load)
    try:
        return given, await Generator(given, ROWS).run(), seen
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("batch", [1, 3])
def test_an_open_loop_does_not_wait_for_answers(batch: int) -> None:
    load, seen, got = asyncio.run(against({"rate": 100.0, "seconds": 0.8, "warm": 0.2, "batch": batch}, 7))
    assert len(got) == len(seen.due) > HELD  # all came, though the first had no answer before the twentieth was there
    assert not seen.left
    summary = told(load, seen)
    counted = [number for number, due in seen.due.items() if due >= load.warm]
    refused = sum(number % 7 == 0 for number in counted)
    assert summary["rows"] == len(counted) * batch
    assert (summary["answered"], summary["refused"]) == ((len(counted) - refused) * batch, refused * batch)
    assert summary["unanswered"] == 0
    assert {exit_: each["rows"] for exit_, each in summary["exits"].items()} == {
        str(e): sum(n % 2 == e for n in counted if n % 7) * batch for e in (0, 1)
    }
    # Latency counts from when a request was due: the first waited for the twentieth to come.
    waited = {number: at - seen.due[number] for number, _, at in seen.answers}
    assert waited[1] >= seen.due[HELD - 1] - seen.due[1] > 0


def test_a_closed_loop_keeps_as_many_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.load_generator.DRAIN", 0.2)
    given = {"rate": 1.0, "seconds": 0.4, "warm": 0.0}
    load, seen, got = asyncio.run(against({**given, "closed": HELD}, 10**6))
    assert len(got) > HELD  # the next is sent for each that is answered
    assert told(load, seen)["throughput"] > 0
    load, seen, got = asyncio.run(against({**given, "closed": HELD - 1}, 10**6))
    assert len(got) == HELD - 1  # and none else
    assert told(load, seen)["unanswered"] == HELD - 1


def test_the_same_seed_sends_the_same_at_the_same_times() -> None:
    runs = [asyncio.run(against({"rate": 80.0, "seconds": 0.5, "warm": 0.0, "seed": s}, 9))[1].due for s in (1, 1, 2)]
    times = [sorted(due.values()) for due in runs]
    assert times[0] == times[1] != times[2]
