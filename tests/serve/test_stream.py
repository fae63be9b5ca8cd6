"""The WebSocket: rows come back in order of exit, batches interleave, and nobody pays for somebody else's mistakes."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stream_help import check, opened, read, send
from tiny import batch
from web_help import PATIENCE, Served, as_lists, binary, expected, framed, mixed, served, until
from websockets.exceptions import ConnectionClosed, InvalidStatus

from offramp.runtime.errors import ArtifactError, BusyError
from offramp.runtime.serve.fields import from_bytes
from offramp.runtime.serve.limits import Settings


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    with served(Settings(max_message=100_000, max_rows=500)) as found:
        yield found


@pytest.fixture(autouse=True)
def _as_new(running: Served) -> Iterator[None]:
    yield
    running.engine.refuses = running.engine.fails = running.engine.classes = None
    running.engine.go.set()


@pytest.mark.parametrize("kind", ["text", "binary"])
def test_rows_are_answered_in_order_of_exit(running: Served, kind: str) -> None:
    arrays = mixed(30)
    with opened(running) as socket:
        send(socket, arrays, kind, id=7)
        found = [read(socket) for _ in range(30)]
    check(found, arrays)
    assert [each["exit"] for each in found] == sorted(each["exit"] for each in found)
    assert {each["id"] for each in found} == {7}
    fields = {"id", "row", "class", "probabilities", "confidence", "exit", "elapsed_ms", "short"}
    assert all(each.keys() == fields for each in found)


@pytest.mark.parametrize("kind", ["text", "binary"])
def test_rows_go_by_the_names_they_were_given(running: Served, kind: str) -> None:
    arrays = mixed(10)
    names = [*"abcdefgh", 8, -(1 << 63)]
    with opened(running) as socket:
        send(socket, arrays, kind, rows=names)
        found = [read(socket) for _ in range(10)]
    check(found, arrays, names)
    assert {each["id"] for each in found} == {None}


def test_batches_interleave_on_one_socket(running: Served) -> None:
    running.engine.go.clear()
    batches = {f"batch {n}": batch(1 + n % 9, n) for n in range(30)}
    with opened(running) as socket:
        for index, (of, arrays) in enumerate(batches.items()):
            send(socket, arrays, "text" if index % 2 else "binary", id=of)
        until(lambda: running.engine.seen[-1][1]["x"].shape == (3, 6) and len(running.engine.tickets) >= 30)
        running.engine.go.set()
        found: dict[str, list[dict[str, Any]]] = {of: [] for of in batches}
        for _ in range(sum(len(arrays["x"]) for arrays in batches.values())):
            message = read(socket)
            found[message["id"]].append(message)
    for of, arrays in batches.items():
        check(found[of], arrays)


def test_what_a_batch_asks_reaches_the_engine(running: Served) -> None:
    with opened(running, "other") as socket:
        send(socket, batch(2), "text", tolerance=[0.1, 0.2], deadline_ms=5, best_effort=True)
        read(socket), read(socket)
        model, _, asked = running.engine.seen[-1]
        assert model == "other"
        np.testing.assert_array_equal(asked.tolerance, [0.1, 0.2])
        assert (asked.deadline, asked.best_effort) == (0.005, True)
        send(socket, batch(1), "binary", tolerance=0.5, deadline_ms=None)
        read(socket)
        assert (running.engine.seen[-1][2].tolerance, running.engine.seen[-1][2].deadline) == (0.5, None)


def test_a_batch_without_rows_has_no_answer(running: Served) -> None:
    with opened(running) as socket:
        send(socket, batch(0), "binary", id="none")
        send(socket, batch(0), "text", id="none")
        send(socket, batch(1), "text", id="one")
        assert read(socket)["id"] == "one"


BAD: list[tuple[str | bytes, Any, str, str]] = [
    ("", None, "input", "cannot be read as JSON"),
    ("[" * 50_000, None, "input", "cannot be read as JSON"),
    ("7", None, "input", "is a JSON int"),
    (b"", None, "input", "begin with its length"),
    (b"\xff\xff\xff\xff{}", None, "input", "begin with its length"),
    (framed(b"\xff"), None, "input", "cannot be read as JSON"),
    (framed({"id": [1]}), None, "input", "id must be"),
    ('{"id": "' + "x" * 129 + '"}', None, "input", "id must be"),
    ('{"id": 9223372036854775808}', None, "input", "id must be"),
    ('{"id": 3, "inputs": [], "tolerence": 1}', 3, "input", "unknown field 'tolerence'"),
    ('{"id": 3, "inputs": []}', 3, "input", "inputs is a list; give an object"),
    ('{"id": 3, "inputs": {"x": [[1, 2]], "y": []}}', 3, "input", "missing: 'side'"),
    ('{"id": 3, "inputs": {"x": 1, "side": []}}', 3, "input", "input 'x' is a int; give a list"),
    ('{"id": 3, "inputs": {"x": {"a": 1}, "side": []}}', 3, "input", "give a list"),
    (json.dumps({"id": 3, "inputs": {"x": [[1, 2]], "side": [[1, 2, 3]]}}), 3, "input", "shape (1, 2)"),
    (json.dumps({"id": 3, "inputs": as_lists(batch(501))}), 3, "input", "501 rows in one request, 500 are allowed"),
    (json.dumps({"id": 3, "inputs": as_lists(batch(2)), "rows": [1]}), 3, "input", "rows names 1 rows"),
    (json.dumps({"id": 3, "inputs": as_lists(batch(1)), "rows": [1.5]}), 3, "input", "rows[0] must be"),
    (binary(batch(1), id=3) + b"\0", 3, "input", "1 bytes follow"),
    (binary(batch(1), id=3)[:-1], 3, "input", "input 'side' has 11 bytes"),
    (framed({"id": 3, "inputs": [{"name": "x", "dtype": "object", "shape": [1]}]}), 3, "input", "has dtype 'object'"),
    (framed({"id": 3, "inputs": [{"name": "x", "dtype": "float8", "shape": [1]}]}), 3, "input", "has dtype 'float8'"),
    (framed({"id": 3, "inputs": [{"name": "x", "dtype": "<f4", "shape": [1]}]}), 3, "input", "has dtype"),
    (
        framed({"id": 3, "inputs": [{"name": "x", "dtype": "float32", "shape": [400, 2**30]}]}),
        3,
        "input",
        "has 0 bytes",
    ),
    (
        framed({"id": 3, "inputs": [{"name": "x", "dtype": "float64", "shape": [0, 2147483647, 1073741823]}]}),
        3,
        "input",
        "give sizes from 0 up",
    ),
    (json.dumps({"id": 3, "inputs": {**as_lists(batch(1)), "\ud800": []}}), 3, "input", r"unknown: '\ud800'"),
    (framed({"id": 3, "inputs": [{"name": "x", "dtype": "float32"}]}), 3, "input", "shape of input 'x'"),
    (framed({"id": 3, "inputs": {"x": []}}), 3, "input", "inputs is a dict"),
    (binary({**batch(1), "x": np.zeros((1, 6))}, id=3), 3, "input", "is float64, the model takes float32"),
]


@pytest.mark.parametrize(("message", "of", "kind", "says"), BAD)
def test_a_malformed_message_costs_only_its_own_error(
    running: Served, message: str | bytes, of: Any, kind: str, says: str
) -> None:
    with opened(running) as socket:
        socket.send(message)
        found = read(socket)
        assert found.keys() == {"id", "error"}
        assert (found["id"], found["error"]["kind"]) == (of, kind)
        assert says in found["error"]["message"]
        assert len(found["error"]["message"]) < 600
        send(socket, batch(2), "text", id="after")
        check([read(socket), read(socket)], batch(2))


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_cost_only_their_own_error(running: Served, data: st.DataObject) -> None:
    """Also bytes that are almost right: a good message with a few of its bytes changed."""
    good = binary(batch(2), id="bad")
    places = data.draw(st.lists(st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)), max_size=5))
    changed = bytearray(good)
    for place, value in places:
        changed[place] = value
    message = data.draw(st.sampled_from([bytes(changed), good[: len(places) * 20]]) | st.binary(max_size=60))
    with opened(running) as socket:
        socket.send(message)
        send(socket, batch(1, 5), "text", id="after", rows=["after"])
        rest = [read(socket)]
        while rest[-1].get("row") != "after":
            rest.append(read(socket))
        check(rest[-1:], batch(1, 5), ["after"])
        assert len(rest) <= 4


def test_unreadable_messages_are_counted_as_refused() -> None:
    with served() as running, opened(running) as sock:
        for message in ("{", b"\xff\xff\xff\x7f", json.dumps({"inputs": 3})):
            sock.send(message)
            assert read(sock)["error"]["kind"] == "input"
        refused = [s for family in running.observer.collect() for s in family.samples if "requests_refused" in s.name]
        assert sum(s.value for s in refused if s.labels.get("reason") == "input" and s.name.endswith("_total")) == 3


@pytest.mark.parametrize(("padding", "alone"), [(0, False), (1 << 16, True)])
def test_a_row_does_not_keep_a_long_message_alive(padding: int, alone: bool) -> None:
    raw = np.arange(8, dtype=np.float32).tobytes()
    message = bytes(padding) + raw
    array = from_bytes(memoryview(message)[padding:], "float32", (2, 4), "x")
    np.testing.assert_array_equal(array.ravel(), np.arange(8))
    assert np.shares_memory(array, np.frombuffer(message, np.uint8)) is not alone


def test_too_much_json_is_refused_unread_and_goes_in_binary() -> None:
    arrays = batch(100)
    with served(Settings(max_json_bytes=1000)) as running, opened(running) as socket:
        for message in ("[" * 1001, '"' + "é" * 500, json.dumps({"inputs": as_lists(arrays)}), framed(b"{" * 1001)):
            socket.send(message)
            found = read(socket)["error"]
            assert (found["kind"], "--max-json-bytes" in found["message"]) == ("input", True)
        send(socket, arrays, "binary")
        check([read(socket) for _ in range(100)], arrays)


def test_the_engine_s_refusal_is_told_with_the_batch_s_id(running: Served) -> None:
    with opened(running) as socket:
        running.engine.refuses = BusyError("tiny has no room; try again")
        send(socket, batch(4), "text", id="full")
        assert read(socket) == {"id": "full", "error": {"kind": "busy", "message": "tiny has no room; try again"}}
        running.engine.refuses = None
        send(socket, batch(1), "text", id="room")
        assert read(socket)["id"] == "room"


def test_what_nobody_foresaw_costs_only_its_own_message(running: Served, caplog: pytest.LogCaptureFixture) -> None:
    running.engine.go.clear()
    with opened(running) as socket:
        send(socket, batch(2), "text", id="before")
        until(lambda: len(running.engine.seen[-1][1]["x"]) == 2 and not running.engine.tickets[-1].cancelled.is_set())
        running.engine.refuses = ValueError("nobody foresaw this")  # type: ignore[assignment]
        send(socket, batch(1), "text", id="bad")
        found = read(socket)
        running.engine.go.set()
        check([read(socket), read(socket)], batch(2))
    assert (found["id"], found["error"]["kind"]) == ("bad", "server")
    assert "nobody foresaw this" in caplog.text


@pytest.mark.parametrize("kind", ["text", "binary"])
def test_rows_without_an_answer_are_told_one_by_one(running: Served, kind: str) -> None:
    running.engine.fails = ArtifactError("stages/2.onnx: altered; copy the artifact again")
    arrays = mixed(20)
    exits = expected(arrays)[1]
    with opened(running) as socket:
        send(socket, arrays, kind, id=1, rows=[f"row {n}" for n in range(20)])
        found = [read(socket) for _ in range(20)]
    failed = [each for each in found if "error" in each]
    assert {each["row"] for each in failed} == {f"row {n}" for n in np.flatnonzero(exits == 2)}
    assert all(each.keys() == {"id", "row", "error"} for each in failed)
    assert {each["error"]["kind"] for each in failed} == {"artifact"}
    assert len({each["row"] for each in found}) == 20


def test_a_client_that_leaves_cancels_what_it_asked(running: Served) -> None:
    running.engine.go.clear()
    seen = len(running.engine.tickets)
    with opened(running) as socket, opened(running) as other:
        for _ in range(3):
            send(socket, batch(5), "binary")
        send(other, batch(2), "text")
        until(lambda: len(running.engine.tickets) == seen + 4)
        socket.socket.shutdown(2)  # both ways, without a goodbye
        asked = zip(running.engine.tickets[seen:], running.engine.seen[seen:], strict=True)
        theirs = [ticket for ticket, (_, arrays, _) in asked if len(arrays["x"]) == 5]
        until(lambda: all(ticket.cancelled.is_set() for ticket in theirs))
        running.engine.go.set()
        check([read(other), read(other)], batch(2))
        assert sum(ticket.cancelled.is_set() for ticket in running.engine.tickets[seen:]) == 3


def test_an_unknown_model_is_404(running: Served) -> None:
    with pytest.raises(InvalidStatus) as error:
        opened(running, "nothing")
    assert error.value.response.status_code == 404


def test_a_message_that_is_too_large_closes_its_own_socket(running: Served) -> None:
    with opened(running) as socket, opened(running) as other:
        socket.send(b" " * 100_001)
        with pytest.raises(ConnectionClosed) as error:
            socket.recv(timeout=PATIENCE)
        assert error.value.rcvd is not None
        assert error.value.rcvd.code == 1009
        send(other, batch(1), "text")
        check([read(other)], batch(1))


def test_text_that_is_no_text_closes_its_own_socket(running: Served) -> None:
    with opened(running) as sock, opened(running) as other:
        sock.send(b"\xff\xff", text=True)
        with pytest.raises(ConnectionClosed):
            sock.recv(timeout=PATIENCE)
        send(other, batch(1), "text")
        check([read(other)], batch(1))


def test_many_sockets_at_once_and_some_that_misbehave(running: Served) -> None:
    """Every row of every good client exactly once, while others send garbage, leave in the middle, or ask too much."""
    found: Counter[str] = Counter()

    def good(seed: int) -> None:
        with opened(running) as sock:
            for turn in range(5):
                arrays = batch(1 + (seed * 5 + turn) % 11, seed * 100 + turn)
                send(sock, arrays, "text" if turn % 2 else "binary", id=turn)
                check([read(sock) for _ in arrays["x"]], arrays)
            found["good"] += 1

    def bad(seed: int) -> None:
        with opened(running, close_timeout=0.1) as sock:
            for _ in range(5):
                send(sock, batch(20, seed), "binary")
                sock.send(b"\0" * seed)
            if seed % 4 == 1:
                sock.socket.shutdown(socket.SHUT_RDWR)
            elif seed % 4 == 3:
                sock.send(b" " * 100_001)
        found["bad"] += 1

    threads = [threading.Thread(target=(good, bad)[n % 2], args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert found == {"good": 8, "bad": 8}
    until(lambda: all(hosted.holders == 0 for hosted in running.host.models.values()))
