"""The Open Inference Protocol, driven by Triton's own client over a real port; what is malformed by hand."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tiny import batch
from tritonclient.utils import InferenceServerException
from web_help import Answer, Served, ask, expected, mixed, served, until

from offramp.runtime.errors import ArtifactError, BusyError, OfframpError, StorageError
from offramp.runtime.serve import infer
from offramp.runtime.serve.infer import Answers
from offramp.runtime.serve.limits import Settings
from offramp.runtime.serve.work import Leaving

INFER = "/v2/models/tiny/infer"
NAMES = ["probabilities", "class", "exit", "confidence"]


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    with served(Settings(max_message=200_000, max_rows=1000)) as found:
        yield found


@pytest.fixture(autouse=True)
def _as_new(running: Served) -> Iterator[None]:
    yield
    running.engine.refuses = running.engine.fails = running.host.fails = running.engine.classes = None
    running.engine.go.set()


@pytest.fixture
def client(running: Served) -> Iterator[Any]:
    with triton.InferenceServerClient(running.place) as found:
        yield found


def tensors(arrays: Mapping[str, np.ndarray], binary: bool = True) -> list[Any]:
    found = []
    for name, array in arrays.items():
        tensor = triton.InferInput(name, list(array.shape), "FP32")
        tensor.set_data_from_numpy(array, binary_data=binary)
        found.append(tensor)
    return found


def check(result: Any, arrays: dict[str, np.ndarray]) -> None:
    probabilities, exits = expected(arrays)
    np.testing.assert_allclose(result.as_numpy("probabilities"), probabilities, atol=1e-6)
    np.testing.assert_array_equal(result.as_numpy("exit"), exits)
    np.testing.assert_array_equal(result.as_numpy("class"), probabilities.argmax(1))
    np.testing.assert_allclose(result.as_numpy("confidence"), probabilities.max(1), atol=1e-6)
    assert result.as_numpy("probabilities").dtype == result.as_numpy("confidence").dtype == np.float32
    assert result.as_numpy("exit").dtype == result.as_numpy("class").dtype == np.int64


def body(arrays: Mapping[str, np.ndarray], **fields: Any) -> dict[str, Any]:
    """A request in JSON."""
    inputs = [
        {"name": name, "datatype": "FP32", "shape": list(a.shape), "data": a.tolist()} for name, a in arrays.items()
    ]
    return {"inputs": inputs, **fields}


def post(running: Served, content: Any, **headers: str) -> Answer:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return ask(running, INFER, "POST", data, {name.replace("_", "-"): value for name, value in headers.items()})


def test_health_and_what_is_served(running: Served, client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata()["name"] == "offramp"
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    index = client.get_model_repository_index()
    assert [(m["name"], m["state"]) for m in index] == [("tiny", "READY"), ("other", "READY")]
    metadata = client.get_model_metadata("tiny")
    assert metadata["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 6]},
        {"name": "side", "datatype": "FP32", "shape": [-1, 3]},
    ]
    assert [(o["name"], o["datatype"], o["shape"]) for o in metadata["outputs"]] == [
        ("probabilities", "FP32", [-1, 5]),
        ("class", "INT64", [-1]),
        ("exit", "INT64", [-1]),
        ("confidence", "FP32", [-1]),
    ]
    assert metadata["versions"] == [index[0]["version"]]
    assert client.is_model_ready("tiny", metadata["versions"][0])
    assert not client.is_model_ready("tiny", "7")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("rows", [1, 33])
def test_answers_come_in_the_order_of_the_rows(client: Any, binary: bool, rows: int) -> None:
    arrays = mixed(rows) if rows > 1 else batch(1)
    result = client.infer("tiny", tensors(arrays, binary))
    check(result, arrays)
    assert list(result.get_response()["outputs"][0]["shape"]) == [rows, 5]


def test_a_batch_without_rows_is_answered_with_none(client: Any, running: Served) -> None:
    check(client.infer("tiny", tensors(batch(0))), batch(0))
    answer = post(running, body(batch(0)))
    assert [output["shape"] for output in answer.json()["outputs"]] == [[0, 5], [0], [0], [0]]


@pytest.mark.parametrize("binary", [True, False])
def test_only_the_outputs_asked_for(client: Any, binary: bool) -> None:
    arrays = mixed(12)
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("exit", "class")]
    result = client.infer("tiny", tensors(arrays), outputs=wanted, request_id="seven")
    response = result.get_response()
    assert [output["name"] for output in response["outputs"]] == ["exit", "class"]
    assert ["data" in output for output in response["outputs"]] == [not binary] * 2
    assert (response["id"], response["model_name"]) == ("seven", "tiny")
    np.testing.assert_array_equal(result.as_numpy("exit"), expected(arrays)[1])


def test_a_plain_json_request_gets_plain_json(running: Served) -> None:
    arrays = mixed(20)
    flat = body(arrays)
    for stated, array in zip(flat["inputs"], arrays.values(), strict=True):
        stated["data"] = array.ravel().tolist()
    for content in (body(arrays), flat):
        answer = post(running, content)
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/json"
        outputs = {output["name"]: output for output in answer.json()["outputs"]}
        assert list(outputs) == NAMES
        found = np.array(outputs["probabilities"]["data"]).reshape(outputs["probabilities"]["shape"])
        np.testing.assert_allclose(found, expected(arrays)[0], atol=1e-6)
        assert answer.json()["parameters"]["short_rows"] == int((expected(arrays)[1] == 1).sum())


def test_what_a_request_asks_reaches_the_engine(client: Any, running: Served) -> None:
    asked = {"tolerance": 0.25, "deadline_ms": 20, "best_effort": True}
    client.infer("other", tensors(batch(3)), parameters=asked, priority=1)
    model, _, found = running.engine.seen[-1]
    assert (model, found.tolerance, found.deadline, found.best_effort) == ("other", 0.25, 0.02, True)
    client.infer("tiny", tensors(batch(3)))
    _, _, found = running.engine.seen[-1]
    assert (found.tolerance, found.deadline, found.best_effort) == (None, None, False)


def test_many_clients_at_once_get_their_own_rows(running: Served) -> None:
    def one(seed: int) -> None:
        arrays = batch(1 + seed % 7, seed)
        with triton.InferenceServerClient(running.place) as own:
            for binary in (True, False):
                check(own.infer("tiny", tensors(arrays, binary)), arrays)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(40)))
    until(lambda: all(hosted.holders == 0 for hosted in running.host.models.values()))


def test_a_version_that_is_not_there(client: Any) -> None:
    version = client.get_model_metadata("tiny")["versions"][0]
    check(client.infer("tiny", tensors(batch(2)), model_version=version), batch(2))
    with pytest.raises(InferenceServerException, match=r"has version .* not '9'") as error:
        client.infer("tiny", tensors(batch(2)), model_version="9")
    assert error.value.status() == "404"


def test_a_version_asked_for_answers_although_it_is_replaced_meanwhile(client: Any, running: Served) -> None:
    version = client.get_model_metadata("tiny")["versions"][0]
    running.engine.go.clear()
    seen = len(running.engine.tickets)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            ask, running, f"/v2/models/tiny/versions/{version}/infer", "POST", json.dumps(body(batch(2))).encode()
        )
        until(lambda: len(running.engine.tickets) > seen)
        assert ask(running, "/v2/health/live").status == 200, "so the loop is done with submitting"
        running.host.swap("tiny")
        running.engine.go.set()
        answer = asked.result()
    assert answer.status == 200
    assert answer.json()["model_version"] == version


def asked_for(running: Served, version: str, arrays: Mapping[str, np.ndarray]) -> Answer:
    data = json.dumps(body(arrays)).encode()
    return ask(running, f"/v2/models/tiny/versions/{version}/infer", "POST", data)


def test_a_swap_that_falls_into_a_submit_costs_no_answer(
    client: Any, running: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, host = running.engine.submit, running.host

    def swapped(*given: Any) -> Any:
        host.swap("tiny")
        return submit(*given)

    version = client.get_model_metadata("tiny")["versions"][0]
    monkeypatch.setattr(running.engine, "submit", swapped)
    answer = asked_for(running, version, batch(2))
    assert answer.status == 200
    assert answer.json()["model_version"] == version
    assert asked_for(running, version, batch(2)).status == 404, "a request after the swap"


def test_a_version_is_answered_that_was_here_before_the_body_came(client: Any, running: Served) -> None:
    version = client.get_model_metadata("tiny")["versions"][0]
    old, data = running.host.models["tiny"], json.dumps(body(batch(2))).encode()
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    connection.putrequest("POST", f"/v2/models/tiny/versions/{version}/infer")
    connection.putheader("content-length", str(len(data)))
    connection.endheaders()
    until(lambda: old.holders > 0)
    running.host.swap("tiny")
    connection.send(data)
    response = connection.getresponse()
    assert response.status == 200
    assert json.loads(response.read())["model_version"] == version
    connection.close()
    until(lambda: old.holders == 0)


def test_a_newer_version_may_know_more_classes(running: Served) -> None:
    """The request was read while the old one stood; the engine answers with the newest."""
    running.engine.classes = 7
    answer = post(running, body(mixed(20)))
    assert answer.status == 200
    assert answer.json()["outputs"][0]["shape"] == [20, 7]


def test_rows_that_cannot_be_kept_fail_their_request() -> None:
    async def taken() -> None:
        answers = Answers(2, 5)
        answers.take(Leaving(np.array([7]), 0, np.zeros((1, 5), np.float32), np.zeros(1, np.float32), 0.0))
        await answers.complete

    with pytest.raises(IndexError, match="out of bounds"):
        asyncio.run(taken())


def test_load_reads_the_path_of_the_command_line_again(client: Any, running: Served) -> None:
    before = client.get_model_metadata("tiny")["versions"]
    client.load_model("tiny")
    assert running.host.swaps[-1] == "tiny"
    assert client.get_model_metadata("tiny")["versions"] != before
    swaps = len(running.host.swaps)
    with pytest.raises(InferenceServerException, match="send no parameters"):
        client.load_model("tiny", config='{"path": "/etc"}')
    with pytest.raises(InferenceServerException, match="no model 'nothing'"):
        client.load_model("nothing")
    running.host.fails = ArtifactError("tiny.offramp: truncated; copy it again")
    with pytest.raises(InferenceServerException, match="truncated") as error:
        client.load_model("tiny")
    assert error.value.status() == "500"
    assert len(running.host.swaps) == swaps


@pytest.mark.parametrize(
    ("error", "status"),
    [(BusyError("tiny has no room; try again"), 503), (StorageError("stage 1 does not fit"), 500)],
)
def test_the_engine_s_refusal_is_the_status(running: Served, error: OfframpError, status: int) -> None:
    running.engine.refuses = error
    answer = post(running, body(batch(2)))
    assert (answer.status, answer.error) == (status, str(error))
    assert answer.headers.get("retry-after") == ("1" if status == 503 else None)


def test_a_row_without_an_answer_fails_its_request_and_cancels_it(running: Served) -> None:
    running.engine.fails = ArtifactError("stages/2.onnx: altered; copy the artifact again")
    answer = post(running, body(mixed(20)))
    assert (answer.status, answer.error) == (500, str(running.engine.fails))
    assert running.engine.tickets[-1].cancelled.is_set()


def test_a_client_that_leaves_cancels_its_request(running: Served) -> None:
    running.engine.go.clear()
    seen = len(running.engine.tickets)
    connection = http.client.HTTPConnection("127.0.0.1", running.port)
    connection.request("POST", INFER, json.dumps(body(batch(2))))
    until(lambda: len(running.engine.tickets) > seen)
    ticket = running.engine.tickets[-1]
    assert not ticket.cancelled.is_set()
    connection.close()
    until(ticket.cancelled.is_set)


def input_of(**changes: Any) -> dict[str, Any]:
    stated = {"name": "x", "datatype": "FP32", "shape": [1, 6], "data": [0.0] * 6}
    return {key: value for key, value in {**stated, **changes}.items() if value is not None}


BAD: list[tuple[Any, str]] = [
    (b"\xff\xfe", "cannot be read as JSON"),
    (b"{" * 100_000, "cannot be read as JSON"),
    (b"[1]", "is a JSON list"),
    ({}, "inputs is a NoneType"),
    ({"inputs": [7]}, r"inputs\[0\] is a int"),
    ({"inputs": [input_of(datatype="BYTES")]}, "a datatype among"),
    ({"inputs": [input_of(datatype=["FP32"])]}, "a datatype among"),
    ({"inputs": [input_of(), input_of()]}, "a name that no other input has"),
    ({"inputs": [input_of(shape=[])]}, "sizes from 0 up"),
    ({"inputs": [input_of(shape=[-1, 6])]}, "sizes from 0 up"),
    ({"inputs": [input_of(shape=[True, 6])]}, "sizes from 0 up"),
    ({"inputs": [input_of(shape=[0, 1 << 30, 1 << 30, 1 << 30])]}, "sizes from 0 up"),
    ({"inputs": [input_of(datatype="FP64", shape=[0, 2147483647, 1073741823], data=[])]}, "sizes from 0 up"),
    ({"inputs": [*body(batch(1))["inputs"], input_of(name="\ud800")]}, r"unknown: '\\ud800'"),
    ({"inputs": [input_of(shape=[1] * 33)]}, "sizes from 0 up"),
    ({"inputs": [input_of(shape=[2, 6])]}, "has 6 values"),
    ({"inputs": [input_of(shape=[1001, 6])]}, "1001 rows in one request, 1000 are allowed"),
    ({"inputs": [input_of(data=None)]}, "is a NoneType; give a list"),
    ({"inputs": [input_of(data=["0"] * 6)]}, "give numbers, in lists"),
    ({"inputs": [input_of(data=[None] * 6)]}, "give numbers, in lists"),
    ({"inputs": [input_of(data=[True] * 6)]}, "give numbers, in lists"),
    ({"inputs": [input_of(data=[[0.0, 0.0], [0.0]])]}, "lists of different lengths"),
    ({"inputs": [input_of(data=[10**400] * 6)]}, "cannot"),
    ({"inputs": [input_of(datatype="INT64", data=[0.5] * 6)]}, "give whole numbers"),
    ({"inputs": [input_of(datatype="UINT8", data=[256] * 6)]}, "outside 0 to 255"),
    ({"inputs": [input_of(datatype="INT64", data=[1 << 63] * 6)]}, "outside -9223372036854775808"),
    ({"inputs": [input_of(parameters={"binary_data_size": 24})]}, "0 bytes are left"),
    ({"inputs": [input_of(parameters={"binary_data_size": "24"})]}, "0 bytes are left"),
    ({"inputs": [input_of(parameters=[])]}, "parameters is a list"),
    ({"inputs": [input_of()]}, "missing: 'side'"),
    ({"inputs": [*body(batch(1))["inputs"], input_of(name="z")]}, "unknown: 'z'"),
    (body({"x": batch(2)["x"], "side": batch(3)["side"]}), "inputs disagree on 'batch'"),
    (body({**batch(1), "x": np.zeros((1, 7))}), r"has shape \(1, 7\)"),
    (body({**batch(1), "x": np.full((1, 6), np.nan)}), "NaN or infinity"),
    (body({**batch(1), "x": np.full((1, 6), 1e300)}), "NaN or infinity"),
    (body(batch(1), outputs=[{"name": "logits"}]), "ask for some of probabilities"),
    (body(batch(1), outputs=[{"name": "exit"}, {"name": "exit"}]), "each once"),
    (body(batch(1), outputs=[{"name": "class", "parameters": {"classification": 3}}]), "not given as classification"),
    (body(batch(1), outputs={"name": "exit"}), "outputs is a dict"),
    (body(batch(1), id="x" * 200), "at most 128 characters"),
    (body(batch(1), parameters={"deadline_ms": 0}), "above 0"),
    (body(batch(1), parameters={"deadline_ms": float("nan")}), "give a number"),
    (body(batch(1), parameters={"deadline_ms": True}), "give a number"),
    (body(batch(1), parameters={"tolerance": "0.1"}), "give a number"),
    (body(batch(1), parameters={"best_effort": 1}), "give true or false"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_what_does_not_fit_is_named_and_costs_only_itself(running: Served, content: Any, message: str) -> None:
    submitted = len(running.engine.tickets)
    answer = post(running, content)
    assert answer.status == 400
    assert len(answer.body) < 1000
    assert re.search(message, answer.error)
    assert len(running.engine.tickets) == submitted
    assert post(running, body(batch(1))).status == 200


@pytest.mark.parametrize("length", ["-1", "x", "9999999", "1" * 5000, "3"])
def test_a_wrong_header_length_is_named(running: Served, length: str) -> None:
    answer = post(running, body(batch(1)), inference_header_content_length=length)
    assert answer.status == 400


def test_binary_data_that_is_too_long_or_short_is_refused(running: Served) -> None:
    arrays = batch(2)
    raw = b"".join(array.tobytes() for array in arrays.values())
    stated = [
        {"name": n, "datatype": "FP32", "shape": list(a.shape), "parameters": {"binary_data_size": a.nbytes}}
        for n, a in arrays.items()
    ]
    header = json.dumps({"inputs": stated}).encode()
    length = str(len(header))
    assert post(running, header + raw, inference_header_content_length=length).status == 200
    assert "follow" in post(running, header + raw + b"\0", inference_header_content_length=length).error
    assert "are left" in post(running, header + raw[:-1], inference_header_content_length=length).error
    stated[0]["shape"] = [2, 5]
    header = json.dumps({"inputs": stated}).encode()
    answer = post(running, header + raw, inference_header_content_length=str(len(header)))
    assert "has 48 bytes, float32 [2, 5] takes 40" in answer.error


def test_a_body_that_is_too_large_is_413(running: Served) -> None:
    assert post(running, b" " * 200_001).status == 413
    parts = (b" " * 50_000 for _ in range(5))
    connection = http.client.HTTPConnection("127.0.0.1", running.port)
    connection.request("POST", INFER, parts, encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    assert connection.getresponse().status == 413
    connection.close()


def test_too_much_json_is_refused_unread_and_goes_in_binary() -> None:
    arrays = batch(100)
    with served(Settings(max_json_bytes=2000)) as running, triton.InferenceServerClient(running.place) as own:
        read = post(running, b"[" * 2001), post(running, b"[" * 2001, inference_header_content_length="2001")
        load = ask(running, "/v2/repository/models/tiny/load", "POST", b"[" * 2001)
        for answer in (*read, load):
            assert answer.status == 413
            assert "2001 bytes of JSON, 2000 are read here" in answer.error
        check(own.infer("tiny", tensors(arrays)), arrays)
        submitted = len(running.engine.tickets)
        wanted = [triton.InferRequestedOutput(name, binary_data=False) for name in NAMES]
        with pytest.raises(InferenceServerException, match="binary_data_output") as error:
            own.infer("tiny", tensors(arrays), outputs=wanted)
        assert error.value.status() == "413"
        assert len(running.engine.tickets) == submitted
        assert own.infer("tiny", tensors(batch(10)), outputs=wanted).as_numpy("class").shape == (10,)


def test_a_compressed_body_is_415(running: Served) -> None:
    assert post(running, body(batch(1)), content_encoding="gzip").status == 415


def test_other_paths_and_methods_are_json_too(running: Served) -> None:
    assert ask(running, "/v2/nothing").error == "Not Found"
    assert ask(running, INFER).status == 405
    assert "no model" in ask(running, "/v2/models/nothing").error


def test_a_request_that_waits_keeps_nothing_of_its_json(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(dict[str, Any]):
        """One that can be referred to weakly."""

    seen: list[weakref.ref[Parsed]] = []
    parse = infer.parse_object

    def noted(*given: Any) -> dict[str, Any]:
        found = Parsed(parse(*given))
        seen.append(weakref.ref(found))
        return found

    monkeypatch.setattr(infer, "parse_object", noted)
    with served() as running:
        running.engine.go.clear()
        inputs = [
            {"name": name, "datatype": "FP32", "shape": list(values.shape), "data": values.tolist()}
            for name, values in batch(2).items()
        ]
        body = json.dumps({"inputs": inputs}).encode()
        thread = threading.Thread(target=ask, args=(running, "/v2/models/tiny/infer", "POST", body))
        thread.start()
        until(lambda: len(running.engine.tickets) == 1)
        gc.collect()
        assert [each() for each in seen] == [None]
        running.engine.go.set()
        thread.join()
