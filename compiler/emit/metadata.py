"""What an ONNX file says of itself, under two keys of its metadata; ONNX Runtime hands both out with any model.

`offramp.manifest`  in every file: JSON, the fields of `manifest.json` that are known before anything is emitted and
                    do not depend on labels: format version, backbone, inputs, classes, confidence metric, exits
                    (place, head, temperature, ...), plans (thresholds, tolerance, policy, certificate), splits,
                    preprocessing. What is left out could not be in it, such as the files' own hashes.
`offramp.stage`     in a stage: JSON, its `index` and `count`, and its entry in the manifest's `stages`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import onnx

from offramp.runtime.manifest import Manifest, StageSpec

MANIFEST_KEY, STAGE_KEY = "offramp.manifest", "offramp.stage"
_LATER = ("stages", "evaluation", "files", "measured")


def known_before(manifest: Manifest) -> str:
    """The part of a manifest that its ONNX files carry, as JSON."""
    body = dataclasses.asdict(manifest)
    return _json({name: value for name, value in body.items() if name not in _LATER})


def describe_files(models: Sequence[onnx.ModelProto], manifest: str, stages: Sequence[StageSpec] = ()) -> None:
    """Write the metadata, in place; without `stages` the models are not stages."""
    for index, model in enumerate(models):
        notes = {MANIFEST_KEY: manifest} if manifest else {}
        if stages:
            notes[STAGE_KEY] = _json({"index": index, "count": len(stages), **dataclasses.asdict(stages[index])})
        del model.metadata_props[:]
        for key, value in sorted(notes.items()):
            model.metadata_props.add(key=key, value=value)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)
