"""From a finished model to files: checked, serialised, and with its weights beside it when they are too large.

A protobuf ends at 2 GiB. A model whose weights exceed `INLINE_LIMIT` keeps them in `<file>.data`, next to the
file, as ONNX's external data: ONNX Runtime finds them there by itself, and offramp's runtime checks them as it
checks every file. Tensors below a kilobyte stay where they are, because shape inference reads them.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import onnx
from onnx import TensorProto, external_data_helper, helper

from offramp.runtime.artifact import EXTERNAL
from offramp.runtime.engine import ModelBytes
from offramp.runtime.errors import StorageError

INLINE_LIMIT = 1 << 30  # well below 2 GiB: while branches are nested in branches, protobuf holds and grows copies
_STAYS = 1024  # bytes
_ALIGNED = 64  # bytes; vector loads want it


class ExternalData:
    """The weights of one model, one after the other, as they will lie in the file beside it."""

    def __init__(self, file: str) -> None:
        """`file` is the model's; the weights' is called the same with `.data` behind it."""
        self.location = PurePosixPath(file).name + EXTERNAL
        self._data = io.BytesIO()

    def reference(self, tensor: TensorProto, name: str) -> TensorProto:
        """A tensor `name` that points to the bytes of `tensor`, which are kept here; a small one is copied."""
        made = TensorProto(name=name, data_type=tensor.data_type, dims=tensor.dims)
        if _size(tensor) < _STAYS or not tensor.HasField("raw_data"):
            made.CopyFrom(tensor)
            made.name = name
            return made
        self._data.write(bytes(-self._data.tell() % _ALIGNED))
        offset = self._data.tell()
        length = self._data.write(tensor.raw_data)
        made.raw_data = b""  # the helper wants the field; it is cleared below
        external_data_helper.set_external_data(made, self.location, offset, length)
        made.ClearField("raw_data")
        return made

    def content(self) -> bytes:
        return self._data.getvalue()


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initializers, those of branches included."""
    return sum(_size(tensor) for graph in _graphs(model.graph) for tensor in graph.initializer)


def model_files(model: onnx.ModelProto, file: str, limit: int = INLINE_LIMIT) -> dict[str, bytes]:
    """Checked and serialised under the name `file`, with its external data if the weights exceed `limit` bytes.

    External weights leave `model` itself, so that they are not held twice.
    """
    external = ExternalData(file) if weight_bytes(model) > limit else None
    if external is not None:
        for graph in _graphs(model.graph):
            for tensor in graph.initializer:
                tensor.CopyFrom(external.reference(tensor, tensor.name))
    return checked(model, file, external)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for as long as it is needed. Raises `StorageError` where it cannot be made or filled."""
    try:
        with tempfile.TemporaryDirectory(prefix="offramp-") as folder:
            yield Path(folder)
    except OSError as error:
        raise StorageError(
            f"a model could not be put into a temporary folder ({error.strerror or error}); "
            "set TMPDIR to a folder with room for it"
        ) from error


def checked(model: onnx.ModelProto, file: str, external: ExternalData | None = None) -> dict[str, bytes]:
    """The files of a model whose large weights lie in `external`, if anywhere outside; the same model, the same bytes.

    Raises onnx's own errors when the model is malformed, which is a bug in the emitter.
    """
    data: bytes = model.SerializeToString(deterministic=True)
    if external is None:
        onnx.checker.check_model(data, full_check=True)
        return {file: data}
    weights = external.content()
    with temporary_folder() as folder:
        # The checker looks whether the weights' file is there, and never into it.
        place = folder / "model.onnx"
        place.write_bytes(data)
        with (folder / external.location).open("wb") as hollow:
            hollow.truncate(len(weights))
        onnx.checker.check_model(place, full_check=True)
    return {file: data, file + EXTERNAL: weights}


def model_bytes(files: Mapping[str, bytes], name: str) -> ModelBytes:
    """One of some emitted files as ONNX Runtime takes it, with the weights beside it if there are any."""
    beside = files.get(name + EXTERNAL)
    if beside is None:
        return ModelBytes(files[name])
    return ModelBytes(files[name], {PurePosixPath(name).name + EXTERNAL: lambda: iter([beside])})


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _size(tensor: TensorProto) -> int:
    """Bytes of a tensor's values, without touching them."""
    return int(math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
