"""Requests to a server's WebSocket from a process of its own, and how long each row waited for its answer.

    python -m benchmarks.load_generator --url http://127.0.0.1:8000 --model M --rows-file ROWS.npz --rate 200
        [--seconds 10] [--warm 2] [--batch 1] [--sockets 4] [--seed 0] [--closed N] [--patience 0.5] --out FILE.json

Open loop: requests arrive as a Poisson process of `--rate` a second, whatever the server does. A row's latency counts
from the moment its request was to be sent, so a server that cannot take it in time does not look faster for it. With
`--closed N` there are N requests under way at any time instead, which finds how much the server can do.

Rows are drawn with a seed. What arrives in the first `--warm` seconds is sent and not counted. `lag` is how late this
process itself was: where its 99 % quantile nears the latencies, it was the bottleneck and not the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

DRAIN = 30.0  # seconds after the last request that answers are waited for
_SPIN = 0.002  # seconds before a request is due in which the clock is watched: a sleep may be a millisecond late
_QUANTILES = (50, 95, 99)


@dataclass(frozen=True)
class Load:
    """What to send."""

    url: str
    model: str
    rate: float  # requests a second
    seconds: float  # counted
    warm: float = 2.0  # seconds before, not counted
    batch: int = 1  # rows of a request
    sockets: int = 4
    seed: int = 0
    closed: int = 0  # requests under way at any time, instead of a rate; 0: open loop
    patience: float = 0.5  # seconds after which an answer is called late
    token: str | None = None


@dataclass
class Seen:
    """What came back, row by row; times are seconds since the start."""

    due: dict[int, float] = field(default_factory=dict)  # by request
    left: dict[int, int] = field(default_factory=dict)  # rows of a request that are not accounted for
    answers: list[tuple[int, int, float]] = field(default_factory=list)  # request, exit, when
    errors: list[tuple[int, str, int]] = field(default_factory=list)  # request, kind, rows
    lags: list[float] = field(default_factory=list)


class Generator:
    """One run against one server."""

    def __init__(self, load: Load, rows: Mapping[str, np.ndarray]) -> None:
        self._load, self._rows = load, rows
        self._random = np.random.default_rng(load.seed)
        self._count = len(next(iter(rows.values())))
        self._inputs = json.dumps(
            [
                {"name": name, "dtype": array.dtype.name, "shape": [load.batch, *array.shape[1:]]}
                for name, array in rows.items()
            ]
        )
        self._seen = Seen()
        self._start = 0.0
        self._end = load.warm + load.seconds
        self._sent = 0

    async def run(self) -> Seen:
        """Send all, and wait for the answers."""
        headers = {"Authorization": f"Bearer {self._load.token}"} if self._load.token else {}
        where = f"{self._load.url}/v1/models/{self._load.model}/stream"
        async with aiohttp.ClientSession(headers=headers) as session:
            sockets = [await session.ws_connect(where, max_msg_size=0) for _ in range(self._load.sockets)]
            self._start = time.monotonic()
            receiving = [asyncio.create_task(self._receive(socket)) for socket in sockets]
            await (self._send_closed(sockets) if self._load.closed else self._send_open(sockets))
            deadline = time.monotonic() + DRAIN
            while self._seen.left and time.monotonic() < deadline and not all(task.done() for task in receiving):
                await asyncio.sleep(0.01)
            for socket in sockets:
                await socket.close()
            await asyncio.gather(*receiving)
        return self._seen

    def _now(self) -> float:
        return time.monotonic() - self._start

    async def _send_open(self, sockets: list[aiohttp.ClientWebSocketResponse]) -> None:
        expected = self._load.rate * self._end
        gaps = self._random.exponential(1 / self._load.rate, int(expected + 10 * expected**0.5 + 10))
        due = np.cumsum(gaps)
        due = due[due < self._end]
        each = [due[index :: len(sockets)].tolist() for index in range(len(sockets))]
        await asyncio.gather(*(self._send_at(socket, times) for socket, times in zip(sockets, each, strict=True)))

    async def _send_at(self, socket: aiohttp.ClientWebSocketResponse, times: list[float]) -> None:
        """Requests on one socket, each when it is due, or as soon as the socket takes it."""
        free = 0.0  # since when the socket takes more
        for due in times:
            while (left := due - self._now()) > 0:
                await asyncio.sleep(left - _SPIN if left > _SPIN else 0)
            self._seen.lags.append(self._now() - max(due, free))
            if socket.closed:
                return
            await socket.send_bytes(self._request(due))
            free = self._now()

    async def _send_closed(self, sockets: list[aiohttp.ClientWebSocketResponse]) -> None:
        """As many requests under way as asked for; `_receive` sends the next for each that is done."""
        for index in range(self._load.closed):
            await sockets[index % len(sockets)].send_bytes(self._request(self._now()))
        await asyncio.sleep(self._end - self._now())

    def _request(self, due: float) -> bytes:
        """One frame, noted as sent."""
        number = self._sent
        self._sent += 1
        self._seen.due[number] = due
        self._seen.left[number] = self._load.batch
        picked = self._random.integers(self._count, size=self._load.batch)
        header = f'{{"id": {number}, "inputs": {self._inputs}}}'.encode()
        tensors = (np.ascontiguousarray(array[picked]).tobytes() for array in self._rows.values())
        return b"".join([len(header).to_bytes(4, "little"), header, *tensors])

    async def _receive(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            now = self._now()
            length = int.from_bytes(message.data[:4], "little")
            header = json.loads(message.data[4 : 4 + length])
            number = header["id"]
            error = header.get("error")
            if error is None:
                self._seen.answers.append((number, header["exit"], now))
                rows = 1
            else:
                rows = 1 if "row" in header else self._seen.left[number]
                self._seen.errors.append((number, error["kind"], rows))
            self._seen.left[number] -= rows
            if self._seen.left[number] == 0:
                del self._seen.left[number]
                if self._load.closed and now < self._end:
                    await socket.send_bytes(self._request(now))


def told(load: Load, seen: Seen) -> dict[str, Any]:
    """What was seen of the rows that were due while it counted, and of the answers that came then."""
    counted = {number for number, due in seen.due.items() if due >= load.warm}
    answers = [(exit_, at - seen.due[number]) for number, exit_, at in seen.answers if number in counted]
    exits, seconds = (np.array(values) for values in zip(*answers, strict=True)) if answers else (np.empty(0),) * 2
    kinds: Counter[str] = Counter()
    for number, kind, rows in seen.errors:
        kinds[kind] += rows if number in counted else 0
    rows = len(counted) * load.batch
    came = sum(load.warm <= at < load.warm + load.seconds for _, _, at in seen.answers)
    return {
        "rows": rows,
        "answered": len(answers),
        "in_time": int((seconds <= load.patience).sum()),
        "refused": kinds.pop("busy", 0),
        "failed": dict(kinds),
        "unanswered": sum(left for number, left in seen.left.items() if number in counted),
        "offered": rows / load.seconds,  # rows a second
        "throughput": came / load.seconds,  # answers a second
        "latency_ms": quantiles_ms(seconds),
        "exits": {
            str(exit_): {"rows": int((exits == exit_).sum()), **quantiles_ms(seconds[exits == exit_])}
            for exit_ in np.unique(exits).astype(int).tolist()
        },
        "lag_ms": {**quantiles_ms(np.array(seen.lags)), "max": max(seen.lags, default=0.0) * 1e3},
    }


def quantiles_ms(seconds: np.ndarray) -> dict[str, float]:
    """Seconds [n] -> milliseconds by quantile; empty where there are none."""
    if not len(seconds):
        return {}
    return {f"p{q}": float(ms) for q, ms in zip(_QUANTILES, np.percentile(seconds, _QUANTILES) * 1e3, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows-file", type=Path, required=True, help="an .npz, one array per input")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm", type=float, default=Load.warm)
    parser.add_argument("--batch", type=int, default=Load.batch)
    parser.add_argument("--sockets", type=int, default=Load.sockets)
    parser.add_argument("--seed", type=int, default=Load.seed)
    parser.add_argument("--closed", type=int, default=Load.closed)
    parser.add_argument("--patience", type=float, default=Load.patience)
    args = parser.parse_args()
    with np.load(args.rows_file, allow_pickle=False) as archive:
        rows = {name: archive[name] for name in archive.files}
    given = {name: value for name, value in vars(args).items() if name not in ("rows_file", "out")}
    load = Load(**given)
    seen = asyncio.run(Generator(load, rows).run())
    args.out.write_text(json.dumps({**given, **told(load, seen)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
