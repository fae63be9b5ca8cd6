"""The WebSocket `/v1/models/{name}/stream`: batches in, one message per row out; `frames` has the format.

An engine's thread hands over a whole `Leaving`, and one call into the loop brings all that was handed over until it
comes: a stage's call answers rows of many requests. Few messages to a socket that takes them are written there and
then, in one go. All others are left to the socket's own task, which makes them while it sends them. Binary messages
are submitted as they are read; a second task does that for all others, and a third looks whether the socket is silent.

A reader that does not take a message within `send_seconds` loses its connection, and its requests are cancelled. While
more than `max_rows` answers wait to be sent nothing more is read, so that what waits is bounded by that and by the
engine's queues. A socket without a request under way that is silent for `idle_seconds` is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..errors import InputError, OfframpError
from .fields import Id
from .frames import Frame, Message, answers, failure, open_binary, open_text
from .guard import AT_ONCE, AtOnce
from .limits import Settings
from .work import Engine, Host, Leaving, Observer, Ticket

_log = logging.getLogger(__name__)

IDLE = 1001  # close code
_FEW = 32  # messages that are written in one go, at most
_LITTLE = 1 << 15  # bytes of them, the last one apart


class Streams:
    """All open sockets of one server."""

    def __init__(self, engine: Engine, host: Host, observer: Observer, settings: Settings) -> None:
        self.engine, self.host, self.observer, self.settings = engine, host, observer, settings
        self._open: set[_Stream] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._left: deque[tuple[_Stream, _Asker, Leaving]] = deque()  # delivered, and not looked at in the loop
        self._called = False  # the loop is to look
        self.closing = False  # what is read is not looked at any more, nor refused: each refusal would have to be sent

    async def endpoint(self, socket: WebSocket) -> None:
        """One connection from handshake to close."""
        name = socket.path_params["name"]
        if name not in self.host.names():
            await socket.send_denial_response(
                JSONResponse({"error": f"no model {name!r:.80} here; see /v1/models"}, status_code=404)
            )
            return
        await socket.accept()
        self._loop = asyncio.get_running_loop()
        stream = _Stream(self, socket, name)
        self._open.add(stream)
        try:
            await stream.run()
        finally:
            self._open.discard(stream)

    def deliver(self, stream: _Stream, asker: _Asker, leaving: Leaving) -> None:
        """Called from a thread of the engine."""
        self._left.append((stream, asker, leaving))
        # In this order, and `_look` in the other one: what comes too late for one look asks for the next.
        if not self._called and self._loop is not None:
            self._called = True
            with contextlib.suppress(RuntimeError):  # closed: the server has stopped, and nobody waits any more
                self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._called = False
        touched: dict[_Stream, None] = {}
        for _ in range(len(self._left)):
            stream, asker, leaving = self._left.popleft()
            stream.leave(asker, leaving)
            touched[stream] = None
        for stream in touched:
            stream.send()

    async def drained(self) -> None:
        """Take nothing more; every answer that was delivered so far is sent, or its connection is gone, or its reader
        has not taken it for longer than `send_seconds`.
        """
        self.closing = True
        # A reader that takes one message just within its time could take them all for hours.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.send_seconds + 1):
                for stream in list(self._open):
                    await stream.empty.wait()


@dataclass(frozen=True, slots=True)
class _Asker:
    """What a request's answers repeat."""

    number: int
    id: Id
    rows: list[Id] | None  # names of its rows
    binary: bool


