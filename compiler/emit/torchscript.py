"""TorchScript: one file that libtorch loads without Python, rows leaving it as they leave the eager program.

    stage_i(values)         one stage, as its exported graph says: live values, probabilities, confidence
    from_i(limits, values)  stage i and all behind it: rows whose confidence is below limits[i] are selected from
                            every live value and go on; their answers are copied over those of stage i
    forward(inputs)         from_0 under the thresholds set last: probabilities [B, K], exit [B] int64
    thresholds()            [exits] float32; `set_thresholds` takes others, infinity for an exit that never answers

The methods are written as TorchScript source rather than traced: torch.export already knows which numbers are
sizes, and a trace would write down those of its example. Weights are buffers; a factory function makes its
tensor where the stage's input lies, so the loaded module may be moved to another device.

Refused: Python 3.14 and later and a torch that does not script, operators that are not libtorch's own.
"""

from __future__ import annotations

import functools
import hashlib
import io
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from offramp.passes import ExitProgram
from offramp.passes.flops import meta_like
from offramp.passes.segments import Segment
from offramp.runtime import Answers
from offramp.runtime.errors import ModelError, UsageError

from .script_source import Weights, program_source, stage_method
from .stages import Stage

_EXAMPLE_BATCH = 3  # torch.export treats 0 and 1 as constants
_UNSUPPORTED = (3, 14)  # the first Python that torch.jit does not support


def check_torchscript() -> None:
    """Raises `UsageError` where this Python or this torch cannot make TorchScript."""
    if sys.version_info >= _UNSUPPORTED:
        version = ".".join(map(str, sys.version_info[:2]))
        raise UsageError(f"target torchscript needs Python 3.13 or older, this is {version}; leave the target out")
    script = getattr(torch.jit, "script", None)
    if script is not None:
        with _deprecated():
            scripted = script(nn.Identity())
        if isinstance(scripted, torch.jit.ScriptModule):
            return
    raise UsageError(
        f"target torchscript needs a torch that scripts, torch {torch.__version__} does not "
        "(unset PYTORCH_JIT if it is set); leave the target out"
    )


def torchscript_model(program: ExitProgram) -> bytes:
    """`ExitProgram` -> the bytes of `model.ts`; the same program gives the same bytes.

    Raises `ModelError` when a stage holds an operator that libtorch alone does not have, `UsageError` as
    `check_torchscript` does.
    """
    check_torchscript()
    weights: Weights = {}
    methods = []
    for index, segment in enumerate(program.segments):
        with _reasoned(program.backbone.name):
            exported = _export(Stage(program, index), segment)
            text, own = stage_method(index, exported)
        methods.append(text)
        weights.update(own)
    source = program_source(program, methods)
    module = _program_class(source)()
    for name, tensor in weights.items():
        module.register_buffer(name, _alone(tensor.detach()))
    module.register_buffer("limits", torch.tensor(program.plan.thresholds, dtype=torch.float32))
    buffer = io.BytesIO()
    with _reasoned(program.backbone.name), _deprecated():
        scripted = torch.jit.script(module.eval())
        if not hasattr(scripted, "set_thresholds"):
            scripted.define(source)
        torch.jit.save(scripted, buffer)
    return buffer.getvalue()


class ScriptSession:
    """`model.ts` loaded in this process, answering as a session of the runtime does."""

    def __init__(self, source: bytes | Path, inputs: Sequence[str]) -> None:
        """`source` is the file's content, or the file, which is not held twice then."""
        with _deprecated():
            self.module = torch.jit.load(io.BytesIO(source) if isinstance(source, bytes) else source)  # type: ignore[no-untyped-call]
        self.inputs = inputs

    def run(self, batch: Mapping[str, np.ndarray], *, thresholds: Sequence[float]) -> Answers:
        """One answer per row under `thresholds` [E-1]."""
        self.module.set_thresholds(torch.tensor(thresholds, dtype=torch.float32))
        values = [torch.from_numpy(batch[name]) for name in self.inputs]
        with torch.no_grad():
            answer, exits = self.module(*values)
        return Answers(answer.argmax(1).numpy(), answer.numpy(), exits.numpy(), answer.amax(1).numpy())


@functools.cache
def _program_class(source: str) -> type[nn.Module]:
    """An empty module class for one source.

    torch keeps every scripted class for as long as the process lives, and gives one of a name it has seen a
    number; the same class for the same source keeps such numbers out of the file.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    return type(f"Program_{digest}", (nn.Module,), {"__module__": "offramp"})


def _alone(weight: torch.Tensor) -> torch.Tensor:
    """A weight that is a view of something larger as a tensor of its own: the file would hold all of it."""
    return weight if weight.untyped_storage().nbytes() == weight.nbytes else weight.clone()


def _export(stage: Stage, segment: Segment) -> ExportedProgram:
    """The stage's graph with every dimension free that was free in the segment's."""
    batch = Dim("batch")
    values, shapes = [], []
    for node in segment.graph_module.graph.find_nodes(op="placeholder"):
        like = node.meta["val"]
        values.append(torch.zeros_like(meta_like(like, str(like.shape[0]), _EXAMPLE_BATCH), device="cpu"))
        free: dict[int, Any] = {d: Dim.DYNAMIC for d, size in enumerate(like.shape) if isinstance(size, torch.SymInt)}
        shapes.append({**free, 0: batch})
    with torch.no_grad():
        return torch.export.export(stage.eval(), tuple(values), dynamic_shapes=(tuple(shapes),), strict=False)


@contextmanager
def _deprecated() -> Iterator[None]:
    """torch.jit says on every call that it is deprecated; whoever asks for this target knows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield


@contextmanager
def _reasoned(title: str) -> Iterator[None]:
    """What torch refuses becomes one line; the pages below it are advice on how to debug torch."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{title} cannot be translated to TorchScript: {reason[:300]}") from error
