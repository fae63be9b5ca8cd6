"""Sockets watched below HTTP: what uvicorn itself would leave open for as long as the other side likes.

Closed: a connection that sends no whole request within `idle_seconds`, be it the first or a later one; a connection
that is being closed but whose reader does not take what was written, after two looks, `send_seconds` apart. The
second holds for WebSockets too, whose connections begin as HTTP.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from .limits import Settings


def guarded(settings: Settings) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with these limits, for `uvicorn.Config(http=...)`."""

    class Guarded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._seen: RequestResponseCycle | None = None
            self._since = self.loop.time()
            self._closing = False
            self._look_later()

        def _look_later(self) -> None:
            self.loop.call_later(min(settings.send_seconds, settings.idle_seconds), self._look)

        def _look(self) -> None:
            transport = self.transport
            if transport.is_closing():
                if self._closing:
                    transport.abort()  # does nothing where it is closed already
                    return
                self._closing = True
            elif transport.get_protocol() is self and self._idle():
                transport.abort()
                return
            self._look_later()

        def _idle(self) -> bool:
            """No request under way, and none for so long."""
            busy = self.cycle is not None and not self.cycle.response_complete
            if busy or self.cycle is not self._seen:
                self._seen, self._since = self.cycle, self.loop.time()
            return self.loop.time() - self._since >= settings.idle_seconds

    return Guarded
