"""A fake engine and host that the web is tested against, a server on a loopback port, and its clients."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tiny import THRESHOLDS, batch, reference, tiny_files, tiny_manifest

from offramp.runtime import Manifest
from offramp.runtime.errors import BusyError, InputError, OfframpError, UnknownModelError
from offramp.runtime.inputs import Batch, check_batch
from offramp.runtime.serve.command import listening, server
from offramp.runtime.serve.limits import Settings
from offramp.runtime.serve.metrics import Metrics
from offramp.runtime.serve.work import Asked, Deliver, Hosted, Leaving, SegmentState

PATIENCE = 30.0  # seconds that a test waits for what must happen


def until(happened: Callable[[], bool]) -> None:
    """Wait for something in another thread."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.005)


@dataclass
class FakeHosted:
    name: str
    manifest: Manifest
    digest: str
    holders: int = 0

    def take(self, stage: int) -> None:
        raise NotImplementedError

    def give(self, stage: int) -> None:
        raise NotImplementedError

    def hold(self) -> None:
        assert self.holders > 0, "held by nobody, so it may be gone"
        self.holders += 1

    def release(self) -> None:
        self.holders -= 1


class FakeHost:
    """Models by name; a swap gives a new digest."""

    def __init__(self, *names: str) -> None:
        manifest = tiny_manifest(tiny_files())
        self.models = {name: FakeHosted(name, manifest, f"{index:02}" + "a" * 62) for index, name in enumerate(names)}
        self.swaps: list[str] = []
        self.fails: OfframpError | None = None
        self.loaded = {(name, stage): stage < 2 for name in names for stage in range(3)}

    def hold(self, name: str) -> FakeHosted:
        if name not in self.models:
            raise UnknownModelError(f"no model {name!r} is served here; it serves {', '.join(self.models)}")
        self.models[name].holders += 1
        return self.models[name]

    def names(self) -> list[str]:
        return list(self.models)

    def swap(self, name: str) -> None:
        if self.fails is not None:
            raise self.fails
        self.swaps.append(name)
        old = self.models[name]
        self.models[name] = FakeHosted(name, old.manifest, f"{len(self.swaps):02}" + "b" * 62)

    def listen(self, changed: Callable[[], None]) -> None:
        raise NotImplementedError

    def segments(self) -> list[SegmentState]:
        return [SegmentState(n, s, up, (s + 1) << 20, 7 + s, 0.01) for (n, s), up in self.loaded.items()]

    def close(self) -> None: ...