class _Stream:
    """One socket; all of it runs in the loop."""

    def __init__(self, streams: Streams, socket: WebSocket, name: str) -> None:
        self._streams, self._socket, self._name = streams, socket, name
        self._settings = streams.settings
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[int, Ticket] = {}  # requests under way
        self._left: dict[int, int] = {}  # rows of theirs that are not answered
        self._taken = 0
        self._outbox: deque[tuple[int, Iterable[Message]]] = deque()  # (messages, what makes them)
        self._waiting = 0  # messages in the outbox
        self._filled = asyncio.Event()  # what waits is the task's to send
        self.empty = asyncio.Event()  # nothing waits to be sent
        self.empty.set()
        self._at_once: AtOnce = socket.scope["extensions"][AT_ONCE]["socket"]
        self._broken: asyncio.Future[None] = self._loop.create_future()
        self._heard = self._loop.time()  # when it last said something

    async def run(self) -> None:
        tasks = {asyncio.create_task(each) for each in (self._receive_all(), self._send_all(), self._watch())}
        self._at_once.listen(self._take_at_once)
        try:
            ends: set[asyncio.Future[None]] = {*tasks, self._broken}
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._at_once.listen(None)
            for task in tasks:
                task.cancel()
            self._broken.cancel()
            for ticket in self._tickets.values():
                ticket.cancel()
            self._tickets.clear()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.empty.set()
        for end in done:
            end.result()  # what neither expected is the server's to log

    async def _receive_all(self) -> None:
        while True:
            if self._waiting > self._settings.max_rows:
                self._heard = math.inf  # nobody listens
                await self.empty.wait()
                self._heard = self._loop.time()
            message = await self._socket.receive()
            self._heard = self._loop.time()
            if message["type"] == "websocket.disconnect":
                return
            if self._streams.closing:
                continue  # only to learn whether it hangs up
            text = message.get("text")
            self._take(message["bytes"] if text is None else text)

    def _take_at_once(self, data: bytes) -> bool:
        if self._waiting > self._settings.max_rows or self._streams.closing:
            return False
        self._heard = self._loop.time()
        self._take(data)
        return True

    async def _watch(self) -> None:
        """Until it is silent for too long. It looks once in a while: a timeout for every message costs a lot."""
        most = self._settings.idle_seconds
        while True:
            left = self._heard + most - self._loop.time()
            if left <= 0 and not self._tickets and not self._waiting:
                await self._say_idle()
                return
            if left <= 0:
                self._heard = self._loop.time()
            await asyncio.sleep(min(left, most) if left > 0 else most)

    def _take(self, data: str | bytes) -> None:
        binary = isinstance(data, bytes)
        frame: Frame | None = None
        try:
            most = self._settings.max_json_bytes
            with self._counted():
                frame = open_binary(data, most) if isinstance(data, bytes) else open_text(data, most)
            self._submit(frame, binary)
        except OfframpError as error:
            self._refuse(frame, error, binary)
        except Exception:  # noqa: BLE001  # the reader's end would cost all batches of this socket
            _log.exception("a message of a socket of %s could not be taken", self._name)
            self._refuse(frame, OfframpError("the server failed on this message; its log says where"), binary)

    def _refuse(self, frame: Frame | None, error: OfframpError, binary: bool) -> None:
        self._put(1, (failure(frame.id if frame else None, error, binary=binary),))
        self.send()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """What cannot be read is told to the observer too; the engine itself tells of what it refuses."""
        try:
            yield
        except InputError:
            self._streams.observer.refused(self._name, 0, "input")
            raise

    def _submit(self, frame: Frame, binary: bool) -> None:
        streams, settings = self._streams, self._settings
        hosted = streams.host.hold(self._name)
        try:
            with self._counted():
                request = frame.request(hosted.manifest.inputs, settings.max_rows)
            self._taken += 1
            number = self._taken
            deliver = partial(streams.deliver, self, _Asker(number, frame.id, request.ids, binary))
            ticket = streams.engine.submit(self._name, request.batch, request.asked, deliver, hosted)
        finally:
            hosted.release()
        # What a thread delivers meanwhile is looked at in the loop's next turn, after this.
        if request.rows:
            self._tickets[number], self._left[number] = ticket, request.rows

    def leave(self, asker: _Asker, leaving: Leaving) -> None:
        """Rows have left; `send` is to be called then."""
        if asker.number not in self._tickets:
            return  # cancelled
        self._left[asker.number] -= len(leaving.rows)
        if self._left[asker.number] <= 0:
            del self._tickets[asker.number], self._left[asker.number]
        self._put(len(leaving.rows), answers(asker.id, asker.rows, leaving, binary=asker.binary))

    def _put(self, count: int, messages: Iterable[Message]) -> None:
        self._outbox.append((count, messages))
        self._waiting += count

    def send(self) -> None:
        """Send what waits: at once where it is little and the other side takes it, else it is the task's to do."""
        if not self._waiting or self._filled.is_set():
            return
        if self._waiting <= _FEW and self._at_once.ready():
            self._send_few()
        if self._waiting:
            self.empty.clear()
            self._filled.set()

    def _send_few(self) -> None:
        messages = itertools.chain.from_iterable([messages for _, messages in self._outbox])
        self._outbox.clear()
        try:
            pile = next(_piles(messages))
            self._at_once.send_at_once(pile)
        except Exception as error:  # noqa: BLE001  # as where the task fails: it ends this socket, and nobody else's
            if not self._broken.done():
                self._broken.set_exception(error)
            pile = []
        self._waiting -= len(pile)
        if self._waiting:
            self._outbox.append((self._waiting, messages))

    async def _send_all(self) -> None:
        try:
            while True:
                await self._filled.wait()
                while self._outbox:
                    count, messages = self._outbox.popleft()
                    for pile in _piles(messages):
                        await self._send_pile(pile)
                    self._waiting -= count
                    await asyncio.sleep(0)  # a socket that takes everything at once must not keep the loop
                self._filled.clear()
                self.empty.set()
        except (TimeoutError, WebSocketDisconnect, OSError):
            return  # who does not read would not read a reason either

    async def _send_pile(self, messages: list[Message]) -> None:
        if self._at_once.ready():
            self._at_once.send_at_once(messages)
            return
        for message in messages:
            await self._send(message)

    async def _send(self, message: Message) -> None:
        async with asyncio.timeout(self._settings.send_seconds):
            if isinstance(message, str):
                await self._socket.send_text(message)
            else:
                await self._socket.send_bytes(message)

    async def _say_idle(self) -> None:
        with contextlib.suppress(TimeoutError, WebSocketDisconnect, OSError):
            async with asyncio.timeout(self._settings.send_seconds):
                await self._socket.close(IDLE, "idle")


def _piles(messages: Iterable[Message]) -> Iterator[list[Message]]:
    """What to write in one go: not much, for it lies in memory until a slow reader has taken it."""
    pile: list[Message] = []
    size = 0
    for message in messages:
        pile.append(message)
        size += len(message)
        if len(pile) >= _FEW or size >= _LITTLE:
            yield pile
            pile, size = [], 0
    if pile:
        yield pile
