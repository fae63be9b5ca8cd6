"""Sockets watched below HTTP: what uvicorn itself would leave open for as long as the other side likes.

Closed: a connection that sends no whole request within `idle_seconds`, be it the first or a later one; one whose
reader takes nothing of what was written for it in `send_seconds`, while a response waits for that or while the
connection is being closed. The last holds for WebSockets too, which begin as HTTP; a WebSocket whose messages wait is
`stream`'s to close.

Closed too, where there are more than `2 * max_connections + 16`: the oldest connection that has sent no whole request
yet, else the oldest without one under way, else the newest. So who connects and says nothing locks nobody out, and
whoever connects and asks at once is heard. The door counts those that are let in.

A WebSocket has two ways past the tasks and queues of ASGI, which cost as much as what is done with a message of one
row: an `AtOnce`, "socket" of `AT_ONCE` in the extensions of its scope. Whoever listens there is given binary messages
as they come, and takes them or not; what is not taken waits as it would, with reading stopped. What is ready to be sent
together goes in one write, where the other side takes what it gets.

Not an error: a WebSocket that its client is closing when the server stops. uvicorn 0.54 would send a close of its own
then, which the protocol refuses, and end with that error.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Protocol

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState
from websockets.http11 import Request

from .limits import Settings

AT_ONCE = "offramp.at_once"


class AtOnce(Protocol):
    """A WebSocket without tasks and queues; all of it in the loop."""

    def listen(self, take: Callable[[bytes], bool] | None) -> None:
        """Offer binary messages to `take`, as long as none waits to be received: True takes it. None: no more."""

    def ready(self) -> bool:
        """Whether messages can be sent at once: what was written before is taken, and nobody closes."""

    def send_at_once(self, messages: Iterable[str | bytes]) -> None:
        """Write all in one go; only where it is `ready`. To one who is closing nothing is sent."""


class GuardedSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, for `uvicorn.Config(ws=...)`."""

    _take: Callable[[bytes], bool] | None = None

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if not self.handshake_complete:  # else it was refused, and has no scope
            self.scope["extensions"][AT_ONCE] = {"socket": self}

    def handle_ping(self) -> None:
        """To one who does not read nothing is answered: pongs would pile up as fast as pings can be sent."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def send_receive_event_to_app(self) -> None:
        if self._take is not None and self._offered(self._take):
            self.frames = []
        else:
            super().send_receive_event_to_app()

    def _offered(self, take: Callable[[bytes], bool]) -> bool:
        if self.curr_msg_data_type != "bytes" or self.close_sent or self.read_paused or not self.queue.empty():
            return False
        return take(self.frames[0] if len(self.frames) == 1 else b"".join(self.frames))

    def listen(self, take: Callable[[bytes], bool] | None) -> None:
        """See `AtOnce.listen`."""
        self._take = take

    def ready(self) -> bool:
        """See `AtOnce.ready`."""
        closing = self.close_sent or self.disconnected or self.transport.is_closing()
        return self.handshake_complete and self.writable.is_set() and not closing

    def send_at_once(self, messages: Iterable[str | bytes]) -> None:
        """See `AtOnce.send_at_once`."""
        with contextlib.suppress(InvalidState):
            for message in messages:
                if isinstance(message, str):
                    self.conn.send_text(message.encode())
                else:
                    self.conn.send_binary(message)
        self.transport.write(b"".join(self.conn.data_to_send()))

    def shutdown(self) -> None:
        with contextlib.suppress(InvalidState):
            super().shutdown()
        self.transport.close()


def guarded(settings: Settings) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with these limits, for `uvicorn.Config(http=...)`; a class for one server."""
    most = 2 * settings.max_connections + 16
    here: dict[Guarded, None] = {}  # the oldest first; WebSockets are not among them

    class Guarded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            here[self] = None
            if len(self.connections) > most:
                self._make_room()
            self._seen: RequestResponseCycle | None = None
            self._since = self.loop.time()
            self._pauses = 0
            self._last = (0, 0)  # bytes not sent yet, and pauses so far, at the last look
            self._look_later()

        def connection_lost(self, exc: Exception | None) -> None:
            here.pop(self, None)
            super().connection_lost(exc)

        def handle_websocket_upgrade(self, event: h11.Request) -> None:
            del here[self]
            super().handle_websocket_upgrade(event)

        def _make_room(self) -> None:
            silent = (each for each in here if not each._asked() and each is not self)
            between = (each for each in here if not each._busy() and each is not self)
            gone = next(silent, None) or next(between, self)
            # It is counted until its loss is told, which more connections may come before.
            del here[gone]
            self.connections.discard(gone)
            gone.transport.abort()

        def _asked(self) -> bool:
            return self.cycle is not None

        def _busy(self) -> bool:
            return self._asked() and not self.cycle.response_complete

        def pause_writing(self) -> None:
            super().pause_writing()
            self._pauses += 1

        def _look_later(self) -> None:
            self.loop.call_later(min(settings.send_seconds, settings.idle_seconds), self._look)

        def _look(self) -> None:
            closing, size = self.transport.is_closing(), self.transport.get_write_buffer_size()
            if closing and not size:
                return  # it is gone
            if self._stuck(size) or (not closing and self._idle()):
                self.transport.abort()
            else:
                self._look_later()

        def _stuck(self, size: int) -> bool:
            """Nothing is added to what was written, and nothing taken of it."""
            before, pauses = self._last
            self._last = (size, self._pauses)
            waits = self.transport.is_closing() or self.flow.write_paused
            return waits and pauses == self._pauses and 0 < before <= size

        def _idle(self) -> bool:
            """No request under way, and none for so long."""
            if self._busy() or self.cycle is not self._seen or self.transport.get_protocol() is not self:
                self._seen, self._since = self.cycle, self.loop.time()
            return self.loop.time() - self._since >= settings.idle_seconds

    return Guarded
