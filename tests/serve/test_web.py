"""Who is let in, how many, for how long; what is listed."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import batch
from web_help import PATIENCE, Served, as_lists, ask, served, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from offramp.runtime.serve.limits import Settings

TOKEN = "correct-horse"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
CLOSED = [
    ("GET", "/metrics"),
    ("GET", "/v1/stats"),
    ("GET", "/v1/models"),
    ("GET", "/v2"),
    ("GET", "/v2/models/tiny"),
    ("GET", "/v2/models/tiny/ready"),
    ("POST", "/v2/models/tiny/infer"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/tiny/load"),
    ("GET", "/nothing"),
]


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with served(Settings(token=TOKEN)) as found:
        yield found


@pytest.mark.parametrize(("method", "path"), CLOSED)
@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer é"])
def test_without_the_token_nothing_is_told(locked: Served, method: str, path: str, header: str) -> None:
    answer = ask(locked, path, method, b"{}" if method == "POST" else None, {"Authorization": header})
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "token" in answer.error
    assert locked.host.swaps == []
    assert locked.engine.tickets == []


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/"])
def test_health_and_the_page_need_no_token(locked: Served, path: str) -> None:
    assert ask(locked, path).status == 200


@pytest.mark.parametrize("path", ["/metrics", "/v1/stats", "/v1/models", "/v2"])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_the_token_all_is_open(locked: Served, path: str, scheme: str) -> None:
    assert ask(locked, path, headers={"Authorization": f"{scheme} {TOKEN}"}).status == 200


def test_a_socket_needs_the_token_too(locked: Served) -> None:
    url = f"ws://{locked.place}/v1/models/tiny/stream"
    with pytest.raises(InvalidStatus) as error, connect(url):
        pass
    assert error.value.response.status_code == 401
    with connect(url, additional_headers=BEARER) as sock:
        sock.send("{}")
        assert "error" in str(sock.recv(timeout=PATIENCE))


@pytest.fixture(scope="module")
def local() -> Iterator[Served]:
    with served(Settings(hosts=frozenset({"localhost", "127.0.0.1", "::1"}))) as found:
        yield found


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://[", "file://"])
def test_pages_of_other_hosts_are_refused(local: Served, origin: str) -> None:
    assert ask(local, "/v2", headers={"Origin": origin}).status == 403
    assert ask(local, "/v2/repository/models/tiny/load", "POST", b"", {"Origin": origin}).status == 403
    assert local.host.swaps == []
    with pytest.raises(InvalidStatus) as error, connect(f"ws://{local.place}/v1/models/tiny/stream", origin=origin):  # type: ignore[arg-type]
        pass
    assert error.value.response.status_code == 403


def test_the_server_s_own_page_may_ask(local: Served) -> None:
    assert ask(local, "/v2", headers={"Origin": local.url}).status == 200
    with connect(f"ws://{local.place}/v1/models/tiny/stream", origin=local.url) as sock:  # type: ignore[arg-type]
        sock.send("{}")
        assert "error" in str(sock.recv(timeout=PATIENCE))


@pytest.mark.parametrize(("host", "status"), [
    ("127.0.0.1:80", 200), ("LOCALHOST", 200), ("[::1]:8000", 200), ("rebound.example", 403), ("", 403), ("[", 403),
])  # fmt: skip
def test_a_local_server_answers_to_local_names_only(local: Served, host: str, status: int) -> None:
    assert ask(local, "/v2", headers={"Host": host}).status == status


def test_the_next_connection_is_turned_away_and_let_in_later() -> None:
    with served(Settings(max_connections=2)) as running:
        url = f"ws://{running.place}/v1/models/tiny/stream"
        with connect(url):
            with connect(url):
                with connect(url) as third, pytest.raises(ConnectionClosed) as error:
                    third.recv(timeout=PATIENCE)
                assert error.value.rcvd is not None
                assert error.value.rcvd.code == 1013
                answer = ask(running, "/v2")
                assert (answer.status, answer.headers["retry-after"]) == (503, "1")
                assert ask(running, "/v2/health/live").status == 200
            until(lambda: ask(running, "/v2").status == 200)


def test_who_connects_and_says_nothing_locks_nobody_out() -> None:
    with served(Settings(max_connections=2)) as running, contextlib.ExitStack() as stack:
        kept = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
        kept.request("GET", "/v2")
        assert kept.getresponse().read()
        place = ("127.0.0.1", running.port)
        silent = [stack.enter_context(socket.create_connection(place)) for _ in range(100)]
        assert ask(running, "/v2/health/live").status == 200
        assert ask(running, "/v2").status == 200
        assert all(ended(sock) for sock in silent[:70]), "the oldest make room"
        silent[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[-1].recv(1)
        kept.request("GET", "/v2")
        assert kept.getresponse().status == 200, "it has asked something once, so others go before it"
        kept.close()


def test_a_server_full_of_sockets_that_asked_still_listens() -> None:
    with served(Settings(max_connections=2)) as running, contextlib.ExitStack() as stack:
        for _ in range(60):
            connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
            stack.callback(connection.close)
            connection.request("GET", "/v2/health/live")
            assert connection.getresponse().read() == b'{"live":true}'


def ended(sock: socket.socket) -> bool:
    """The other side hung up, within the time a test waits."""
    sock.settimeout(PATIENCE)
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /v2 HTTP/1.1\r\nHost: a",
        b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\nGET /v2 HTTP/1.1\r\nHo",
        b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{",
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00" * 10,
    ],
)
def test_who_does_not_finish_a_request_is_hung_up_on(sent: bytes) -> None:
    with served(Settings(idle_seconds=0.2)) as running, socket.create_connection(("127.0.0.1", running.port)) as sock:
        sock.sendall(sent)
        assert ended(sock)
        assert ask(running, "/v2").status == 200


def test_a_request_under_way_may_take_longer_than_idleness() -> None:
    with served(Settings(idle_seconds=0.2)) as running:
        running.engine.go.clear()
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
        inputs = [
            {"name": n, "datatype": "FP32", "shape": [2, len(v[0])], "data": v} for n, v in as_lists(batch(2)).items()
        ]
        connection.request("POST", "/v2/models/tiny/infer", json.dumps({"inputs": inputs}))
        with socket.create_connection(("127.0.0.1", running.port)) as silent:
            assert ended(silent), "idleness has passed for this one"
        running.engine.go.set()
        assert connection.getresponse().status == 200
        connection.close()


def test_a_response_that_is_not_read_does_not_keep_its_socket() -> None:
    with served(Settings(idle_seconds=0.3, send_seconds=0.3, max_rows=5000)) as running:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", running.port))
            page = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
            sock.settimeout(0.5)
            with pytest.raises((TimeoutError, ConnectionError)):
                while True:  # until the server does not read any more, for nobody reads its answers
                    sock.sendall(page * 500)
            until(lambda: gone(sock))
        assert ask(running, "/v2").status == 200


def gone(sock: socket.socket) -> bool:
    """The other side reset the connection."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0 or not_connected(sock)


