"""What goes over the WebSocket `/v1/models/{name}/stream`.

A message of the client is a batch; each row is answered by one message, in the order in which rows leave, in the kind
(text or binary) the batch came in. Batches may follow each other without waiting; their answers interleave.

    text      {"id": 7, "inputs": {"x": [[0.1, 0.2], [0.3, 0.4]]}, "rows": ["a", "b"],
               "tolerance": 0.01, "deadline_ms": 20, "best_effort": false}
    answer    {"id": 7, "row": "b", "class": 3, "probabilities": [...], "confidence": 0.98, "exit": 0,
               "elapsed_ms": 1.9, "short": false}
    error     {"id": 7, "error": {"kind": "input", "message": "..."}}      of the whole batch: none of it was taken
              {"id": 7, "row": "b", "error": {"kind": "artifact", "message": "..."}}    of one row

    binary    uint32 n | n bytes of JSON | tensors              n and the tensors' elements are little-endian
              the JSON is as above, but "inputs": [{"name": "x", "dtype": "float32", "shape": [2, 2]}], and the tensors'
              bytes follow in that order, row-major, with nothing between or after them
    answer    uint32 n | {"id", "row", "class", "confidence", "exit", "elapsed_ms", "short",
                          "outputs": [{"name": "probabilities", "dtype": "float32", "shape": [K]}]} | K float32
    error     uint32 n | {"id", "error": {"kind", "message"}}

`id` and every id in `rows` is a string of at most 128 characters or a whole number; the server only repeats them.
Without `id` it is null, without `rows` a row is called by its index. `tolerance` is one number or one per row; without
it the plan compiled for answers. After `deadline_ms` a row gets the best answer so far, marked `short`. With
`best_effort` it gets that rather than wait for a stage that is not in memory. A batch without rows has no answer.

JSON, be it a whole message or a header, is of at most `max_json_bytes` bytes: reading it holds up everybody, and more
than that is quicker sent in binary.

`kind` is one of those in `KINDS`. A message that cannot be read costs nothing but its own error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import (
    ArtifactError,
    BusyError,
    InputError,
    OfframpError,
    ProviderError,
    StorageError,
    UnknownModelError,
    UsageError,
)
from ..inputs import name_arrays
from ..manifest import TensorSpec
from .fields import (
    DTYPES,
    Id,
    asked,
    from_bytes,
    from_lists,
    identifier,
    mapping,
    parse_object,
    room_for,
    row_ids,
    sequence,
    shape_of,
)
from .work import Asked, Leaving

KINDS: dict[type[OfframpError], str] = {
    UnknownModelError: "model",  # not served here
    InputError: "input",  # the rows, or the message that brings them
    UsageError: "input",
    BusyError: "busy",  # no room now: try again
    ArtifactError: "artifact",  # a stage cannot be read
    StorageError: "storage",  # a stage does not fit into memory
    ProviderError: "provider",  # a stage cannot run on this machine
}
OTHER = "server"
_LONGEST_MESSAGE = 500  # characters; an error may quote what the client sent
_FIELDS = {"id", "inputs", "rows", "tolerance", "deadline_ms", "best_effort"}
_LENGTH = 4  # bytes

Message = str | bytes


@dataclass(frozen=True)
class Request:
    """One batch, ready to submit."""

    batch: dict[str, np.ndarray]
    rows: int
    ids: list[Id] | None  # [rows]; None: rows are called by their index
    asked: Asked


@dataclass(frozen=True)
class Frame:
    """A message whose JSON was read, so that whatever is wrong with the rest can be said with its id."""

    id: Id
    header: dict[str, Any]
    tensors: memoryview | None  # None: the inputs are lists within the JSON

    def request(self, inputs: Sequence[TensorSpec], max_rows: int) -> Request:
        """The batch for a model with these inputs. Raises `InputError`."""
        if not self.header.keys() <= _FIELDS:
            unknown = sorted(self.header.keys() - _FIELDS)
            raise InputError(f"unknown field {unknown[0]!r:.80}; a batch has {', '.join(sorted(_FIELDS))}")
        given = self._lists(inputs) if self.tensors is None else self._binary(self.tensors, max_rows)
        batch = name_arrays(given, [spec.name for spec in inputs])
        first = next(iter(batch.values()))
        room_for(len(first), max_rows)
        return Request(batch, len(first), row_ids(self.header.get("rows"), len(first)), asked(self.header))

    def _lists(self, inputs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
        given = mapping(self.header.get("inputs"), "inputs")
        # Unknown names are kept for `name_arrays` to refuse.
        known = {spec.name: spec for spec in inputs}
        return {
            name: from_lists(data, known[name]) if name in known else np.empty(0) for name, data in given.items()
        }  # fmt: skip

    def _binary(self, tensors: memoryview, max_rows: int) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        start = 0
        for index, each in enumerate(sequence(self.header.get("inputs"), "inputs")):
            stated = mapping(each, f"inputs[{index}]")
            name, dtype = stated.get("name"), stated.get("dtype")
            if not isinstance(name, str) or not isinstance(dtype, str) or name in arrays:
                raise InputError(f"inputs[{index}] must have a dtype and a name that no other input has")
            shape = shape_of(stated.get("shape"), f"shape of input {name!r:.80}")
            room_for(shape[0], max_rows)
            end = start + _bytes_of(shape, dtype)
            arrays[name] = from_bytes(tensors[start:end], dtype, shape, name)
            start = end
        if start != len(tensors):
            raise InputError(
                f"{len(tensors) - start} bytes follow the tensors that inputs lists; list all or send less"
            )
        return arrays


def _bytes_of(shape: tuple[int, ...], dtype: str) -> int:
    size = 1
    for n in shape:
        size *= n
    known = DTYPES.get(dtype)
    return size * (known.itemsize if known is not None else 1)


def open_text(text: str, max_json: int) -> Frame:
    """A text message of at most `max_json` bytes. Raises `InputError`."""
    header = parse_object(text, "the message", max_json)
    return Frame(identifier(header.get("id"), "id"), header, None)


def open_binary(data: bytes, max_json: int) -> Frame:
    """A binary message with a header of at most `max_json` bytes. Raises `InputError`."""
    length = int.from_bytes(data[:_LENGTH], "little")
    if len(data) < _LENGTH + length:
        raise InputError(f"the message has {len(data)} bytes and a header of {length}; begin with its length, uint32")
    view = memoryview(data)
    header = parse_object(view[_LENGTH : _LENGTH + length], "the header", max_json)
    return Frame(identifier(header.get("id"), "id"), header, view[_LENGTH + length :])


def kind_of(error: OfframpError) -> str:
    """The one word for an error."""
    return next((KINDS[each] for each in type(error).__mro__ if each in KINDS), OTHER)


def failure(of: Id, error: OfframpError, *, binary: bool) -> Message:
    """A batch that was not taken."""
    return _message({"id": of, "error": _told(error)}, binary)


def answers(of: Id, ids: Sequence[Id] | None, leaving: Leaving, *, binary: bool) -> Iterator[Message]:
    """One message per row, made as they are asked for."""
    rows = leaving.rows.tolist()
    names = rows if ids is None else [ids[row] for row in rows]
    if leaving.error is not None:
        for name in names:
            yield _message({"id": of, "row": name, "error": _told(leaving.error)}, binary)
        return
    same: dict[str, Any] = {"exit": leaving.exit, "elapsed_ms": round(leaving.seconds * 1e3, 3), "short": leaving.short}
    if binary:
        same["outputs"] = [
            {"name": "probabilities", "dtype": "float32", "shape": list(leaving.probabilities.shape[1:])}
        ]
    classes, confidence = leaving.probabilities.argmax(axis=1).tolist(), leaving.confidence.tolist()
    for index, name in enumerate(names):
        header = {"id": of, "row": name, "class": classes[index], "confidence": confidence[index], **same}
        values = leaving.probabilities[index]
        if binary:
            yield _framed(header) + values.astype("<f4", copy=False).tobytes()
        else:
            yield json.dumps({**header, "probabilities": values.tolist()})


def told(error: OfframpError) -> str:
    """The error's message, of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]} ..."


def _told(error: OfframpError) -> dict[str, str]:
    return {"kind": kind_of(error), "message": told(error)}


def _message(header: dict[str, Any], binary: bool) -> Message:
    return _framed(header) if binary else json.dumps(header)


def _framed(header: dict[str, Any]) -> bytes:
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(_LENGTH, "little") + encoded
