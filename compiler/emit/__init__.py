"""Emitters: an `ExitProgram` becomes the files of an artifact.

Targets: `onnx-segments` (one model per stage, the default executor) and `onnx` (the single file).
"""

from __future__ import annotations

from collections.abc import Sequence

from offramp.passes import ExitProgram
from offramp.runtime.errors import UsageError
from offramp.runtime.manifest import StageSpec

from .single_file import single_file_model
from .stages import backbone_model, stage_models, stage_specs
from .translate import serialise, to_onnx

SEGMENTS, SINGLE_FILE = "onnx-segments", "onnx"
TARGETS = (SEGMENTS, SINGLE_FILE)

__all__ = ["TARGETS", "backbone_model", "check_targets", "emit", "serialise", "stage_specs", "to_onnx"]


def check_targets(targets: Sequence[str]) -> None:
    """Raises `UsageError` for an unknown target, or for none."""
    unknown = [t for t in targets if t not in TARGETS]
    if unknown or not targets:
        raise UsageError(f"target {', '.join(unknown) or '(none)'} is unknown; use {' or '.join(TARGETS)}")


def emit(program: ExitProgram, targets: Sequence[str] = TARGETS) -> tuple[tuple[StageSpec, ...], dict[str, bytes]]:
    """`ExitProgram` -> what the manifest says of the stages, and the files by name.

    Raises `ModelError` when a stage holds an operator ONNX cannot express.
    """
    check_targets(targets)
    specs = stage_specs(program)
    models = stage_models(program)
    files: dict[str, bytes] = {}
    if SEGMENTS in targets:
        files.update({spec.file: serialise(model) for spec, model in zip(specs, models, strict=True)})
    if SINGLE_FILE in targets:
        files["model.onnx"] = serialise(single_file_model(program, specs, models))
    return (specs if SEGMENTS in targets else ()), files
