"""A watched row as the store keeps it, and back, bit for bit.

`early` and `final` are little-endian float32 [K]. `inputs` is one value for all inputs of the row: the length of a
header as uint32, little-endian; the header, JSON `[[name, dtype, shape], ...]` with numpy's dtype string, byte order
included; then each input's bytes in that order, C-contiguous. `checksum` is a SHA-256 over all the rest.

Refused: inputs that are no plain numbers, and rows that are not as they were packed.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass

import numpy as np

from ..errors import InputError, StorageError
from .work import Sample

_LENGTH = struct.Struct("<I")
_PROBABILITIES = np.dtype("<f4")


@dataclass(frozen=True)
class Row:
    """The columns of one row, in the order of the table; `inputs`, the long one, comes last."""

    model: str
    digest: str
    exit: int
    disagrees: int  # 1 where the class answered is not the backbone's
    time: float
    checksum: bytes
    early: bytes
    final: bytes
    inputs: bytes

    @property
    def size(self) -> int:
        """Bytes of its contents."""
        texts = len(self.model.encode()) + len(self.digest.encode())
        return texts + len(self.checksum) + len(self.early) + len(self.final) + len(self.inputs)


def pack(sample: Sample, checked: bool = True) -> Row:
    """A copy of the sample's arrays as one row; with `checked` False the checksum is left empty, for `sealed`."""
    row = Row(
        sample.model,
        sample.digest,
        int(sample.exit),
        int(sample.early.argmax() != sample.final.argmax()),
        float(sample.time),
        b"",
        sample.early.astype(_PROBABILITIES).tobytes(),
        sample.final.astype(_PROBABILITIES).tobytes(),
        _pack_inputs(sample),
    )
    return sealed(row) if checked else row


def sealed(row: Row) -> Row:
    """The row with its checksum."""
    return Row(**{**vars(row), "checksum": _checksum(row)})


def unpack(row: Row, where: str) -> Sample:
    """The sample that was packed. Raises `StorageError` naming `where` for a row that is not as it was written."""
    try:
        altered = _checksum(row) != row.checksum
    except TypeError:  # a column of another kind
        altered = True
    if altered:
        raise StorageError(f"{where}: altered since it was recorded (checksum differs); delete the recording")
    early, final = (np.frombuffer(data, _PROBABILITIES).astype(np.float32) for data in (row.early, row.final))
    return Sample(row.model, row.digest, _unpack_inputs(row.inputs), row.exit, early, final, row.time)


def _pack_inputs(sample: Sample) -> bytes:
    header = []
    for name, array in sample.inputs.items():
        if array.dtype.kind not in "biuf":
            raise InputError(f"input {name!r} of model {sample.model!r} is {array.dtype}; only numbers are recorded")
        header.append([name, array.dtype.str, list(array.shape)])
    text = json.dumps(header).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *(array.tobytes() for array in sample.inputs.values())])


def _unpack_inputs(data: bytes) -> dict[str, np.ndarray]:
    (length,) = _LENGTH.unpack_from(data)
    at = _LENGTH.size + length
    inputs = {}
    for name, dtype, shape in json.loads(data[_LENGTH.size : at]):
        array = np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)
        inputs[name] = array
        at += array.nbytes
    return inputs


def _checksum(row: Row) -> bytes:
    plain = [row.model, row.digest, row.exit, row.disagrees, row.time, len(row.early), len(row.final)]
    digest = hashlib.sha256(json.dumps(plain).encode())
    for data in (row.early, row.final, row.inputs):
        digest.update(data)
    return digest.digest()
