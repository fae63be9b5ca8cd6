"""Emitters: an `ExitProgram` becomes the files of an artifact.

Targets: `onnx-segments` (one model per stage, the default executor) and `onnx` (the single file), both there unless
a person says otherwise, and `torchscript` (one file for libtorch).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import onnx

from offramp.passes import Backbone, ExitPlan, ExitProgram, build_program
from offramp.runtime.engine import ModelBytes
from offramp.runtime.errors import UsageError
from offramp.runtime.manifest import StageSpec

from .external import INLINE_LIMIT, ExternalData, checked, model_bytes, model_files, weight_bytes
from .gate import speechless
from .metadata import describe_files
from .single_file import single_file_model
from .stages import asked_only, backbone_model, stage_models, stage_specs
from .torchscript import check_torchscript, torchscript_model
from .translate import to_onnx

SEGMENTS, SINGLE_FILE, TORCHSCRIPT = "onnx-segments", "onnx", "torchscript"
TARGETS = (SEGMENTS, SINGLE_FILE)
ALL_TARGETS = (*TARGETS, TORCHSCRIPT)
WHOLE = "model.onnx"
SCRIPT = "model.ts"

__all__ = [
    "ALL_TARGETS",
    "INLINE_LIMIT",
    "SCRIPT",
    "TARGETS",
    "any_onnx",
    "backbone_model",
    "check_targets",
    "emit",
    "model_bytes",
    "model_files",
    "plain_model",
    "stage_models",
    "stage_specs",
    "to_onnx",
    "weight_bytes",
]


def check_targets(targets: Sequence[str]) -> None:
    """Raises `UsageError` for an unknown target, for none, and for one this Python or this torch cannot make."""
    unknown = [t for t in targets if t not in ALL_TARGETS]
    if unknown or not targets:
        raise UsageError(f"target {', '.join(unknown) or '(none)'} is unknown; use {' or '.join(ALL_TARGETS)}")
    if TORCHSCRIPT in targets:
        check_torchscript()


def plain_model(backbone: Backbone, targets: Sequence[str]) -> ModelBytes | None:
    """The plain backbone as ONNX, to measure against; None where no ONNX form is asked for.

    Raises `ModelError` when the backbone holds an operator that one of the targets cannot express.
    """
    if TORCHSCRIPT in targets:
        torchscript_model(build_program(backbone, ExitPlan(()), {}))
    return backbone_model(backbone) if any_onnx(targets) else None


def any_onnx(targets: Sequence[str]) -> bool:
    """Whether an ONNX form is among the targets."""
    return any(t in TARGETS for t in targets)


def emit(
    program: ExitProgram, targets: Sequence[str] = TARGETS, *, manifest: str = "", limit: int = INLINE_LIMIT,
    made: Sequence[onnx.ModelProto] | None = None,
) -> tuple[tuple[StageSpec, ...], dict[str, bytes]]:  # fmt: skip
    """`ExitProgram` -> what the manifest says of the stages, and the files by name.

    `manifest`, JSON, goes into the metadata of every ONNX file; see `metadata`. A model with more than `limit`
    bytes of weights has them in a file beside it, called the same with `.data` behind. `made` are the stages' models
    where they were made before, and perhaps converted; they stay as they are.

    Raises `ModelError` when a stage holds an operator that one of the targets cannot express.
    """
    check_targets(targets)
    specs = stage_specs(program)
    models: Sequence[onnx.ModelProto] = ()
    if any_onnx(targets):
        models = asked_only(program, stage_models(program) if made is None else copy.deepcopy(tuple(made)))
    files: dict[str, bytes] = {}
    if SINGLE_FILE in targets:
        external = ExternalData(WHOLE) if sum(map(weight_bytes, models)) > limit else None
        whole = single_file_model(program, specs, models, external)
        describe_files([whole], manifest)
        files.update(checked(whole, WHOLE, external))
    if SEGMENTS in targets:
        models = [speechless(model, program.backbone.classes) for model in models]
        describe_files(models, manifest, specs)
        for spec, model in zip(specs, models, strict=True):
            files.update(model_files(model, spec.file, limit))
    if TORCHSCRIPT in targets:
        files[SCRIPT] = torchscript_model(program)
    return (specs if SEGMENTS in targets else ()), files
