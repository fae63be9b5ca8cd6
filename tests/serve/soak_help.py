"""A server in a process of its own, and clients for it: those that behave and check every answer, and the others.

Clients are coroutines; each draws what it does from a seed and ends after a number of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from tiny import CLASSES, THRESHOLDS, batch, doubtful, reference

PATIENCE = 60.0  # seconds after which a client gives up waiting for what must come
SERVING = "serving at "
MODEL = "tiny"
Frame = tuple[dict[str, Any], np.ndarray | None]  # the message's JSON, probabilities [K] where it has any


@dataclass
class Tally:
    """Rows of one client."""

    answered: int = 0
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # answers to what could not be taken, by kind


@contextlib.contextmanager
def server(artifact: Path, said: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`offramp serve` on a free port -> its process and URL; killed at the end if need be. stderr is in `said`."""
    command = [sys.executable, "-m", "offramp.runtime", "serve", f"{MODEL}={artifact}", "--port", "0", *options]
    with (
        said.open("a") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith(SERVING)), None)
            assert line is not None, said.read_text()
            yield process, line.removeprefix(SERVING).strip()
        finally:
            process.kill()


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) << 10


def binary(number: int, rows: dict[str, np.ndarray], **more: Any) -> bytes:
    """A batch as one binary message."""
    inputs = [{"name": name, "dtype": array.dtype.name, "shape": list(array.shape)} for name, array in rows.items()]
    header = json.dumps({"id": number, "inputs": inputs, **more}).encode()
    return b"".join([struct.pack("<I", len(header)), header, *(array.tobytes() for array in rows.values())])


def text(number: int, rows: dict[str, np.ndarray], **more: Any) -> str:
    """The same as text."""
    return json.dumps({"id": number, "inputs": {name: array.tolist() for name, array in rows.items()}, **more})


def opened(message: aiohttp.WSMessage) -> Frame:
    """An answer of either kind."""
    if message.type == aiohttp.WSMsgType.TEXT:
        header = json.loads(message.data)
        given = header.get("probabilities")
        return header, None if given is None else np.array(given, np.float32)
    assert message.type == aiohttp.WSMsgType.BINARY, message
    (length,) = struct.unpack_from("<I", message.data)
    header = json.loads(message.data[4 : 4 + length])
    return header, np.frombuffer(message.data, "<f4", offset=4 + length) if "outputs" in header else None


async def received(socket: aiohttp.ClientWebSocketResponse) -> Frame:
    """The next answer."""
    return opened(await socket.receive(PATIENCE))


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]]:
    """A session and its socket."""
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/v1/models/{MODEL}/stream") as socket:
        yield session, socket


async def behaved(url: str, seed: int, requests: int, under_way: int = 4) -> Tally:
    """Batches of 1 to 9 rows in both kinds, some under way at once; every row answered once, and rightly."""
    draw, tally = random.Random(seed), Tally()
    left: dict[int, tuple[dict[str, np.ndarray], set[int]]] = {}
    async with connected(url) as (_, socket):
        for number in range(requests):
            rows = batch(draw.randint(1, 9), seed * 10_000 + number)
            left[number] = rows, set(range(len(rows["x"])))
            if draw.random() < 0.5:
                await socket.send_bytes(binary(number, rows))
            else:
                await socket.send_str(text(number, rows))
            while len(left) >= (under_way if number + 1 < requests else 1):
                settle(left, tally, *await received(socket))
        await socket.send_bytes(binary(requests, batch(1)))
        header, _ = await received(socket)
        assert header["id"] == requests, f"something came twice: {header}"
    return tally


def settle(
    left: dict[int, tuple[dict[str, np.ndarray], set[int]]],
    tally: Tally,
    header: dict[str, Any],
    probabilities: np.ndarray | None,
) -> None:
    """Check one answer against the rows that wait for theirs."""
    number = header["id"]
    assert number in left, f"answered already, or never asked: {header}"
    rows, waiting = left[number]
    error = header.get("error")
    if error is not None:
        assert error["kind"] == "busy", header
        assert "row" not in header, header
        assert len(waiting) == len(rows["x"]), f"refused after rows of it were answered: {header}"
        tally.refused += len(waiting)
        waiting.clear()
    else:
        assert header["row"] in waiting, f"answered twice: {header}"
        waiting.remove(header["row"])
        assert probabilities is not None
        check({name: array[[header["row"]]] for name, array in rows.items()}, header, probabilities)
        tally.answered += 1
    if not waiting:
        del left[number]


def check(row: dict[str, np.ndarray], header: dict[str, Any], probabilities: np.ndarray) -> None:
    """One row's answer against the same program in numpy."""
    assert probabilities.shape == (CLASSES,)
    assert header["class"] == probabilities.argmax()
    assert not header["short"]
    if doubtful(row, THRESHOLDS)[0]:
        return
    expected, exits = reference(row, THRESHOLDS)
    assert header["exit"] == exits[0], header
    assert np.allclose(probabilities, expected[0], atol=1e-4), header


async def hammering(url: str, seed: int, requests: int) -> Tally:
    """One row at a time, as fast as the socket takes them, never waiting for an answer before the next."""
    tally = Tally()
    rows = batch(requests, seed)
    async with connected(url) as (_, socket):

        async def send() -> None:
            for number in range(requests):
                await socket.send_bytes(binary(number, {name: array[[number]] for name, array in rows.items()}))

        sending = asyncio.create_task(send())
        left = set(range(requests))
        while left:
            header, probabilities = await received(socket)
            left.remove(header["id"])
            if probabilities is None:
                assert header["error"]["kind"] == "busy", header
                tally.refused += 1
            else:
                check({name: array[[header["id"]]] for name, array in rows.items()}, header, probabilities)
                tally.answered += 1
        await sending
    return tally


