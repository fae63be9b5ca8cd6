"""The manifest says the same after a round trip, and nothing but itself is accepted."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny, sign

from offramp.runtime import ArtifactError, Manifest, TensorSpec, dump_manifest, parse_manifest
from offramp.runtime.manifest import (
    FORMAT_VERSION,
    BackboneSpec,
    Certificate,
    Evaluation,
    ExitEvaluation,
    ExitSpec,
    FileSpec,
    Measured,
    Plan,
    Splits,
    StageSpec,
    StaticEvaluation,
    Timing,
)

text = st.text(max_size=12)
real = st.floats(allow_nan=False, allow_infinity=False)
rate = st.floats(0, 1)
count = st.integers(0, 2**60)
file_name = st.from_regex(r"[a-z0-9]{1,6}(/[a-z0-9]{1,4}\.onnx)?", fullmatch=True)
file_spec = st.builds(FileSpec, count, st.from_regex("[0-9a-f]{64}", fullmatch=True))
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | real | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


def several(strategy: st.SearchStrategy[Any], size: int | None = None) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(strategy, min_size=size or 0, max_size=3 if size is None else size).map(tuple)


def ranged(spec: TensorSpec) -> st.SearchStrategy[TensorSpec]:
    """The same with ranges for some of its named dimensions."""
    span = st.tuples(st.integers(0, 5), st.none() | st.integers(5, 9))
    names = [size for size in spec.shape[1:] if isinstance(size, str)]
    given = st.dictionaries(st.sampled_from(names), span) if names else st.just({})
    return given.map(lambda ranges: replace(spec, ranges=ranges))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    exits = draw(st.integers(1, 4))
    staged = draw(st.booleans())
    files = draw(st.dictionaries(file_name, file_spec, max_size=3)) | {"model.onnx": draw(file_spec)}
    names = several(text)
    stage = st.builds(StageSpec, st.sampled_from(sorted(files)), names, names, names)
    inputs = draw(
        st.lists(
            st.builds(
                TensorSpec,
                text,
                st.sampled_from(["float32", "int64", "uint8"]),
                several(st.integers(0, 9) | text).map(lambda rest: ("batch", *rest)),
            ).flatmap(ranged),
            min_size=1,
            max_size=3,
            unique_by=lambda spec: spec.name,
        )
    )
    thresholds = several(st.none() | real, exits - 1)
    certificate = st.builds(Certificate, real, count, real, real)
    plan = st.builds(Plan, real, text, thresholds, st.none() | certificate)
    plans = draw(several(plan, draw(st.integers(1, 3))))
    exit_spec = st.builds(
        ExitSpec, text, text, text, st.dictionaries(text, json_value, max_size=2), count, count, count, real
    )
    seen = st.builds(ExitEvaluation, rate, st.none() | rate, rate, st.none() | rate)
    timing = st.builds(
        Timing,
        count,
        count,
        count,
        real,
        real,
        real,
        st.tuples(real, real),
        st.none() | real,
        st.none() | real,
        several(real),
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        backbone=draw(st.builds(BackboneSpec, text, text, count, count, text)),
        inputs=tuple(inputs),
        classes=draw(st.integers(1, 10**6)),
        confidence=draw(text),
        risk=draw(text),
        stages=draw(several(stage, exits)) if staged else (),
        exits=draw(several(exit_spec, exits)),
        plans=plans,
        default_plan=draw(st.integers(0, len(plans) - 1)),
        splits=draw(st.builds(Splits, *[count] * 6)),
        preprocessing=draw(st.none() | text),
        evaluation=Evaluation(
            rows=draw(count),
            exits=draw(several(seen, exits)),
            disagreement=draw(rate),
            disagreement_interval=draw(st.tuples(rate, rate)),
            regret=draw(rate),
            accuracy_backbone=draw(st.none() | rate),
            accuracy=draw(st.none() | rate),
            flops_backbone=draw(real),
            flops=draw(real),
            oracle_flops=draw(real),
            static=draw(st.none() | st.builds(StaticEvaluation, text, count, real, rate, rate, st.none() | rate)),
        ),
        files=files,
        measured=Measured(
            draw(text), draw(text), draw(st.dictionaries(text, text, max_size=2)), draw(several(timing)), {}
        ),
    )


@settings(max_examples=60)
@given(manifests())
def test_a_round_trip_changes_nothing(manifest: Manifest) -> None:
    data = dump_manifest(manifest)
    assert parse_manifest(data, "m") == manifest
    assert dump_manifest(parse_manifest(data, "m")) == data


def test_the_test_s_own_signature_is_the_format_s(tiny: Tiny) -> None:
    data = dump_manifest(tiny.manifest)
    assert sign(json.loads(data)) == data


@settings(max_examples=150)
@given(position=st.integers(0, 10**9), flip=st.integers(1, 255))
def test_one_altered_byte_is_noticed(tiny: Tiny, position: int, flip: int) -> None:
    data = bytearray(dump_manifest(tiny.manifest))
    data[position % len(data)] ^= flip
    with pytest.raises(ArtifactError, match="somewhere/manifest"):
        parse_manifest(bytes(data), "somewhere/manifest")


@settings(max_examples=60)
@given(length=st.integers(0, 10**9))
def test_a_truncated_manifest_is_noticed(tiny: Tiny, length: int) -> None:
    data = dump_manifest(tiny.manifest)
    with pytest.raises(ArtifactError):
        parse_manifest(data[: length % len(data)], "m")


_OURS = b'{"format_version": %d' % FORMAT_VERSION


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"{",
        b"{} {}",
        b'{"format_version": NaN}',
        _OURS + b"}",
        _OURS + b', "format_version": %d}' % FORMAT_VERSION,
        _OURS + b', "classes": 1e999}',
        _OURS + b', "classes": ' + b"[" * 400 + b"]" * 400 + b"}",
        b"[" * 100_000,
        b"9" * 10_000,
    ],
    ids=range(13),
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"copy the artifact again"):
        parse_manifest(data, "m")


NAMES = (
    *("../x", "/etc/passwd", "a/../../b", "a\\b", "", ".hidden"),
    *("manifest.json", "a//b", "a/", "a\n", "\u00e4", "C:x"),
)


def put(*path: str | int) -> Any:
    """-> a forgery that sets the value at `path`."""

    def forge(body: Any, value: Any) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return forge


ONE_STAGE = {"file": "stages/0.onnx", "inputs": [], "outputs": [], "carries": []}
NO_FILE = {"size": 1, "sha256": ""}
NEXT = FORMAT_VERSION + 1
FORGERIES = [
    ("newer version", put("format_version"), NEXT, rf"version {NEXT} is newer than .* reads \({FORMAT_VERSION}\)"),
    ("older version", put("format_version"), 0, f"format version 0 is not {FORMAT_VERSION}"),
    ("version as text", put("format_version"), "1", f"format version '1' is not {FORMAT_VERSION}"),
    ("version as bool", put("format_version"), True, f"format version True is not {FORMAT_VERSION}"),
    ("extra field", put("surplus"), 1, r"m\.surplus: not a field"),
    ("extra nested field", put("plans", 0, "surplus"), 1, r"m\.plans\[0\]\.surplus: not a field"),
    ("bool for number", put("classes"), True, r"m\.classes: True is not int"),
    ("real for integer", put("classes"), 5.0, r"m\.classes: 5.0 is not int"),
    ("text for real", put("plans", 0, "tolerance"), "0.1", r"m\.plans\[0\]\.tolerance: '0.1' is not float"),
    ("huge integer for real", put("plans", 0, "tolerance"), 10**400, r"tolerance: 1000"),
    ("null for text", put("confidence"), None, r"m\.confidence: None is not str"),
    ("list for object", put("files"), [], r"m\.files: \[\] is not dict"),
    (
        "three for a pair",
        put("evaluation", "disagreement_interval"),
        [0.0, 0.1, 0.2],
        "3 entries instead of 2",
    ),
    ("text for threshold", put("plans", 0, "thresholds", 0), "x", r"thresholds\[0\]"),
    ("too few thresholds", put("plans", 1, "thresholds"), [0.5], "1 thresholds for 2 exits"),
    ("unknown precision", put("precision"), "int4", "precision 'int4' is unknown; compile"),
    ("no plan", put("plans"), [], "default plan 0 does not exist"),
    ("negative plan", put("default_plan"), -1, "default plan -1 does not exist"),
    ("no inputs", put("inputs"), [], "no inputs"),
    ("no classes", put("classes"), 0, "no classes"),
    ("input without batch", put("inputs", 0, "shape"), [1, 6], "input shape"),
    ("input without shape", put("inputs", 0, "shape"), [], "input shape"),
    ("negative size", put("inputs", 0, "shape"), ["batch", -1], "input shape"),
    ("range of no dimension", put("inputs", 0, "ranges"), {"length": [1, 8]}, "range of 'length' is malformed"),
    ("range of the batch", put("inputs", 0, "ranges"), {"batch": [1, 8]}, "range of 'batch' is malformed"),
    ("range with one end", put("inputs", 0, "ranges"), {"length": [1]}, "1 entries instead of 2"),
    ("unknown dtype", put("inputs", 0, "dtype"), "object", "dtype 'object'"),
    ("stage not listed", put("stages", 0, "file"), "9.onnx", "'9.onnx' is not among the files"),
    ("fewer stages", put("stages"), [ONE_STAGE], "1 stages but 3"),
    ("fewer evaluated", put("evaluation", "exits"), [], "evaluation covers 0 of 3"),
    ("listed twice", put("measured", "files", "model.onnx"), NO_FILE, "'model.onnx' is listed twice"),
    *[(f"name {n!r}", put("files", n), NO_FILE, "leaves the artifact") for n in NAMES],
    *[(f"measured {n!r}", put("measured", "files", n), NO_FILE, "leaves the") for n in NAMES],
]


@pytest.mark.parametrize(("forge", "value", "message"), [f[1:] for f in FORGERIES], ids=[f[0] for f in FORGERIES])
def test_a_well_signed_forgery_is_refused(tiny: Tiny, forge: Any, value: Any, message: str) -> None:
    body = json.loads(dump_manifest(tiny.manifest))
    forge(body, value)
    with pytest.raises(ArtifactError, match=message):
        parse_manifest(sign(body), "m")


def fields(body: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every field of every object; what the format leaves open has none."""
    if isinstance(body, list):
        return [p for i, item in enumerate(body) for p in fields(item, (*path, i))]
    if not isinstance(body, dict) or path[-1:] in (("head_config",), ("versions",), ("files",)):
        return []
    return [p for key, item in body.items() for p in [(*path, key), *fields(item, (*path, key))]]


def test_every_missing_field_is_named(tiny: Tiny) -> None:
    whole = dump_manifest(tiny.manifest)
    paths = [path for path in fields(json.loads(whole)) if path not in {("digest",), ("format_version",)}]
    assert len(paths) > 80
    for path in paths:
        body = json.loads(whole)
        parent = body
        for key in path[:-1]:
            parent = parent[key]
        del parent[path[-1]]
        with pytest.raises(ArtifactError, match=rf"{path[-1]}: missing"):
            parse_manifest(sign(body), "m")
