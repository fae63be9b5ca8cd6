"""The WebSocket `/v1/models/{name}/stream`: batches in, one message per row out; `frames` has the format.

Each socket has two tasks. One reads messages and submits them; the other sends what the engine delivers. An engine's
thread hands over a whole `Leaving` with one call into the loop, and messages are made while they are sent.

A reader that does not take a message within `send_seconds` loses its connection, and its requests are cancelled. While
more than `max_rows` answers wait to be sent nothing more is read, so that what waits is bounded by that and by the
engine's queues. A socket without a request under way that is silent for `idle_seconds` is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterable
from functools import partial

from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..errors import InputError, OfframpError
from .fields import Id
from .frames import Frame, Message, answers, failure, open_binary, open_text
from .limits import Settings
from .work import Engine, Host, Leaving, Observer, Ticket, held

_log = logging.getLogger(__name__)

IDLE = 1001  # close code


class Streams:
    """All open sockets of one server."""

    def __init__(self, engine: Engine, host: Host, observer: Observer, settings: Settings) -> None:
        self.engine, self.host, self.observer, self.settings = engine, host, observer, settings
        self._open: set[_Stream] = set()
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
        stream = _Stream(self, socket, name)
        self._open.add(stream)
        try:
            await stream.run()
        finally:
            self._open.discard(stream)

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


class _Stream:
    """One socket; everything but `_deliver` runs in the loop."""

    def __init__(self, streams: Streams, socket: WebSocket, name: str) -> None:
        self._streams, self._socket, self._name = streams, socket, name
        self._settings = streams.settings
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[int, Ticket] = {}  # requests under way
        self._left: dict[int, int] = {}  # rows of theirs that are not answered
        self._taken = 0
        self._outbox: deque[tuple[int, Iterable[Message]]] = deque()  # (messages, what makes them)
        self._waiting = 0  # messages in the outbox
        self._filled = asyncio.Event()
        self.empty = asyncio.Event()  # nothing waits to be sent
        self.empty.set()

    async def run(self) -> None:
        tasks = {asyncio.create_task(self._receive_all()), asyncio.create_task(self._send_all())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for ticket in self._tickets.values():
                ticket.cancel()
            self._tickets.clear()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.empty.set()
        for task in done:
            task.result()  # what neither expected is the server's to log

    async def _receive_all(self) -> None:
        while True:
            if self._waiting > self._settings.max_rows:
                await self.empty.wait()
            try:
                async with asyncio.timeout(self._settings.idle_seconds):
                    message = await self._socket.receive()
            except TimeoutError:
                if self._tickets or self._waiting:
                    continue
                await self._say_idle()
                return
            if message["type"] == "websocket.disconnect":
                return
            if self._streams.closing:
                continue  # only to learn whether it hangs up
            text = message.get("text")
            self._take(message["bytes"] if text is None else text)

    def _take(self, data: str | bytes) -> None:
        binary = isinstance(data, bytes)
        frame: Frame | None = None
        try:
            most = self._settings.max_json_bytes
            frame = open_binary(data, most) if isinstance(data, bytes) else open_text(data, most)
            self._submit(frame, binary)
        except OfframpError as error:
            self._refuse(frame, error, binary)
        except Exception:  # noqa: BLE001  # the reader's end would cost all batches of this socket
            _log.exception("a message of a socket of %s could not be taken", self._name)
            self._refuse(frame, OfframpError("the server failed on this message; its log says where"), binary)

    def _refuse(self, frame: Frame | None, error: OfframpError, binary: bool) -> None:
        self._put(1, (failure(frame.id if frame else None, error, binary=binary),))

    def _submit(self, frame: Frame, binary: bool) -> None:
        streams, settings = self._streams, self._settings
        with held(streams.host, self._name) as hosted:
            try:
                request = frame.request(hosted.manifest.inputs, settings.max_rows)
            except InputError:
                streams.observer.refused(self._name, 0, "input")
                raise
            self._taken += 1
            number = self._taken
            deliver = partial(self._deliver, number, frame.id, request.ids, binary)
            ticket = streams.engine.submit(self._name, request.batch, request.asked, deliver, hosted)
        # What a thread delivers meanwhile is looked at in the loop's next turn, after this.
        if request.rows:
            self._tickets[number], self._left[number] = ticket, request.rows

    def _deliver(self, number: int, of: Id, ids: list[Id] | None, binary: bool, leaving: Leaving) -> None:
        """Called from a thread of the engine."""
        try:
            self._loop.call_soon_threadsafe(self._leave, number, of, ids, binary, leaving)
        except RuntimeError:
            return  # the loop is closed: the server has stopped, and nobody waits any more

    def _leave(self, number: int, of: Id, ids: list[Id] | None, binary: bool, leaving: Leaving) -> None:
        if number not in self._tickets:
            return  # cancelled
        self._left[number] -= len(leaving.rows)
        if self._left[number] <= 0:
            del self._tickets[number], self._left[number]
        self._put(len(leaving.rows), answers(of, ids, leaving, binary=binary))

    def _put(self, count: int, messages: Iterable[Message]) -> None:
        self._outbox.append((count, messages))
        self._waiting += count
        self.empty.clear()
        self._filled.set()

    async def _send_all(self) -> None:
        try:
            while True:
                await self._filled.wait()
                while self._outbox:
                    count, messages = self._outbox.popleft()
                    for message in messages:
                        await self._send(message)
                    self._waiting -= count
                    await asyncio.sleep(0)  # a socket that takes everything at once must not keep the loop
                self._filled.clear()
                self.empty.set()
        except (TimeoutError, WebSocketDisconnect, OSError):
            return  # who does not read would not read a reason either

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
