"""The Open Inference Protocol v2 (KServe, Triton) over HTTP, with its binary extension.

    GET  /v2                       POST /v2/models/{name}[/versions/{v}]/infer
    GET  /v2/health/live|ready     GET  /v2/models/{name}[/versions/{v}][/ready]
    POST /v2/repository/index      POST /v2/repository/models/{name}/load

Outputs are `probabilities` [B, K] FP32, `class` [B] INT64, `exit` [B] INT64 and `confidence` [B] FP32. The request's
parameters `tolerance`, `deadline_ms` and `best_effort` mean what they do in `frames`; the response's parameter
`short_rows` counts rows that got a best answer so far. A version is the beginning of the digest of the artifact's
manifest. `load` reads the model's path again, which the command line gave; it takes no path or file.

Errors are `{"error": message}`: 400 for what does not fit, 404, 408 for a body that does not arrive, 413 (too much
JSON to read or to write among it: ask for binary), 415 for a
compressed one, 503 with Retry-After where there is no room, 500 for a model that cannot be run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..cli import own_version
from ..errors import BusyError, InputError, OfframpError, UnknownModelError, UsageError
from ..inputs import name_arrays
from ..manifest import Manifest, TensorSpec
from .body import RefusedError, read_body
from .fields import (
    TooMuchJsonError,
    asked,
    from_bytes,
    from_lists,
    identifier,
    mapping,
    parse_object,
    room_for,
    sequence,
    shape_of,
)
from .frames import told
from .limits import Settings
from .work import VERSION_LENGTH, Asked, Engine, Host, Hosted, Leaving, Observer, Ticket, held

WORDS = {
    "bool": "BOOL",
    **{f"{kind}{bits}": f"{kind.upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"FP{bits}" for bits in (16, 32, 64)},
}
_DTYPES = {word: dtype for dtype, word in WORDS.items()}
_OUTPUTS = {"probabilities": "FP32", "class": "INT64", "exit": "INT64", "confidence": "FP32"}
_LENGTH = "inference-header-content-length"
_NUMBER = 22  # bytes of a probability in JSON, about
_ASKED = ("tolerance", "deadline_ms", "best_effort")


@dataclass(frozen=True)
class _Wanted:
    """One output of the response."""

    name: str
    binary: bool


class Answers:
    """A request's rows as they come together; used in the loop only."""

    def __init__(self, rows: int, classes: int) -> None:
        """`classes` as the manifest says; what the rows bring decides."""
        self.probabilities = np.empty((0, classes), np.float32)  # until the first rows come
        self.exits = np.empty(rows, np.int64)
        self.confidence = np.empty(rows, np.float32)
        self.short = 0
        self._left = rows
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not rows:
            self.complete.set_result(None)

    def take(self, leaving: Leaving) -> None:
        """Some rows, or why there are none."""
        if self.complete.done():
            return
        try:
            self._keep(leaving)
        except Exception as error:  # noqa: BLE001  # the loop would log it, and the request would wait for ever
            self.complete.set_exception(error)

    def _keep(self, leaving: Leaving) -> None:
        if leaving.error is not None:
            raise leaving.error
        if self._left == len(self.exits):
            self.probabilities = np.empty((self._left, leaving.probabilities.shape[1]), np.float32)
        self.probabilities[leaving.rows] = leaving.probabilities
        self.exits[leaving.rows] = leaving.exit
        self.confidence[leaving.rows] = leaving.confidence
        self.short += len(leaving.rows) if leaving.short else 0
        self._left -= len(leaving.rows)
        if self._left <= 0:
            self.complete.set_result(None)

    def output(self, name: str) -> np.ndarray:
        """One of `_OUTPUTS`."""
        if name == "class":
            return np.asarray(self.probabilities.argmax(axis=1))
        if name == "exit":
            return self.exits
        return self.probabilities if name == "probabilities" else self.confidence


