"""What the tests of the WebSocket share: a socket, messages in both forms, and what an answer must be."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from web_help import PATIENCE, Served, as_lists, binary, expected, unframed
from websockets.sync.client import ClientConnection, connect


def opened(running: Served, model: str = "tiny", **options: Any) -> ClientConnection:
    return connect(f"ws://{running.place}/v1/models/{model}/stream", compression=None, open_timeout=PATIENCE, **options)


def read(socket: ClientConnection) -> dict[str, Any]:
    """One message, text or binary, with its probabilities as a list."""
    message = socket.recv(timeout=PATIENCE)
    if isinstance(message, str):
        return dict(json.loads(message))
    header, rest = unframed(message)
    if "error" in header:
        assert rest == b""
        return header
    [output] = header.pop("outputs")
    values = np.frombuffer(rest, "<f4")
    assert (output["name"], output["dtype"], output["shape"]) == ("probabilities", "float32", [len(values)])
    return {**header, "probabilities": values.tolist()}


def send(socket: ClientConnection, arrays: dict[str, np.ndarray], kind: str, **fields: Any) -> None:
    socket.send(
        json.dumps({"inputs": as_lists(arrays), **fields}) if kind == "text" else binary(arrays, **fields)
    )  # fmt: skip


def check(found: list[dict[str, Any]], arrays: dict[str, np.ndarray], names: list[Any] | None = None) -> None:
    """Each row exactly once, with its own answer."""
    probabilities, exits = expected(arrays)
    names = names or list(range(len(exits)))
    assert sorted(map(str, (each["row"] for each in found))) == sorted(map(str, names))
    for each in found:
        row = names.index(each["row"])
        np.testing.assert_allclose(each["probabilities"], probabilities[row], atol=1e-6)
        assert each["class"] == probabilities[row].argmax()
        assert each["exit"] == exits[row]
        assert each["short"] == (exits[row] == 1)
        assert each["confidence"] == pytest.approx(probabilities[row].max(), abs=1e-6)
        assert each["elapsed_ms"] >= 0
