"""A three-exit artifact built by hand, and the same program in numpy to judge the runtime by.

    stage 0   x [B, 6]            -> h0, skip;  head on h0          carries h0, skip, side
    stage 1   h0                  -> h1;        head on h1          carries h1, skip, side
    stage 2   h1, skip, side      -> the backbone's own output      carries nothing

`skip` is made in stage 0 and read in stage 2; `side` is an input nothing reads before stage 2. Both must be
compacted with the live rows, or the answers of the last stage belong to other rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from offramp.runtime import Manifest, Session, TensorSpec, file_spec, write_artifact
from offramp.runtime.manifest import (
    FORMAT_VERSION,
    BackboneSpec,
    Certificate,
    Evaluation,
    ExitEvaluation,
    ExitSpec,
    Measured,
    Plan,
    Splits,
    StageSpec,
    StaticEvaluation,
    Timing,
)

CLASSES = 5
THRESHOLDS = (0.55, 0.5)
INF = float("inf")
_SHAPES = {"w0": (6, 8), "w1": (8, 8), "w2": (8, 5), "ws": (3, 8), "g0": (8, 5), "g1": (8, 5)}


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.7 for name, shape in _SHAPES.items()}


def batch(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, 6)).astype(np.float32),
        "side": rng.standard_normal((rows, 3)).astype(np.float32),
    }


def reference_all(rows: dict[str, np.ndarray]) -> np.ndarray:
    """[E, B, K] probabilities of every exit."""
    w = weights()
    h0 = np.maximum(rows["x"] @ w["w0"], 0)
    h1 = np.maximum(h0 @ w["w1"], 0)
    last = (h1 + np.tanh(h0) + rows["side"] @ w["ws"]) @ w["w2"]
    return np.stack([_softmax(h0 @ w["g0"]), _softmax(h1 @ w["g1"]), _softmax(last)])


def reference(rows: dict[str, np.ndarray], thresholds: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """-> probabilities [B, K], exits [B]; one row at a time, so that no row can see another."""
    every = reference_all(rows)
    exits = np.empty(every.shape[1], np.int64)
    for row in range(len(exits)):
        leaving = [e for e, t in enumerate(thresholds) if np.float32(every[e, row].max()) >= np.float32(t)]
        exits[row] = leaving[0] if leaving else 2
    return every[exits, np.arange(len(exits))], exits


def doubtful(rows: dict[str, np.ndarray], thresholds: Sequence[float]) -> np.ndarray:
    """[B] bool: a confidence lies within 1e-5 of a threshold, where rounding may decide."""
    confidence = reference_all(rows)[:2].max(axis=2)
    limits = np.array(thresholds, np.float32)[:, None]
    return np.asarray((np.abs(confidence - limits) < 1e-5).any(axis=0))


def _softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True), np.float32)


def _node(kind: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, list(inputs), list(outputs), **attributes)


def _head(level: int, scores: str) -> list[NodeProto]:
    return [
        _node("Softmax", [scores], f"p{level}", axis=1),
        _node("ReduceMax", [f"p{level}", "axis1"], f"c{level}", keepdims=0),
    ]


def _segments() -> list[list[NodeProto]]:
    return [
        [
            _node("MatMul", ["x", "w0"], "a0"),
            _node("Relu", ["a0"], "h0"),
            _node("Tanh", ["h0"], "skip"),
            _node("MatMul", ["h0", "g0"], "s0"),
            *_head(0, "s0"),
        ],
        [
            _node("MatMul", ["h0", "w1"], "a1"),
            _node("Relu", ["a1"], "h1"),
            _node("MatMul", ["h1", "g1"], "s1"),
            *_head(1, "s1"),
        ],
        [
            _node("MatMul", ["side", "ws"], "a2"),
            _node("Sum", ["h1", "skip", "a2"], "b2"),
            _node("MatMul", ["b2", "w2"], "s2"),
            *_head(2, "s2"),
        ],
    ]


STAGES = (
    StageSpec("stages/0.onnx", ("x",), ("h0", "skip"), ("h0", "skip", "side")),
    StageSpec("stages/1.onnx", ("h0",), ("h1",), ("h1", "skip", "side")),
    StageSpec("stages/2.onnx", ("h1", "skip", "side"), (), ()),
)
_WIDTHS = {"x": 6, "side": 3, "h0": 8, "skip": 8, "h1": 8, "probabilities": CLASSES}


def _initializers(names: set[str]) -> list[TensorProto]:
    constants: dict[str, np.ndarray] = {**weights(), "axis1": np.array([1], np.int64)}
    constants["minus1"] = np.array([-1], np.int64)
    return [numpy_helper.from_array(value, name) for name, value in constants.items() if name in names]


def _model(nodes: list[NodeProto], inputs: list[Any], outputs: list[Any], extra: list[TensorProto]) -> bytes:
    used = {name for node in nodes for name in node.input} | {*_SHAPES} | {"minus1"}
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, _initializers(used) + extra)
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(model.SerializeToString())


def _value(name: str) -> Any:
    shape: list[int | str] = ["batch"] if name in ("confidence", "exit") else ["batch", _WIDTHS.get(name, 0)]
    kind = TensorProto.INT64 if name == "exit" else TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind, shape)


def stage_bytes(level: int) -> bytes:
    rename = {f"p{level}": "probabilities", f"c{level}": "confidence"}
    nodes = []
    for node in _segments()[level]:
        inputs, outputs = ([rename.get(n, n) for n in names] for names in (node.input, node.output))
        copy = NodeProto()
        copy.CopyFrom(node)
        del copy.input[:], copy.output[:]
        copy.input.extend(inputs)
        copy.output.extend(outputs)
        nodes.append(copy)
    spec = STAGES[level]
    outputs = [_value(name) for name in (*spec.outputs, "probabilities", "confidence")]
    return _model(nodes, [_value(name) for name in spec.inputs], outputs, [])


def _level(level: int, carried: dict[str, str]) -> list[NodeProto]:
    """Stage `level` on already compacted values, then a branch over the rows that stay -> P{level}, E{level}.

    `carried` maps a value's name to the outer name it is gathered from.
    """
    here = str(level)
    nodes = [_node("Gather", [outer, "rows" + str(level - 1)], inner) for inner, outer in carried.items()]
    for node in _segments()[level]:
        for index, name in enumerate(node.input):
            if f"{name}@{here}" in carried:
                node.input[index] = f"{name}@{here}"
        nodes.append(node)
    exit_value = helper.make_tensor("value", TensorProto.INT64, [1], [level])
    nodes += [
        _node("Shape", ["c" + here], "n" + here),
        _node("ConstantOfShape", ["n" + here], "e" + here, value=exit_value),
    ]
    if level == 2:
        return [*nodes, _node("Identity", ["p2"], "P2"), _node("Identity", ["e2"], "E2")]
    threshold = helper.make_tensor("value", TensorProto.INT64, [], [level])
    nodes += [
        _node("Constant", [], "k" + here, value=threshold),
        _node("Gather", ["thresholds", "k" + here], "t" + here),
        _node("GreaterOrEqual", ["c" + here, "t" + here], "l" + here),
        _node("Not", ["l" + here], "stay" + here),
        _node("NonZero", ["stay" + here], "nz" + here),
        _node("Reshape", ["nz" + here, "minus1"], "rows" + here),
        _node("Transpose", ["nz" + here], "where" + here),
        _node("Cast", ["stay" + here], "stayi" + here, to=TensorProto.INT64),
        _node("ReduceMax", ["stayi" + here], "anyi" + here, keepdims=0),
        _node("Cast", ["anyi" + here], "any" + here, to=TensorProto.BOOL),
        _branch(level),
    ]
    return nodes


def _branch(level: int) -> NodeProto:
    here, deeper = str(level), str(level + 1)
    names = ("h1", "skip", "side") if level else ("h0", "skip", "side")
    carried = {f"{n}@{deeper}": f"{n}@{here}" if level and n != "h1" else n for n in names}
    then = [
        *_level(level + 1, carried),
        _node("ScatterND", ["p" + here, "where" + here, "P" + deeper], "TP" + here),
        _node("ScatterND", ["e" + here, "where" + here, "E" + deeper], "TE" + here),
    ]
    other = [_node("Identity", ["p" + here], "OP" + here), _node("Identity", ["e" + here], "OE" + here)]
    infos = {
        prefix: [
            helper.make_tensor_value_info(prefix + "P" + here, TensorProto.FLOAT, [None, CLASSES]),
            helper.make_tensor_value_info(prefix + "E" + here, TensorProto.INT64, [None]),
        ]
        for prefix in ("T", "O")
    }
    return _node(
        "If",
        ["any" + here],
        "P" + here,
        "E" + here,
        then_branch=helper.make_graph(then, "then" + here, [], infos["T"]),
        else_branch=helper.make_graph(other, "else" + here, [], infos["O"]),
    )


def single_file_bytes() -> bytes:
    nodes = [*_level(0, {}), _node("Identity", ["P0"], "probabilities"), _node("Identity", ["E0"], "exit")]
    thresholds = numpy_helper.from_array(np.array(THRESHOLDS, np.float32), "thresholds")
    inputs = [
        _value("x"),
        _value("side"),
        helper.make_tensor_value_info("thresholds", TensorProto.FLOAT, [2]),
    ]
    return _model(nodes, inputs, [_value("probabilities"), _value("exit")], [thresholds])


@dataclass(frozen=True)
class Tiny:
    """The artifact as a directory, and what it was made of."""

    path: Path
    manifest: Manifest
    files: dict[str, bytes]


def tiny_files() -> dict[str, bytes]:
    files = {spec.file: stage_bytes(level) for level, spec in enumerate(STAGES)}
    return {**files, "model.onnx": single_file_bytes(), "report.html": b"<p>measured</p>"}


def tiny_manifest(files: dict[str, bytes]) -> Manifest:
    specs = {name: file_spec(data) for name, data in files.items()}
    report = {"report.html": specs.pop("report.html")}
    timings = (
        Timing(1, 1, 9, 1.0, 0.9, 0.9, (0.88, 0.92), 1.06, 0.85, (0.4, 0.2, 0.25)),
        Timing(32, 1, 9, 0.5, 0.3, 0.6, (0.59, 0.61), None, None, (0.15, 0.08, 0.05)),
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        backbone=BackboneSpec("tiny", "ab" * 32, 152, 1_000, "logits"),
        inputs=(TensorSpec("x", "float32", ("batch", 6)), TensorSpec("side", "float32", ("batch", 3))),
        classes=CLASSES,
        confidence="max_probability",
        risk="disagreement",
        stages=STAGES,
        exits=(
            ExitSpec("layer1.block0", "relu", "one dense layer", {"family": "dense"}, 40, 80, 400, 1.2),
            ExitSpec("layer2.block0", "relu_1", "one dense layer", {"family": "dense"}, 40, 80, 300, 1.1),
            ExitSpec("output", "", "the backbone's own", {}, 0, 0, 300, 1.0),
        ),
        plans=(
            Plan(0.01, "certified", THRESHOLDS, Certificate(0.05, 1_500, 7.0, 0.008701)),
            Plan(0.001, "joint", (None, 0.9), None),
        ),
        default_plan=0,
        splits=Splits(0, 50, 10, 20, 10, 10),
        preprocessing=None,
        evaluation=Evaluation(
            rows=1500,
            exits=(
                ExitEvaluation(0.5, 0.995, 0.9, 0.93),
                ExitEvaluation(0.2, 0.99, 0.95, 0.92),
                ExitEvaluation(0.3, 1.0, 1.0, 0.91),
            ),
            disagreement=0.006,
            disagreement_interval=(0.0027, 0.0114),
            regret=0.002,
            accuracy_backbone=0.926,
            accuracy=0.925,
            flops_backbone=1000.0,
            flops=760.0,
            oracle_flops=500.0,
            static=StaticEvaluation("smaller", 40, 600.0, 0.08, 0.05, 0.88),
        ),
        files=specs,
        measured=Measured("2026-01-01T00:00:00Z", "a test", {"onnxruntime": "1.2"}, timings, report),
    )


def write_tiny(path: Path) -> Tiny:
    files = tiny_files()
    manifest = tiny_manifest(files)
    write_artifact(path, manifest, files)
    return Tiny(path, manifest, files)


def sign(body: dict[str, Any]) -> bytes:
    """The bytes of a manifest with this body, as the format defines them: what a forger would write."""
    unsigned = {key: value for key, value in body.items() if key != "digest"}
    digest = hashlib.sha256(_canonical(unsigned)).hexdigest()
    return _canonical({**unsigned, "digest": digest})


def _canonical(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=2, sort_keys=True) + "\n").encode()


def wrong_in_threads(session: Session) -> list[int]:
    """Four threads ask one session at the same time -> those that got a wrong answer; what one raises is raised."""

    def is_right(seed: int) -> bool:
        for size in (1, 7, 33) * 5:
            rows = batch(size, seed)
            sure = ~doubtful(rows, THRESHOLDS)
            if not np.array_equal(session.run(rows).exits[sure], reference(rows, THRESHOLDS)[1][sure]):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        return [seed for seed, right in enumerate(pool.map(is_right, range(4))) if not right]


def resident() -> int:
    """Bytes of memory that this process has, on Linux."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024