class Infer:
    """The endpoints."""

    def __init__(self, engine: Engine, host: Host, observer: Observer, settings: Settings) -> None:
        self._engine, self._host, self._observer, self._settings = engine, host, observer, settings
        self._swapping = asyncio.Lock()
        self.closing = False  # not ready any more

    def routes(self) -> list[Route]:
        model, version = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
        return [
            Route("/v2", self._server),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2/repository/index", self._index, methods=["POST"]),
            Route("/v2/repository/models/{name}/load", self._load, methods=["POST"]),
            *(Route(f"{each}/ready", self._model_ready) for each in (model, version)),
            *(Route(f"{each}/infer", self._infer, methods=["POST"]) for each in (model, version)),
            *(Route(each, self._model) for each in (model, version)),
        ]

    @contextlib.contextmanager
    def _addressed(self, request: Request) -> Iterator[Hosted]:
        """The model and version named in the path, held. Raises `UnknownModelError`."""
        name, version = request.path_params["name"], request.path_params.get("version")
        with held(self._host, name) as hosted:
            current = _version(hosted)
            if version is not None and version != current:
                raise UnknownModelError(
                    f"model {name!r:.80} has version {current} here, not {version!r:.80}; ask for that"
                )
            yield hosted

    def known(self, request: Request) -> tuple[Manifest, str]:
        """The manifest and version of the model named in the path. Raises `UnknownModelError`."""
        with self._addressed(request) as hosted:
            return hosted.manifest, _version(hosted)

    async def _server(self, request: Request) -> Response:
        return JSONResponse(
            {"name": "offramp", "version": own_version(), "extensions": ["binary_tensor_data", "model_repository"]}
        )

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, request: Request) -> Response:
        return JSONResponse({"ready": not self.closing}, status_code=503 if self.closing else 200)

    async def _model_ready(self, request: Request) -> Response:
        self.known(request)
        return JSONResponse({"name": request.path_params["name"], "ready": True})

    async def _model(self, request: Request) -> Response:
        manifest, version = self.known(request)
        inputs = [{"name": s.name, "datatype": WORDS[s.dtype], "shape": _shape(s)} for s in manifest.inputs]
        shapes = {"probabilities": [-1, manifest.classes]}
        outputs = [{"name": n, "datatype": word, "shape": shapes.get(n, [-1])} for n, word in _OUTPUTS.items()]
        return JSONResponse(
            {"name": request.path_params["name"], "versions": [version], "platform": "offramp",
             "inputs": inputs, "outputs": outputs}
        )  # fmt: skip

    async def _index(self, request: Request) -> Response:
        found = []
        for name in self._host.names():
            with held(self._host, name) as hosted:
                version = _version(hosted)
            found.append({"name": name, "version": version, "state": "READY", "reason": ""})
        return JSONResponse(found)

    async def _load(self, request: Request) -> Response:
        body = await read_body(request, self._settings)
        if body and parse_object(body, "the body", self._settings.max_json_bytes).get("parameters"):
            raise InputError("a model is loaded from the path the server was started with; send no parameters")
        name = request.path_params["name"]
        self.known(request)
        async with self._swapping:
            await asyncio.to_thread(self._host.swap, name)
        return JSONResponse({})

    async def _infer(self, request: Request) -> Response:
        # From before the body on: who asks for what is not here need not send all of it, and a version that was here
        # when it was asked for answers, whatever takes its place meanwhile.
        with self._addressed(request) as hosted:
            stated, wanted, answers, ticket = await self._taken(request, hosted)
        try:
            await _complete(request, answers)
        except BaseException:
            ticket.cancel()
            raise
        return _response({**stated, "parameters": {"short_rows": answers.short}}, answers, wanted)

    async def _taken(self, request: Request, hosted: Hosted) -> tuple[dict[str, Any], list[_Wanted], Answers, Ticket]:
        """Read and submit a request -> what its response begins with. What was read is gone once this returns: rows may
        wait for long, and the engine counts no more of them than their inputs.
        """
        most, manifest = self._settings.max_json_bytes, hosted.manifest
        body = await read_body(request, self._settings)
        try:
            header, tensors = _parted(body, request.headers.get(_LENGTH), most)
            wanted = _wanted(header)
            of = identifier(header.get("id"), "id")
            batch = _batch(header, tensors, manifest.inputs, self._settings.max_rows)
            options = asked({key: _parameters(header).get(key) for key in _ASKED})
            rows = len(next(iter(batch.values())))
            _room_to_answer(wanted, rows, manifest.classes, most)
        except InputError:
            self._observer.refused(hosted.name, 0, "input")
            raise
        answers = Answers(rows, manifest.classes)
        ticket = self._submit(hosted, batch, options, answers)
        stated = {"model_name": hosted.name, "model_version": _version(hosted), **({} if of is None else {"id": of})}
        return stated, wanted, answers, ticket

    def _submit(self, hosted: Hosted, batch: Mapping[str, np.ndarray], options: Asked, answers: Answers) -> Ticket:
        loop = asyncio.get_running_loop()

        def deliver(leaving: Leaving) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(answers.take, leaving)

        return self._engine.submit(hosted.name, batch, options, deliver, hosted)


