"""The WebSocket at its limits: sockets that say nothing, readers that stall, a server that stops."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from stream_help import check, opened, read, send
from tiny import batch, resident
from web_help import PATIENCE, Served, mixed, served, until
from websockets.exceptions import ConnectionClosed

from offramp.runtime.serve.limits import Settings
from offramp.runtime.serve.stream import Streams


def test_a_silent_socket_is_closed_and_one_that_waits_for_answers_is_not() -> None:
    with served(Settings(idle_seconds=0.2)) as running:
        running.engine.go.clear()
        with opened(running) as silent, opened(running) as waiting:
            send(waiting, batch(3), "text")
            with pytest.raises(ConnectionClosed) as error:
                silent.recv(timeout=PATIENCE)
            assert error.value.rcvd is not None
            assert (error.value.rcvd.code, error.value.rcvd.reason) == (1001, "idle")
            running.engine.go.set()
            check([read(waiting) for _ in range(3)], batch(3))


def test_a_reader_that_stalls_loses_only_its_own_connection() -> None:
    """Answers of 40 MB, a client that reads none of them, and one beside it that is served all the while."""
    with served(Settings(send_seconds=0.3, max_rows=500)) as running:
        running.engine.classes = 20_000
        with opened(running) as other:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", running.port))
            with opened(running, sock=sock, max_queue=1, close_timeout=0.1) as stalled:
                send(stalled, batch(500), "binary")
                until(lambda: running.observer.stats()["models"]["tiny"]["exits"][0]["rows"] > 0)
                running.engine.go.clear()
                send(stalled, batch(3), "binary")
                until(lambda: len(running.engine.tickets) == 2)
                until(running.engine.tickets[1].cancelled.is_set)
                running.engine.classes = None
                running.engine.go.set()
                send(other, batch(4), "text")
                check([read(other) for _ in range(4)], batch(4))
                sock.close()


def test_who_does_not_read_is_not_read_from_for_long_and_loses_nothing() -> None:
    """40 answers of 800 KB, of which the kernel holds some and `max_rows` says how many more may wait."""
    with served(Settings(max_rows=8)) as running:
        running.engine.classes = 200_000
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", running.port))
        with opened(running, sock=sock, max_queue=1, max_size=None) as slow:
            for number in range(40):
                send(slow, batch(1, number), "binary", id=number)
                time.sleep(0.02)  # for its answer
            assert len(running.engine.seen) > 8
            assert len(running.engine.seen) < 30
            with opened(running) as other:
                running.engine.classes = None
                send(other, batch(4), "binary")
                check([read(other) for _ in range(4)], batch(4))
            assert sorted(read(slow)["id"] for _ in range(40)) == list(range(40))


def test_what_is_delivered_together_is_looked_at_and_sent_together() -> None:
    calls: list[Any] = []
    done: list[tuple[str, str]] = []

    class Socket:
        def __init__(self, name: str) -> None:
            self.name = name

        def leave(self, asker: Any, leaving: Any) -> None:
            done.append((self.name, leaving))

        def send(self) -> None:
            done.append((self.name, "sent"))

    streams = cast(Any, Streams)(None, None, None, Settings())
    streams._loop = SimpleNamespace(call_soon_threadsafe=calls.append)
    one, two = Socket("one"), Socket("two")
    for socket_, row in ((one, "a"), (two, "b"), (one, "c")):
        streams.deliver(socket_, None, row)
    assert len(calls) == 1
    calls.pop()()
    assert done == [("one", "a"), ("two", "b"), ("one", "c"), ("one", "sent"), ("two", "sent")]
    streams.deliver(two, None, "d")
    assert len(calls) == 1
    calls.pop()()
    assert done[5:] == [("two", "d"), ("two", "sent")]


def test_what_was_accepted_is_answered_before_the_server_stops() -> None:
    with served() as running:
        running.engine.go.clear()
        arrays = mixed(200)
        with opened(running) as sock:
            send(sock, arrays, "text")
            until(lambda: len(running.engine.tickets) == 1)
            stopping = threading.Thread(target=running.stop)
            stopping.start()
            until(lambda: running.engine.closed is not None)
            send(sock, batch(1), "text", id="late")
            assert read(sock)["error"]["kind"] == "busy"
            running.engine.go.set()
            check([read(sock) for _ in range(200)], arrays)
            with pytest.raises(ConnectionClosed) as error:
                sock.recv(timeout=PATIENCE)
            assert error.value.rcvd is not None
            assert error.value.rcvd.code == 1012
        stopping.join(PATIENCE)


def test_sockets_that_go_on_asking_do_not_keep_the_server_alive() -> None:
    """Each sends what is refused and reads the refusals, so that something always waits to be sent."""
    payload = b'{"id": 1}'
    frames = (b"\x81" + bytes([0x80 | len(payload)]) + b"\0\0\0\0" + payload) * 1000

    def ask(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(frames)

    def listen(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while sock.recv(1 << 16):
                pass

    with served(Settings(send_seconds=0.5)) as running, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(raw(running)) for _ in range(4)]
        threads = [threading.Thread(target=each, args=(sock,)) for sock in socks for each in (ask, listen)]
        for thread in threads:
            thread.start()
        running.stop()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def raw(running: Served) -> socket.socket:
    """A stream's socket after the handshake, for a client faster than any library."""
    sock = socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE)
    sock.sendall(
        b"GET /v1/models/tiny/stream HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    assert sock.recv(1 << 12).startswith(b"HTTP/1.1 101 ")
    return sock


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_pings_of_one_who_does_not_read_do_not_pile_up() -> None:
    ping = b"\x89\xfd\0\0\0\0" + bytes(125)  # masked with zeros
    with served() as running, raw(running) as sock:
        before = resident()
        for _ in range(300):
            sock.sendall(ping * 500)
        assert resident() - before < 8 << 20, "19 MiB of pings were sent"
        assert sock.recv(2).startswith(b"\x8a"), "the first ones were answered"


def test_a_reader_that_is_just_fast_enough_does_not_keep_the_server_alive() -> None:
    with served(Settings(send_seconds=1, max_rows=500)) as running:
        running.engine.classes = 100_000
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock.connect(("127.0.0.1", running.port))
        with opened(running, sock=sock, max_queue=1, close_timeout=0.1, max_size=None) as slow:
            send(slow, batch(300), "binary")
            read(slow)
            stopping = threading.Thread(target=running.stop)
            stopping.start()
            with contextlib.suppress(ConnectionClosed):
                while stopping.is_alive():
                    read(slow)
                    time.sleep(0.2)
            stopping.join(PATIENCE)
            assert not stopping.is_alive()
            sock.close()


def test_a_second_interrupt_waits_for_nobody() -> None:
    with served() as running:
        running.engine.go.clear()
        with opened(running) as sock:
            send(sock, batch(3), "text")
            until(lambda: len(running.engine.tickets) == 1)
            stopping = threading.Thread(target=running.stop)
            stopping.start()
            until(lambda: running.engine.closed == 30.0)
            assert not running.engine.go.wait(0.3), "what was accepted is waited for"
            running.force()
            with pytest.raises(ConnectionClosed):
                sock.recv(timeout=PATIENCE)
        stopping.join(PATIENCE)
        assert not stopping.is_alive()
        assert running.engine.closed == 0.0