def not_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return True
    return False


def test_what_is_served_is_listed(local: Served) -> None:
    found = ask(local, "/v1/models").json()["models"]
    assert [model["name"] for model in found] == ["tiny", "other"]
    tiny = found[0]
    assert tiny["inputs"] == [
        {"name": "x", "dtype": "float32", "shape": ["batch", 6]},
        {"name": "side", "dtype": "float32", "shape": ["batch", 3]},
    ]
    assert (tiny["classes"], len(tiny["exits"])) == (5, 3)
    assert (tiny["tolerance"], tiny["tolerances"]) == (0.01, [0.001, 0.01])
    assert [(s["stage"], s["loaded"]) for s in tiny["segments"]] == [(0, True), (1, True), (2, False)]
    assert tiny["digest"] == local.host.models["tiny"].digest


def test_uvicorn_is_the_one_that_the_guard_was_written_for() -> None:
    """It builds on classes that uvicorn promises nothing about."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    [line] = [line for line in project["optional-dependencies"]["serve"] if line.startswith("uvicorn")]
    major, minor = importlib.metadata.version("uvicorn").split(".")[:2]
    assert line == f"uvicorn>={major}.{minor},<{major}.{int(minor) + 1}"


def test_a_server_that_stops_is_not_ready() -> None:
    with served() as running:
        running.engine.go.clear()
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE)
        connection.request("GET", "/v2/health/ready")
        assert connection.getresponse().read() == b'{"ready":true}'
        connection.close()
    assert running.engine.closed == 30.0