async def _complete(request: Request, answers: Answers) -> None:
    """All rows are there. Raises what they ended in, and `RefusedError` once the client has left."""
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({answers.complete, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answers.complete.done():
            raise RefusedError(499, "the client closed the connection")
        answers.complete.result()
    finally:
        gone.cancel()
        answers.complete.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_response(error: OfframpError) -> Response:
    """The status that says whose fault it is."""
    if isinstance(error, UnknownModelError):
        status = 404
    elif isinstance(error, BusyError):
        status = 503
    elif isinstance(error, TooMuchJsonError):
        status = 413
    else:
        status = 400 if isinstance(error, InputError | UsageError) else 500
    headers = {"retry-after": "1"} if status == 503 else None
    return JSONResponse({"error": told(error)}, status_code=status, headers=headers)


def _version(hosted: Hosted) -> str:
    return hosted.digest[:VERSION_LENGTH]


def _parameters(of: Mapping[str, Any]) -> dict[str, Any]:
    return mapping(of.get("parameters"), "parameters")


def _parted(body: bytes, length: str | None, max_json: int) -> tuple[dict[str, Any], memoryview]:
    """-> the JSON, and the tensors' bytes after it."""
    if length is None:
        return parse_object(body, "the request", max_json), memoryview(b"")
    size = int(length) if length.isascii() and length.isdigit() and len(length) < 12 else -1
    if not 0 <= size <= len(body):
        raise InputError(
            f"Inference-Header-Content-Length is {length!r:.80}, the body has {len(body)} bytes; correct it"
        )
    view = memoryview(body)
    return parse_object(view[:size], "the request", max_json), view[size:]


def _wanted(header: Mapping[str, Any]) -> list[_Wanted]:
    """The outputs asked for, all where none is named."""
    binary = _parameters(header).get("binary_data_output") is True
    if not header.get("outputs"):
        return [_Wanted(name, binary) for name in _OUTPUTS]
    wanted: list[_Wanted] = []
    for index, each in enumerate(sequence(header["outputs"], "outputs")):
        stated = mapping(each, f"outputs[{index}]")
        name, parameters = stated.get("name"), _parameters(stated)
        if not isinstance(name, str) or name not in _OUTPUTS or name in (w.name for w in wanted):
            raise InputError(f"outputs[{index}] is {name!r:.80}; ask for some of {', '.join(_OUTPUTS)}, each once")
        if parameters.get("classification"):
            raise InputError(f"output {name!r} is not given as classification; ask for 'class' and 'probabilities'")
        wanted.append(_Wanted(name, parameters.get("binary_data", binary) is True))
    return wanted


def _room_to_answer(wanted: list[_Wanted], rows: int, classes: int, max_json: int) -> None:
    """Refuse an answer that would be too much JSON before anything is computed for it."""
    numbers = sum(rows * (classes if each.name == "probabilities" else 1) for each in wanted if not each.binary)
    if numbers * _NUMBER > max_json:
        raise TooMuchJsonError(
            f"the answer is {numbers} numbers, about {numbers * _NUMBER} bytes of JSON, {max_json} are written here; "
            "ask for it with the parameter binary_data_output, or start the server with a larger --max-json-bytes"
        )


def _batch(
    header: Mapping[str, Any], tensors: memoryview, inputs: tuple[TensorSpec, ...], max_rows: int
) -> dict[str, np.ndarray]:
    given: dict[str, np.ndarray] = {}
    start = 0
    for index, each in enumerate(sequence(header.get("inputs"), "inputs")):
        stated = mapping(each, f"inputs[{index}]")
        name, word = stated.get("name"), stated.get("datatype")
        if not isinstance(name, str) or name in given or not isinstance(word, str) or word not in _DTYPES:
            raise InputError(
                f"inputs[{index}] must have a name that no other input has, and a datatype among {', '.join(_DTYPES)}"
            )
        shape = shape_of(stated.get("shape"), f"shape of input {name!r:.80}")
        room_for(shape[0], max_rows)
        size = _parameters(stated).get("binary_data_size")
        if size is None:
            given[name] = _from_data(stated.get("data"), TensorSpec(name, _DTYPES[word], shape), shape)
            continue
        if type(size) is not int or not 0 <= size <= len(tensors) - start:
            raise InputError(
                f"binary_data_size of input {name!r:.80} is {size!r:.80}, {len(tensors) - start} bytes are left"
            )
        given[name] = from_bytes(tensors[start : start + size], _DTYPES[word], shape, name)
        start += size
    if start != len(tensors):
        raise InputError(f"{len(tensors) - start} bytes follow the inputs' tensors; state each in binary_data_size")
    return name_arrays(given, [spec.name for spec in inputs])


def _from_data(data: Any, spec: TensorSpec, shape: tuple[int, ...]) -> np.ndarray:
    array = from_lists(data, spec)
    if array.size != math.prod(shape):
        raise InputError(f"input {spec.name!r:.80} has {array.size} values, its shape {list(shape)} says otherwise")
    return array.reshape(shape)


def _shape(spec: TensorSpec) -> list[int]:
    return [n if isinstance(n, int) else -1 for n in spec.shape]


def _response(stated: dict[str, Any], answers: Answers, wanted: list[_Wanted]) -> Response:
    outputs, raw = [], []
    for each in wanted:
        array = answers.output(each.name)
        output: dict[str, Any] = {"name": each.name, "datatype": _OUTPUTS[each.name], "shape": list(array.shape)}
        if each.binary:
            raw.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            output["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            output["data"] = array.ravel().tolist()
        outputs.append(output)
    header = json.dumps({**stated, "outputs": outputs}).encode()
    if not raw:
        return Response(header, media_type="application/json")
    return Response(
        b"".join([header, *raw]), media_type="application/octet-stream", headers={_LENGTH: str(len(header))}
    )  # fmt: skip