@dataclass
class FakeTicket:
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    """Answers as the tiny artifact would, from a thread per request, shallowest exit first, once `go` is set."""

    def __init__(self, host: FakeHost, observer: Metrics) -> None:
        self.host, self.observer = host, observer
        self.go = threading.Event()
        self.go.set()
        self.seen: list[tuple[str, Mapping[str, np.ndarray], Asked]] = []
        self.tickets: list[FakeTicket] = []
        self.refuses: OfframpError | None = None
        self.fails: OfframpError | None = None  # what the rows of the last exit end in
        self.classes: int | None = None  # wider answers than the model's
        self.waiting: Counter[tuple[str, int]] = Counter()
        self.closed: float | None = None
        self._threads: list[threading.Thread] = []

    def submit(
        self, model: str, batch: Batch, asked: Asked, deliver: Deliver, version: Hosted | None = None
    ) -> FakeTicket:
        if model not in self.host.models:
            raise UnknownModelError(f"no model {model!r} is served here")
        if self.closed is not None:
            raise BusyError("the server is about to stop; ask another")
        if self.refuses is not None:
            raise self.refuses
        try:
            arrays, rows = check_batch(batch, (version or self.host.models[model]).manifest.inputs)
        except InputError:
            self.observer.refused(model, 0, "input")
            raise
        self.observer.accepted(model, rows)
        ticket = FakeTicket()
        self.seen.append((model, arrays, asked))
        self.tickets.append(ticket)
        if rows:
            thread = threading.Thread(target=self._answer, args=(model, arrays, ticket, deliver))
            self._threads.append(thread)
            thread.start()
        return ticket

    def _answer(self, model: str, arrays: dict[str, np.ndarray], ticket: FakeTicket, deliver: Deliver) -> None:
        start = time.monotonic()
        if not self.go.wait(PATIENCE):
            return
        probabilities, exits = reference(arrays, THRESHOLDS)
        for exit in range(3):
            rows = np.flatnonzero(exits == exit)
            if not len(rows) or ticket.cancelled.is_set():
                continue
            seconds = time.monotonic() - start
            if exit == 2 and self.fails is not None:
                deliver(
                    Leaving(
                        rows, exit, np.empty((0, 5), np.float32), np.empty(0, np.float32), seconds, error=self.fails
                    )
                )
                continue
            given = probabilities[rows]
            self.observer.answered(model, exit, np.full(len(rows), seconds), False)
            wide = given if self.classes is None else np.resize(given, (len(rows), self.classes)).astype(np.float32)
            deliver(Leaving(rows, exit, wide, given.max(axis=1), seconds, short=exit == 1))

    def depths(self) -> Mapping[tuple[str, int], int]:
        return dict(self.waiting)

    def close(self, patience: float) -> None:
        self.closed = patience
        if not patience:
            for ticket in self.tickets:
                ticket.cancel()
            self.go.set()
        for thread in self._threads:
            thread.join(PATIENCE)


@dataclass
class Served:
    """A running server."""

    port: int
    engine: FakeEngine
    host: FakeHost
    observer: Metrics
    stop: Callable[[], None]
    force: Callable[[], None]  # as a second interrupt does

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.place}"


@contextlib.contextmanager
def served(settings: Settings | None = None, *names: str) -> Iterator[Served]:
    """A server in a thread, stopped as a signal would."""
    host, observer = FakeHost(*(names or ("tiny", "other"))), Metrics()
    engine = FakeEngine(host, observer)
    ready = threading.Event()
    running = server(engine, host, observer, settings or Settings(), ready.set)
    listener = listening("127.0.0.1", 0)
    number = listener.getsockname()[1]
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()

    def stop() -> None:
        running.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()

    def force() -> None:
        running.force_exit = True

    try:
        assert ready.wait(PATIENCE)
        yield Served(number, engine, host, observer, stop, force)
    finally:
        engine.go.set()
        stop()
        listener.close()


def expected(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """-> probabilities [B, K] and exits [B]."""
    return reference(arrays, THRESHOLDS)


def mixed(rows: int) -> dict[str, np.ndarray]:
    """At least 3 rows, that leave at every exit."""
    found = (batch(rows, seed) for seed in range(1000))
    return next(arrays for arrays in found if {*reference(arrays, THRESHOLDS)[1]} == {0, 1, 2})


def as_lists(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: array.tolist() for name, array in arrays.items()}


@dataclass
class Answer:
    """An HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        found = self.json()
        assert list(found) == ["error"]
        return str(found["error"])


def ask(
    running: Served, path: str, method: str = "GET", body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """One HTTP request of any form."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())


def framed(header: Any, tensors: bytes = b"") -> bytes:
    """A binary message of the stream."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(4, "little") + encoded + tensors


def unframed(message: str | bytes) -> tuple[dict[str, Any], bytes]:
    """-> the header of a binary message, and what follows."""
    assert isinstance(message, bytes)
    end = 4 + int.from_bytes(message[:4], "little")
    return json.loads(message[4:end]), message[end:]


def binary(arrays: Mapping[str, np.ndarray], **fields: Any) -> bytes:
    """A batch as a binary message."""
    inputs = [{"name": n, "dtype": str(a.dtype), "shape": list(a.shape)} for n, a in arrays.items()]
    return framed({"inputs": inputs, **fields}, b"".join(a.tobytes() for a in arrays.values()))
