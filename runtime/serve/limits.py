"""What one client may ask of the server, and who may ask at all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits of the web side; what crosses one costs its own request or connection only."""

    token: str | None = None  # asked for as `Authorization: Bearer`; None: nobody is asked
    hosts: frozenset[str] | None = None  # names the server answers to, without port; None: any
    max_message: int = 16 << 20  # bytes of one request's body or one WebSocket message
    max_json_bytes: int = 4 << 20  # bytes of JSON in either; one thread reads it, and all others wait
    max_rows: int = 4096  # of one request
    max_connections: int = 256  # WebSockets and HTTP requests at the same time
    idle_seconds: float = 60.0  # a socket that says nothing, and owes nothing, for so long is closed; a body is read
    drain_seconds: float = 30.0  # for what was accepted, once the server is told to stop
    send_seconds: float = 10.0  # a reader that does not take a message within this loses its connection
