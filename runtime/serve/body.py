"""The body of an HTTP request, within its limits."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from .limits import Settings


class RefusedError(Exception):
    """A request that is answered by a status and a line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


async def read_body(request: Request, settings: Settings) -> bytes:
    """All of it. Raises `RefusedError`: compressed, larger than `max_message`, or not here in `idle_seconds`."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RefusedError(415, "compressed bodies are not read; send it as it is")
    length = request.headers.get("content-length", "0")
    most = settings.max_message
    if not length.isdigit() or int(length[:20]) > most:
        raise _too_large(most)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.idle_seconds):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise _too_large(most)
                parts.append(part)
    except TimeoutError as error:
        raise RefusedError(
            408, f"the body did not arrive within {settings.idle_seconds:g} s; send it faster"
        ) from error
    except ClientDisconnect as error:
        raise RefusedError(499, "the client closed the connection") from error
    return b"".join(parts)


def _too_large(most: int) -> RefusedError:
    return RefusedError(413, f"the body is larger than {most} bytes; send fewer rows at a time")
