"""Run an early-exit artifact: numpy and onnxruntime, nothing else.

    import numpy as np
    from offramp.runtime import load

    with load("resnet20.offramp", threads=1) as session:
        images = np.load("images.npy")                  # float32 [B, 3, 32, 32]
        answers = session.run(images)
        print(answers.classes, answers.exits)           # [B]; exit 0 is the shallowest
        for rows, early in session.stream(images):      # each row as soon as its exit answers
            print(rows, early.classes, early.confidence)
        everything = session.run_all(images)            # every exit's answer, [E, B, K]

The flow, file by file: `artifact` opens and checks, `manifest` says what is in it, `engine` makes ONNX
Runtime sessions, `inputs` checks a batch, `execution` runs stages and drops answered rows, `on_device` does so
where values stay on a GPU and `replayed` there with CUDA graphs, `session` is what a person holds. `data` reads data
sets, `table` shows what was saved, `cli` is the console script.
Importing this package does not import onnxruntime; loading an artifact does.
"""

from __future__ import annotations

from .artifact import Artifact, file_spec, open_artifact, write_artifact
from .data import ArrayRows, Rows, batches, fit_rows, open_data
from .errors import (
    ArtifactError,
    BatchDependentError,
    InputError,
    ModelError,
    NoCandidateError,
    OfframpError,
    PassError,
    PlanError,
    ProviderError,
    ProviderWarning,
    StorageError,
    UsageError,
)
from .manifest import Manifest, TensorSpec, dump_manifest, parse_manifest
from .process import limit_memory, share_threads
from .session import AllAnswers, Answers, Session, load
from .table import render

__all__ = [
    "AllAnswers",
    "Answers",
    "ArrayRows",
    "Artifact",
    "ArtifactError",
    "BatchDependentError",
    "InputError",
    "Manifest",
    "ModelError",
    "NoCandidateError",
    "OfframpError",
    "PassError",
    "PlanError",
    "ProviderError",
    "ProviderWarning",
    "Rows",
    "Session",
    "StorageError",
    "TensorSpec",
    "UsageError",
    "batches",
    "dump_manifest",
    "file_spec",
    "fit_rows",
    "limit_memory",
    "load",
    "open_artifact",
    "open_data",
    "parse_manifest",
    "render",
    "share_threads",
    "write_artifact",
]