async def leaving(url: str, seed: int, requests: int) -> Tally:
    """Goes away while rows of its are under way, with a goodbye or without."""
    draw, tally = random.Random(seed), Tally()
    for number in range(requests):
        async with aiohttp.ClientSession() as session:
            socket = await session.ws_connect(f"{url}/v1/models/{MODEL}/stream")
            for index in range(draw.randint(1, 4)):
                await socket.send_bytes(binary(index, batch(draw.randint(1, 60), seed + number)))
            if draw.random() < 0.5:
                await received(socket)
                tally.answered += 1
            if draw.random() < 0.5:
                await socket.close()
            else:
                assert session.connector is not None
                await session.connector.close()  # the connection is cut, the socket not closed
    return tally


def rubbish(draw: random.Random) -> list[str | bytes]:
    """Messages no server can take."""
    good, one = binary(1, batch(2)), batch(2)
    header = good[4 : 4 + struct.unpack_from("<I", good)[0]]
    return [
        "", "{", "[]", "null", '{"id": 1}', '{"id": {}, "inputs": {}}', "[" * 5_000, '{"inputs": ' * 3_000,
        '{"id": 1, "inputs": {"x": [[1]], "side": [[1]]}}', '{"id": 1, "inputs": {"x": "text", "side": 3}}',
        text(1, one, tolerance="much"), text(1, one, deadline_ms=[]), text(1, one, tolerance=7), text(1, one, odd=1),
        text(1, {"x": np.full((1, 6), np.nan, np.float32), "side": one["side"][:1]}),
        b"", b"\x01", struct.pack("<I", 0xFFFFFFFF), struct.pack("<I", 0xFFFFFFFF) + good[4:], good[:-1], good + b"\0",
        good[: 4 + len(header)], good[: len(header) // 2], struct.pack("<I", 2) + b"[]",
        binary(1, {"x": one["x"]}), binary(1, {**one, "other": one["x"]}), binary(1, {**one, "side": one["x"]}),
        binary(1, {"x": one["x"].astype(np.float64), "side": one["side"]}),
        binary(1, {"x": one["x"][:1], "side": one["side"]}), good.replace(b"[2, 6]", b"[9, 6]"),
        good.replace(b"[2, 6]", b"[-2,6]"), good.replace(b"float32", b"object_"), draw.randbytes(draw.randint(5, 400)),
    ]  # fmt: skip


async def garbling(url: str, seed: int, requests: int) -> Tally:
    """Sends rubbish; each message costs an error or the connection, and on one that stands a batch is answered."""
    draw, tally = random.Random(seed), Tally()
    for _ in range(requests):
        async with connected(url) as (_, socket):
            wrong = draw.choice(rubbish(draw))
            await (socket.send_str(wrong) if isinstance(wrong, str) else socket.send_bytes(wrong))
            message = await socket.receive(PATIENCE)
            if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING):
                tally.errors["closed"] += 1
                continue
            header, probabilities = opened(message)
            assert probabilities is None, f"{wrong!r:.100} was answered: {header}"
            assert header["error"]["message"], header
            assert header["error"]["kind"] == "input", f"{wrong!r:.100}: {header}"
            tally.errors[header["error"]["kind"]] += 1
            row = batch(1, seed)
            await socket.send_bytes(binary(7, row))
            header, probabilities = await received(socket)
            if probabilities is not None:
                check(row, header, probabilities)
                tally.answered += 1
    return tally


async def stalling(url: str, seed: int, requests: int) -> Tally:
    """Sends batches and reads nothing, until the server takes no more or the requests are sent."""
    tally = Tally()
    async with connected(url) as (session, socket):
        rows = batch(200, seed)
        with contextlib.suppress(TimeoutError, ConnectionError, aiohttp.ClientError):
            for number in range(requests):
                await asyncio.wait_for(socket.send_bytes(binary(number, rows)), 2)
        assert session.connector is not None
        await session.connector.close()
    return tally


async def scanning(url: str, seed: int, requests: int) -> Tally:
    """HTTP requests that cannot be meant; each gets a status of its own fault."""
    draw, tally = random.Random(seed), Tally()
    async with aiohttp.ClientSession() as session:
        for _ in range(requests):
            path = draw.choice(["/v2/models/none/infer", f"/v2/models/{MODEL}/infer", "/../etc/passwd", "/v9", "/v1/x"])
            more = draw.choice([{}, {"Inference-Header-Content-Length": "99999999999"}, {"Content-Type": "\u00e9"}])
            body = draw.choice([b"", b"{", b'{"inputs": [{}]}', draw.randbytes(300)])
            async with session.post(url + path, data=body, headers=more) as answer:
                assert 400 <= answer.status < 500, (path, more, body[:50], answer.status)
                tally.errors[str(answer.status)] += 1
    return tally


def queued(metrics: str) -> float:
    """Rows that wait, by the server's own account."""
    lines = [line for line in metrics.splitlines() if line.startswith("offramp_queue_rows{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def settled(url: str) -> str:
    """Wait until no row waits in any queue -> the metrics."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{url}/metrics") as answer:
                metrics = await answer.text()
            if queued(metrics) == 0:
                return metrics
            assert asyncio.get_running_loop().time() < deadline, metrics
            await asyncio.sleep(0.05)


async def together(clients: Sequence[Coroutine[Any, Any, Tally]]) -> list[Tally]:
    """All at once; the first that finds something wrong ends the others."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(client) for client in clients]
    return [task.result() for task in tasks]


def stop(process: subprocess.Popen[str]) -> int:
    """Ask it to stop -> its exit status."""
    process.terminate()
    return process.wait(PATIENCE)
